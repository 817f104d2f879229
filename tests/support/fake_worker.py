"""A worker without a model: it computes hashes, and notices every page that is not what it should be.

The token after ``tokens`` is a hash of (adapter version, seed, tokens), so preemption, caching, chunking and batching
must not change it. K/V is modelled too: each position of each page holds the hash of the whole prefix up to it, under
the version that computed it; before a token is sampled, every earlier position of the sequence is compared. Adapter
slots and rank pages are modelled in the same way. Copies overwrite their pages when a plan is *submitted*, which is the
worst moment: while the previous step has not computed yet; they are complete any number of steps later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from lorikeet.core.plan import (
    PageCopy,
    PooledVector,
    PrefillChunk,
    SampledToken,
    SequenceStart,
    StepPlan,
    StepResult,
)
from lorikeet.core.request import Pooling, TokenLogprobs

_PRIME = (1 << 61) - 1


def prefix_hash(previous: int, token: int) -> int:
    return (previous * 1_000_003 + token + 1) % _PRIME


def first_hash(version: int) -> int:
    """Hash of the empty prefix under an adapter version."""
    return (version + 7) * 2_654_435_761 % _PRIME


def pooled(pooling: Pooling, hashes: list[int]) -> bytes:
    """The vector of a sequence: its last state, or all of them."""
    states = hashes if pooling.kind == "mean" else hashes[-1:]
    return str(sum(states)).encode()


def next_token(prefix: int, seed: int, vocab_size: int) -> int:
    mixed = (prefix ^ (seed * 0x9E3779B97F4A7C15)) % _PRIME
    return (mixed * 1_099_511_628_211 % _PRIME >> 7) % vocab_size


@dataclass
class _Row:
    """What the worker keeps of a sequence between steps."""

    start: SequenceStart
    tokens: list[int]
    pages: list[int]
    hashes: list[int] = field(default_factory=list)
    version: int = -1


@dataclass
class _Copy:
    """A copy on its way; complete when ``num_steps`` more results were collected after its own plan's."""

    copy: PageCopy
    step: int
    num_steps: int


