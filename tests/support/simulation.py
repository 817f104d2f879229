"""A whole engine without a model: random requests through the scheduler, everything checked after each step."""

from __future__ import annotations

import random
from collections import deque

from lorikeet.adapters.rank_pages import RankPageAllocator
from lorikeet.adapters.registry import AdapterRegistry
from lorikeet.adapters.residency import Residency
from lorikeet.adapters.tiers import Tier
from lorikeet.core.failure import Failure
from lorikeet.core.plan import StepPlan
from lorikeet.core.request import (
    FinishReason,
    Pooling,
    Request,
    RequestOutput,
    SamplingParams,
)
from lorikeet.core.sequence import Sequence, SequenceState
from lorikeet.errors import RequestError
from lorikeet.kv.manager import KVManager
from lorikeet.scheduler.limits import SchedulerLimits
from lorikeet.scheduler.scheduler import Scheduler
from tests.support.fake_worker import FakeWorker
from tests.support.residency_rig import has_host_room
from tests.support.scenario import (
    CLASS_ELEMS,
    EOS,
    SLAB_ELEMS,
    VOCAB_SIZE,
    Answer,
    Scenario,
    expected_answer,
    expected_embedding,
)
from tests.support.simulated_host import SimulatedHost


class Simulation:
    """Builds the parts of a scenario and runs it to its end; ``run`` raises AssertionError on the first surprise."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = s = scenario
        self.num_steps = 0
        self.random = random.Random(s.seed)
        self.kv = KVManager(s.page_size, s.num_pages, radix=s.radix)
        # Enough for max_loras adapters of the largest size (6 + 4 pages of the two classes), as the layout computes it.
        reserved = [-(-s.max_loras * 6 // 5), -(-s.max_loras * 4 // 3)]
        self.allocator = RankPageAllocator(CLASS_ELEMS, SLAB_ELEMS, sum(reserved), reserved)
        self.residency = Residency(
            allocator=self.allocator,
            num_slots=s.num_slots,
            policy=s.eviction,
            max_pinned=max(0, s.max_loras - 1),
            max_host=s.max_host,
            max_reads=s.max_reads,
            clock=lambda: self.num_steps / 10,
        )
        self.host = SimulatedHost(
            self.residency,
            self.random,
            max_host=s.max_host,
            read_steps=s.read_steps,
            failure_rate=s.read_failure_rate,
        )
        self.limits = SchedulerLimits(
            max_running=s.max_running,
            max_step_tokens=s.max_step_tokens,
            max_prefill_tokens=s.max_prefill_tokens,
            context_length=64,
            max_loras_per_batch=s.max_loras,
            eos_token_ids=frozenset({EOS}),
            policy=s.policy,
            max_passes=s.max_passes,
            even_length=s.even_length,
        )
        self.scheduler = Scheduler(self.limits, self.kv, self.residency)
        self.worker = FakeWorker(
            page_size=s.page_size,
            num_pages=s.num_pages,
            num_slots=s.num_slots,
            vocab_size=VOCAB_SIZE,
            fail_copy=lambda version: self.random.random() < s.copy_failure_rate,
            fail_token=lambda seq: self.random.random() < s.token_error_rate,
            copy_steps=lambda: self.random.randint(0, s.copy_steps),
        )
        self.registry = AdapterRegistry()
        self.answers: dict[int, Answer] = {}
        self._unfinished: dict[int, Answer] = {}
        self.in_flight: deque[StepPlan] = deque()
        self.passes: dict[int, int] = {}
        self._sequences: dict[int, Sequence] = {}
        self.admitted: set[int] = set()
        self.max_passed = 0
        self.num_passed_moving = 0
        self.num_passed_by_shorter = 0
        self.max_reads_waited = 0
        self._reads_waited: dict[int, int] = {}
        self._next_id = 0
        prefix_lengths = (0, 3, 9, 17, 26)
        self._prefixes = [self._tokens(length) for length in prefix_lengths]
        for index in range(s.num_adapters):
            self._load(f"a{index}", pinned=index < s.num_pinned)

    def run(self) -> None:
        s = self.scenario
        num_left = s.num_requests
        # Each request alone takes fewer than 64 steps, its read and its copy; what exceeds their sum is a live-lock.
        limit = (64 + s.read_steps + s.copy_steps) * s.num_requests + 1000
        while num_left or self._unfinished:
            assert self.num_steps < limit, "the simulation does not come to an end"
            arriving = min(num_left, self._poisson(s.arrivals_per_step))
            for _ in range(arriving):
                self._submit()
            num_left -= arriving
            self._maybe_abort()
            self._maybe_replace()
            self._maybe_unload()
            self._step()
        self._settle()

    def _step(self) -> None:
        self.num_steps += 1
        self._check_drops(*self.host.poll())
        waiting = [seq for seq in self._waiting() if seq.state is SequenceState.WAITING]
        had_work = self.scheduler.has_work
        plan = self.scheduler.plan()
        self.scheduler.check_integrity()
        assert had_work or plan is None, "there was work after all"
        if plan is None and not self.in_flight and not self.residency.host.reads:
            assert not self.scheduler.has_work, "the loop would spin"
        if plan is not None:
            self._check_plan(plan, waiting)
        self._check_drops(*self.host.poll())
        if plan is not None:
            if self.random.random() < self.scenario.step_failure_rate:
                self._fail(plan)
            else:
                self.worker.submit(plan)
                self.in_flight.append(plan)
        if self.in_flight and (len(self.in_flight) > self.scenario.overlap or plan is None):
            self._maybe_abort()
            oldest = self.in_flight.popleft()
            self.scheduler.commit(oldest, self.worker.collect())
        self.scheduler.check_integrity()
        self._take_outputs()

    def _fail(self, plan: StepPlan) -> None:
        """The step raises before it does anything; what came before it is committed first."""
        while self.in_flight:
            self.scheduler.commit(self.in_flight.popleft(), self.worker.collect())
        self._maybe_abort()
        self.scheduler.fail(plan, "the step failed")
        # Sequences that this plan was to start are unknown to the worker.
        started = {start.seq for start in plan.starts}
        self.worker.ignored |= started

    def _check_drops(self, drops: list[int], reads: list[int]) -> None:
        """Whom the queue wants leaves host memory only for somebody who is wanted before."""
        self._count_reads(reads)
        for version in drops:
            order = self._first_order(version)
            if order is None:
                continue
            before = [self._first_order(read) for read in reads]
            assert any(
                (other is not None and other < order) or self._is_pinned(read)
                for read, other in zip(reads, before, strict=True)
            ), f"version {version} is wanted and was dropped"

    def _count_reads(self, reads: list[int]) -> None:
        """For the first in line of each version that is read: how often that happens while it waits."""
        for version in reads:
            order = self._first_order(version)
            if order is not None:
                self._reads_waited[order] = self._reads_waited.get(order, 0) + 1
        self.max_reads_waited = max(self.max_reads_waited, *self._reads_waited.values(), 0)

    def _first_order(self, version: int) -> int | None:
        """Place in the queue of the first sequence that waits for a version."""
        return min((seq.order for seq in self._waiting() if seq.version == version), default=None)

    def _waiting(self) -> list[Sequence]:
        states = (SequenceState.WAITING, SequenceState.PREEMPTED)
        return [a.seq for a in self._unfinished.values() if a.seq.state in states]

    def _check_plan(self, plan: StepPlan, waiting: list[Sequence]) -> None:
        self.host.check_copies([copy.version for copy in plan.copies])
        num_chunk_tokens = sum(chunk.end - chunk.start for chunk in plan.chunks)
        assert num_chunk_tokens <= self.limits.max_prefill_tokens
        assert not plan.chunks or plan.num_tokens <= self.limits.max_step_tokens
        for row in plan.rows:
            seq = self._sequences[row.seq]
            assert row.position + 1 < seq.max_tokens, "a row beyond the end"
        by_id = {seq.id: seq for seq in waiting}
        for start in plan.starts:
            if start.seq in self.admitted:
                continue
            self.admitted.add(start.seq)
            newcomer = by_id[start.seq]
            for seq in waiting:
                if seq.id not in self.admitted and seq.arrival < newcomer.arrival:
                    self._count_pass(plan, seq, newcomer)
                if seq.version == newcomer.version:
                    # What came for the version was used; it need not stay.
                    self._reads_waited.pop(seq.order, None)

    def _older_have_their_half(self, plan: StepPlan, seq: Sequence) -> bool:
        """True if prompts before this one in the queue got half of what a step computes of prompts, or more."""
        budget = min(self.limits.max_step_tokens - len(plan.rows), self.limits.max_prefill_tokens)
        spent = sum(
            self.limits.price(position)
            for chunk in plan.chunks
            if self._sequences[chunk.seq].order < seq.order
            for position in range(chunk.start, chunk.end)
        )
        return spent >= budget - budget // 2

    def _count_pass(self, plan: StepPlan, seq: Sequence, newcomer: Sequence) -> None:
        if seq.version and not newcomer.version:
            # What a request of the base model takes is no adapter's room.
            return
        tier = self.residency.tier(seq.version) if seq.version else None
        is_in_line = tier is Tier.DISK and self.residency.num_free_reads <= 0
        if tier in (Tier.READING, Tier.COPYING) or is_in_line:
            # It waits for its own adapter or for its turn to be read, not for room.
            self.num_passed_moving += 1
            return
        is_shorter = newcomer.length_class < seq.length_class
        if is_shorter and self._older_have_their_half(plan, seq):
            # What it waits for is its turn, and the half of the steps that go in order are not touched.
            self.num_passed_by_shorter += 1
            return
        if self.limits.policy == "fcfs":
            assert seq.version or is_shorter, "a request of the base model was passed"
        self.passes[seq.id] = self.passes.get(seq.id, 0) + 1
        self.max_passed = max(self.max_passed, self.passes[seq.id])
        assert self.passes[seq.id] <= self.limits.max_passes, "the bound on passes is broken"

    def _take_outputs(self) -> None:
        for output in self.scheduler.drain():
            answer = self.answers[output.id]
            assert answer.finish is None, f"{output.id} goes on after its end"
            answer.tokens.extend(output.token_ids)
            answer.logprobs.extend(output.logprobs)
            answer.prompt_logprobs.extend(output.prompt_logprobs)
            answer.cached.add(output.cached_tokens)
            answer.finish = output.finish
            answer.embedding = output.embedding
            if output.finish is not None:
                del self._unfinished[output.id]
                self.registry.release(answer.seq.version)
                self._drop_unleased()
                self._check_answer(answer, output)

    def _check_answer(self, answer: Answer, output: RequestOutput) -> None:
        seq, finish = answer.seq, answer.finish
        assert finish is not None
        is_vector = seq.request.pooling is not None and finish.kind == "length"
        assert (answer.embedding is not None) == is_vector
        tokens, kind = expected_answer(seq, self.limits.context_length, self.kv.capacity)
        assert answer.tokens == tokens[: len(answer.tokens)]
        assert len(answer.cached) == 1, f"cached_tokens changed: {answer.cached}"
        assert output.cached_tokens < seq.num_prompt
        assert self.scenario.radix or output.cached_tokens == 0
        if seq.request.return_logprob:
            count = len(answer.tokens)
            assert [entry.token_id for entry in answer.logprobs] == answer.tokens[:count]
        if finish.kind == "abort":
            assert answer.was_aborted or finish.status_code == 500 or self._has_failed(finish)
            return
        assert (answer.tokens, finish.kind) == (tokens, kind)
        if seq.request.pooling is not None:
            assert answer.embedding == expected_embedding(seq)
        start = seq.request.logprob_start_len
        if seq.request.return_logprob and start >= 0:
            found = [(entry.logprob, entry.token_id) for entry in answer.prompt_logprobs]
            prompt = seq.request.prompt_token_ids
            assert found == [
                (-float(p) if p else None, prompt[p]) for p in range(start, len(prompt))
            ]

    def _has_failed(self, finish: FinishReason) -> bool:
        return (
            self.scenario.read_failure_rate > 0
            and finish.status_code == 400
            and (finish.message or "").endswith("the file has changed")
        )

    def _settle(self) -> None:
        """After the last request: nothing is held, nothing is remembered."""
        while (plan := self.scheduler.plan()) is not None or self.in_flight or self.host.is_reading:
            if plan is not None:
                self.worker.submit(plan)
                self.in_flight.append(plan)
            if self.in_flight:
                self.scheduler.commit(self.in_flight.popleft(), self.worker.collect())
            self.host.poll()
        self.scheduler.check_integrity()
        assert not self.scheduler.has_copies_in_flight
        assert not self.worker.rows, "the worker keeps state of sequences that have ended"
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        for name in list(self.registry.loaded()):
            self.registry.unload(name)
        self._drop_unleased()
        self.registry.check_integrity()
        assert not self.residency.device.placed
        assert not self.allocator.free_pages
        assert self.kv.num_available == self.kv.num_pages
        assert self.kv.flush()
        assert self.kv.num_free == self.kv.num_pages
        self.scheduler.check_integrity()

    # -- traffic -------------------------------------------------------------------------------------------------

    def _submit(self) -> None:
        request = self._request()
        seq = Sequence(self._next_id, request, self.registry.lease(request.adapter), self._next_id)
        self._next_id += 1
        self._sequences[seq.id] = seq
        answer = self.answers[seq.id] = Answer(seq, request.adapter)
        self._unfinished[seq.id] = answer
        try:
            self.scheduler.add(seq)
        except RequestError as error:
            answer.finish = FinishReason(kind="abort", failure=Failure("refused", str(error)))
            assert self._has_failed(answer.finish)
            del self._unfinished[seq.id]
            self.registry.release(seq.version)
            self._drop_unleased()

    def _request(self) -> Request:
        rng = self.random
        prompt = rng.choice(self._prefixes) + self._tokens(rng.randint(1, 9))
        if rng.random() < 0.05:
            prompt = prompt + self._tokens(60 - len(prompt))
        most = self.kv.capacity + 1 - len(prompt)
        max_new = rng.choice((None, 0, 1, 2, 5, 12, 30))
        if max_new is not None:
            max_new = min(max_new, most)
        pooling = None
        if self.scenario.pooling_rate and rng.random() < self.scenario.pooling_rate:
            pooling, max_new = Pooling(kind=rng.choice(("last", "mean"))), 0
        return Request(
            prompt_token_ids=prompt,
            adapter=self._adapter(),
            sampling=SamplingParams(
                max_new_tokens=max_new,
                min_new_tokens=min(rng.choice((0, 0, 4)), max_new or 0),
                ignore_eos=rng.random() < self.scenario.ignore_eos,
                stop_token_ids=(5,) if rng.random() < 0.2 else (),
            ),
            return_logprob=rng.random() < 0.4,
            logprob_start_len=rng.choice((-1, 0, 1, len(prompt) // 2, len(prompt) - 1)),
            pooling=pooling,
        )

    def _adapter(self) -> str | None:
        s, rng = self.scenario, self.random
        if not s.num_adapters or rng.random() < s.base_share:
            return None
        weights = {
            "uniform": [1.0] * s.num_adapters,
            "zipf": [1 / (rank + 1) for rank in range(s.num_adapters)],
            "skewed": [9.0 * s.num_adapters] + [1.0] * (s.num_adapters - 1),
        }[s.popularity]
        name = f"a{rng.choices(range(s.num_adapters), weights)[0]}"
        return name if name in self.registry.loaded() else None

    def _maybe_abort(self) -> None:
        if self.random.random() >= self.scenario.abort_rate:
            return
        if self._unfinished:
            answer = self.random.choice(list(self._unfinished.values()))
            answer.was_aborted = True
            reason = FinishReason(kind="abort", failure=Failure("aborted", "the test says so"))
            self.scheduler.abort(answer.seq.id, reason)

    def _maybe_unload(self) -> None:
        if self.random.random() >= self.scenario.unload_rate:
            return
        index = self.random.randrange(self.scenario.num_pinned, self.scenario.num_adapters)
        if f"a{index}" in self.registry.loaded():
            self.registry.unload(f"a{index}")
            self._drop_unleased()

    def _maybe_replace(self) -> None:
        if self.random.random() >= self.scenario.replace_rate:
            return
        if not has_host_room(self.residency):
            return
        index = self.random.randrange(self.scenario.num_adapters)
        self._load(f"a{index}", pinned=index < self.scenario.num_pinned)
        self._drop_unleased()

    def _load(self, name: str, *, pinned: bool) -> None:
        call = self.registry.register
        if name in self.registry.loaded():
            call = self.registry.replace
            old = self.registry.loaded()[name]
            if old.version in self.residency:
                self.residency.set_pinned(old.version, pinned=False)
        # A few contents per name, so that some replacements bring back an earlier version.
        content = f"{name}/{self.random.randrange(3)}"
        version = call(name, path="p", digest=content, rank=8, targets=("q_proj",), nbytes=1)
        size = random.Random(content)
        classes = [0] * size.randint(0, 6) + [1] * size.randint(1, 4)
        size.shuffle(classes)
        self.host.load(version, classes, pinned=pinned)

    def _drop_unleased(self) -> None:
        for version in self.registry.pop_unleased():
            self.host.remove(version)

    def _is_pinned(self, version: int) -> bool:
        return version in self.residency and self.registry.is_pinned(version)

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(VOCAB_SIZE) for _ in range(count)]

    def _poisson(self, mean: float) -> int:
        """Arrivals in one step, in bursts now and then."""
        if self.random.random() < 0.02:
            return 20
        count, left = 0, mean
        while self.random.random() < left / (left + 1):
            count += 1
        return count
