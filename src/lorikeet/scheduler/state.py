"""The sequences in the engine and what they hold; every way in which they let go of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorikeet.adapters.residency import Residency
from lorikeet.core.plan import SampledToken, StepPlan
from lorikeet.core.request import FinishReason, RequestOutput
from lorikeet.core.sequence import Sequence, SequenceState
from lorikeet.kv.manager import KVManager
from lorikeet.scheduler.budget import SchedulerLimits
from lorikeet.scheduler.queue import RunningSet, WaitingQueue
from lorikeet.scheduler.stats import Counters, SchedulerStats


@dataclass(slots=True)
class PageWait:
    """Sequences that were refused pages. Asking for them again is useless until one of the numbers has changed.

    Attributes:
        headroom: pages that there were for those who are admitted.
        num_changes: ``KVManager.num_changes`` at that time.
        refused: for whom they were too few.
    """

    headroom: int
    num_changes: int
    refused: list[Sequence]


class SchedulerState:
    """What the scheduler knows between two calls.

    Attributes:
        sequences: by id, waiting and running; a sequence that has ended is not here.
        outputs: made since the last drain.
        ended: sequences whose worker state the next plan drops.
        in_flight: step of each plan that is not committed, oldest first -> adapters to release once it is.
        page_wait: set if pages were short for somebody who waits.
    """

    def __init__(self, limits: SchedulerLimits, kv: KVManager, residency: Residency) -> None:
        self.limits = limits
        self.kv = kv
        self.residency = residency
        self.sequences: dict[int, Sequence] = {}
        self.queue = WaitingQueue()
        self.running = RunningSet()
        self.outputs: list[RequestOutput] = []
        self.ended: list[int] = []
        self.in_flight: dict[int, list[int]] = {}
        self.page_wait: PageWait | None = None
        self.counters = Counters()

    def num_cached(self, seq: Sequence) -> int:
        """Tokens of a waiting sequence whose K/V is cached."""
        return self.kv.match(seq.version, seq.tokens, seq.max_cacheable)

    def classify(self, seq: Sequence) -> None:
        """Give a sequence that comes into the queue its length class."""
        seq.length_class = self.limits.length_class(seq.num_tokens)
        if seq.length_class:
            seq.length_class = self.limits.length_class(seq.num_tokens - self.num_cached(seq))

    def preempt(self, seq: Sequence) -> None:
        """Back to the queue, in front, with all its tokens; what it computed stays findable for a while."""
        self._leave(seq)
        seq.enter(SequenceState.PREEMPTED)
        seq.num_scheduled = 0
        self.classify(seq)
        self.queue.push_front(seq)
        self.counters.preemptions += 1

    def emit(
        self,
        seq: Sequence,
        reason: FinishReason | None,
        token_ids: list[int],
        token: SampledToken | None,
    ) -> None:
        """Add an output of ``seq``; it carries the prompt's log-probabilities if they were not handed out yet."""
        output = RequestOutput(
            id=seq.id,
            token_ids=token_ids,
            cached_tokens=seq.cached_tokens or 0,
            finish=reason,
        )
        if token is not None and token.logprobs is not None:
            output.logprobs = [token.logprobs]
        if seq.prompt_logprobs:
            output.prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, []
        self.outputs.append(output)

    def end(
        self,
        seq: Sequence,
        reason: FinishReason,
        token_ids: list[int],
        token: SampledToken | None,
        embedding: bytes | None = None,
    ) -> None:
        """The one place where a sequence ends: everything it holds is given back, and its terminal output made."""
        if seq.state in (SequenceState.WAITING, SequenceState.PREEMPTED):
            self.queue.remove(seq)
            # It may have been the one that pages were short for.
            self.page_wait = None
        else:
            self._leave(seq)
        seq.enter(SequenceState.FINISHED)
        del self.sequences[seq.id]
        self.counters.finished += 1
        self.emit(seq, reason, token_ids, token)
        self.outputs[-1].embedding = embedding

    def of_version(self, version: int) -> list[Sequence]:
        """All sequences of an adapter version, those that run first."""
        running = [seq for seq in self.running.sequences() if seq.version == version]
        return [*running, *self.queue.of_version(version)]

    def give_up(self, plan: StepPlan, reason: FinishReason) -> None:
        """Undo a plan that was not executed: end the sequence of its largest chunk, or its youngest row; preempt the others."""
        lengths = {chunk.seq: chunk.end - chunk.start for chunk in plan.chunks}
        lengths = {seq: length for seq, length in lengths.items() if seq in self.sequences}
        victim = max(lengths, key=lambda seq: (lengths[seq], seq), default=None)
        if victim is None and plan.rows:
            victim = plan.rows[-1].seq
        if victim in self.sequences:
            self.end(self.sequences[victim], reason, [], None)
        for part in (*plan.rows, *(chunk for chunk in plan.chunks if chunk.sample or chunk.pool)):
            if part.seq in self.sequences:
                self.sequences[part.seq].num_pending -= 1
        # The youngest first: whoever is put in front last stays in front.
        lost = {part.seq for part in (*plan.rows, *plan.chunks)}
        for seq in reversed(self.running.sequences()):
            if seq.id in lost:
                self.preempt(seq)

    def _leave(self, seq: Sequence) -> None:
        """Give back a running sequence's row, pages, adapter and worker state."""
        if self.running.remove(seq):
            self.queue.offer(seq.version)
        self.kv.release(seq.id, seq.tokens, min(seq.num_scheduled, seq.num_tokens))
        self.ended.append(seq.id)
        releases = self.in_flight.get(seq.last_step)
        if releases is not None and seq.version:
            releases.append(seq.version)
        else:
            self.residency.release(seq.version)

    def stats(self) -> SchedulerStats:
        num_pages, num_cached = self.kv.num_pages, self.kv.num_cached
        return SchedulerStats(
            num_running=len(self.running),
            num_waiting=len(self.queue),
            num_running_adapters=len(self.running.num_of_version),
            num_waiting_adapters=self.queue.num_versions,
            running_versions=tuple(self.running.num_of_version),
            waiting_versions=tuple(self.queue.versions(self.queue.num_versions)),
            num_waiting_for_adapter=len(self.queue)
            - sum(map(self.queue.num_of_version, [0, *self.residency.usable()])),
            num_pages=num_pages,
            num_used_pages=num_pages - self.kv.num_free - num_cached,
            num_cached_pages=num_cached,
            total_prompt_tokens=self.counters.prompt_tokens,
            total_cached_tokens=self.counters.cached_tokens,
            total_output_tokens=self.counters.output_tokens,
            total_preemptions=self.counters.preemptions,
            total_finished=self.counters.finished,
            total_adapter_device_evictions=self.residency.num_device_evictions,
        )

    def check_integrity(self, is_off: Callable[[int], bool]) -> None:
        """Compare the sets of sequences with each other and with what the managers hold.

        Args:
            is_off: whether the head of a version need not be on the queue's list.

        Raises:
            AssertionError: names what does not match.
        """
        self.queue.check_integrity(self.running.num_of_version, is_off)
        running = self.running.sequences()
        waiting = {seq.id for seq in self.queue.sequences()}
        if waiting & {seq.id for seq in running} or len(waiting) + len(running) != len(
            self.sequences
        ):
            raise AssertionError("a sequence is in no set or in two")
        if self.kv.sequences() != {seq.id for seq in running}:
            raise AssertionError("page tables are not those of the running sequences")
        if len(running) > self.limits.max_running:
            raise AssertionError(f"{len(running)} sequences run")
        if len(self.running.num_of_version) > self.limits.max_loras_per_batch:
            raise AssertionError(f"{len(self.running.num_of_version)} adapters run")
        self._check_sequences(running)

    def _check_sequences(self, running: list[Sequence]) -> None:
        uses: dict[int, int] = {}
        for versions in self.in_flight.values():
            for version in versions:
                uses[version] = uses.get(version, 0) + 1
        for seq in running:
            uses[seq.version] = uses.get(seq.version, 0) + 1
            reach = max(seq.num_scheduled, seq.num_tokens)
            # A sampled token that is not scheduled yet needs a page only when it is computed.
            least = self.kv.pages_for(seq.num_scheduled)
            if not least <= len(self.kv.page_table(seq.id)) <= self.kv.pages_for(reach):
                raise AssertionError(f"sequence {seq.id}: the page table does not fit its tokens")
            decoding = seq.id not in self.running.prefilling
            if decoding and seq.num_scheduled != seq.num_tokens + seq.num_pending - 1:
                raise AssertionError(f"sequence {seq.id}: {seq.num_scheduled} tokens scheduled")
            if not self.in_flight and seq.num_pending:
                raise AssertionError(f"sequence {seq.id} waits for a token that nobody samples")
        for version in {*uses, *self.residency.resident()} - {0}:
            if self.residency.num_uses(version) != uses.get(version, 0):
                raise AssertionError(f"version {version}: uses are not those of its sequences")