class FakeWorker:
    """Executes plans.

    Args:
        fail_copy: version -> True if its copy shall fail now.
        fail_token: sequence -> True if the token it samples now shall be an error.
        copy_steps: how many steps later than its plan's the next copy is complete.
        max_ahead: see ``engine.core.Executor``.
    """

    def __init__(
        self,
        *,
        page_size: int,
        num_pages: int,
        num_slots: int,
        vocab_size: int,
        fail_copy: Callable[[int], bool] = lambda version: False,
        fail_token: Callable[[int], bool] = lambda seq: False,
        copy_steps: Callable[[], int] = lambda: 0,
        max_ahead: int = 0,
    ) -> None:
        self.max_ahead = max_ahead
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.rows: dict[int, _Row] = {}
        self._kv: list[int | None] = [None] * (num_pages * page_size)
        self._slots = [0] * num_slots
        self._slot_pages: list[tuple[int, ...]] = [()] * num_slots
        self._page_owner: dict[int, int] = {}
        self._broken: set[int] = set()
        self._fail_copy = fail_copy
        self._fail_token = fail_token
        self._copy_steps = copy_steps
        self._copies: list[_Copy] = []
        self._submitted: deque[tuple[StepPlan, StepResult]] = deque()
        self.num_copies = 0
        # Sequences of steps that were never executed: their ends say nothing to this worker.
        self.ignored: set[int] = set()

    def submit(self, plan: StepPlan) -> None:
        """Take a plan; its copies begin now, its computation happens in ``collect``."""
        copying = {begun.copy.slot for begun in self._copies}
        for slot in plan.freed_slots:
            assert slot not in copying, f"slot {slot} is freed while its copy is on its way"
            for page in self._slot_pages[slot]:
                del self._page_owner[page]
            self._slots[slot], self._slot_pages[slot] = 0, ()
            self._broken.discard(slot)
        for copy in plan.copies:
            assert 0 < copy.slot < len(self._slots), f"slot {copy.slot}"
            assert self._slots[copy.slot] == 0, f"slot {copy.slot} was not freed"
            assert copy.slot not in self._broken | copying, f"slot {copy.slot} was not cleaned"
            assert len(set(copy.page_ids)) == len(copy.page_ids)
            for page in copy.page_ids:
                assert page not in self._page_owner, f"rank page {page} is in use"
                self._page_owner[page] = copy.slot
            self._slot_pages[copy.slot] = tuple(copy.page_ids)
            self._copies.append(_Copy(copy, plan.step, self._copy_steps()))
            copying.add(copy.slot)
            self.num_copies += 1
        self._submitted.append((plan, StepResult(step=plan.step)))

    def collect(self) -> StepResult:
        """Compute the oldest plan that was submitted."""
        plan, result = self._submitted.popleft()
        self._end_copies(plan, result)
        for seq in plan.ended:
            row = self.rows.pop(seq, None)
            assert row is not None or seq in self.ignored, f"sequence {seq} ends twice"
        for start in plan.starts:
            self._open(start)
        pending: list[tuple[int, int]] = []
        # As on a device: first the K/V of all tokens of the step is stored, then anybody attends.
        for chunk in plan.chunks:
            row = self.rows[chunk.seq]
            row.pages.extend(chunk.new_page_ids)
            assert len(row.hashes) == chunk.start < chunk.end <= len(row.tokens)
            is_last = chunk.end == len(row.tokens)
            is_pooled = row.start.pooling is not None
            assert (chunk.sample, chunk.pool) == (is_last and not is_pooled, is_last and is_pooled)
            self._store(row, chunk.end)
            self._report_prompt(row, chunk, result)
            pending.append((chunk.seq, chunk.end if is_last else 0))
        for decode in plan.rows:
            row = self.rows[decode.seq]
            row.pages.extend(decode.new_page_ids)
            assert len(row.hashes) == decode.position == len(row.tokens) - 1
            self._store(row, decode.position + 1)
            pending.append((decode.seq, decode.position + 1))
        for seq, end in pending:
            self._attend(self.rows[seq])
            if end and self.rows[seq].start.pooling is not None:
                result.vectors.append(self._pool(self.rows[seq]))
            elif end:
                result.tokens.append(self._sample(self.rows[seq]))
        return result

    def _end_copies(self, plan: StepPlan, result: StepResult) -> None:
        begun = [copy for copy in self._copies if copy.step <= plan.step]
        if plan.is_empty and begun and all(copy.num_steps > 0 for copy in begun):
            # Nothing else to do: wait for the first.
            min(begun, key=lambda copy: copy.num_steps).num_steps = 0
        for copy in begun:
            version, slot = copy.copy.version, copy.copy.slot
            if copy.num_steps > 0:
                copy.num_steps -= 1
                continue
            self._copies.remove(copy)
            if self._fail_copy(version):
                result.failed_copies[version] = "the test says so"
                self._broken.add(slot)
            else:
                self._slots[slot] = version
                result.copied.append(version)

    def _open(self, start: SequenceStart) -> None:
        assert start.seq not in self.rows, f"sequence {start.seq} runs already"
        assert start.num_cached == len(start.page_ids) * self.page_size
        assert start.num_cached < len(start.token_ids)
        row = _Row(start, list(start.token_ids), list(start.page_ids))
        row.version = self._slots[start.slot]
        assert row.version or not start.slot, (
            f"slot {start.slot} is empty or its copy is on its way"
        )
        previous = first_hash(row.version)
        for token in row.tokens[: start.num_cached]:
            previous = prefix_hash(previous, token)
            row.hashes.append(previous)
        self.rows[start.seq] = row

    def _store(self, row: _Row, end: int) -> None:
        assert self._slots[row.start.slot] == row.version, "the slot holds another version"
        for page in self._slot_pages[row.start.slot]:
            assert self._page_owner[page] == row.start.slot, "a rank page was overwritten"
        for position in range(len(row.hashes), end):
            previous = row.hashes[-1] if row.hashes else first_hash(row.version)
            row.hashes.append(prefix_hash(previous, row.tokens[position]))
            page = row.pages[position // self.page_size]
            self._kv[page * self.page_size + position % self.page_size] = row.hashes[-1]

    def _attend(self, row: _Row) -> None:
        size, count = self.page_size, len(row.hashes)
        seen: list[int | None] = []
        for page in row.pages[: -(-count // size)]:
            seen.extend(self._kv[page * size : page * size + size])
        assert seen[:count] == row.hashes, f"sequence {row.start.seq} reads K/V of somebody else"

    def _pool(self, row: _Row) -> PooledVector:
        if self._fail_token(row.start.seq):
            return PooledVector(seq=row.start.seq, error="the test says so")
        assert row.start.pooling is not None
        # States of tokens that came from the cache were never seen.
        values = pooled(row.start.pooling, row.hashes[row.start.num_cached :])
        return PooledVector(seq=row.start.seq, values=values)

    def _sample(self, row: _Row) -> SampledToken:
        seq = row.start.seq
        token = next_token(row.hashes[-1], row.start.seed, self.vocab_size)
        row.tokens.append(token)
        error = "the test says so" if self._fail_token(seq) else None
        logprobs = None
        if row.start.num_top_logprobs >= 0:
            logprobs = TokenLogprobs(-float(len(row.tokens)), token, [])
        return SampledToken(seq=seq, token_id=token, logprobs=logprobs, error=error)

    def _report_prompt(self, row: _Row, chunk: PrefillChunk, result: StepResult) -> None:
        """Position p is predicted by the row of token p - 1; position 0 has no log-probability."""
        wanted = row.start.logprob_start
        if wanted < 0:
            return
        found: list[TokenLogprobs] = []
        if wanted == 0 and chunk.start == 0:
            found.append(TokenLogprobs(None, row.tokens[0], []))
        first, stop = max(wanted, chunk.start + 1), min(chunk.end + 1, row.start.num_prompt)
        found.extend(TokenLogprobs(-float(p), row.tokens[p], []) for p in range(first, stop))
        if found:
            result.prompt_logprobs[chunk.seq] = found
