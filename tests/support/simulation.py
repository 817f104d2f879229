"""A whole engine without a model: random requests through the scheduler, everything checked after each step."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from lorikeet.core.plan import StepPlan
from lorikeet.core.request import (
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from lorikeet.core.sequence import Sequence, SequenceState
from lorikeet.kv.manager import KVManager
from lorikeet.lora.rank_pages import RankPageAllocator
from lorikeet.lora.registry import AdapterRegistry
from lorikeet.lora.residency import Residency
from lorikeet.scheduler.budget import SchedulerLimits
from lorikeet.scheduler.scheduler import Scheduler
from tests.support.fake_worker import FakeWorker, first_hash, next_token, prefix_hash

VOCAB_SIZE = 29
EOS = 3
CLASS_ELEMS = (48, 80)
SLAB_ELEMS = 240


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One simulated engine and its traffic."""

    seed: int
    num_requests: int = 150
    page_size: int = 4
    num_pages: int = 40
    radix: bool = True
    overlap: bool = False
    policy: str = "fcfs"
    max_running: int = 8
    max_step_tokens: int = 32
    max_prefill_tokens: int = 64
    max_loras: int = 3
    num_slots: int = 4
    num_adapters: int = 6
    num_pinned: int = 0
    popularity: str = "uniform"
    base_share: float = 0.25
    eviction: str = "lru"
    max_passes: int = 16
    arrivals_per_step: float = 1.0
    abort_rate: float = 0.0
    copy_failure_rate: float = 0.0
    token_error_rate: float = 0.0
    replace_rate: float = 0.0
    step_failure_rate: float = 0.0
    ignore_eos: float = 0.4


@dataclass
class Answer:
    """What a request was answered with so far."""

    seq: Sequence
    name: str | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached: set[int] = field(default_factory=set)
    finish: FinishReason | None = None
    was_aborted: bool = False


def expected_answer(seq: Sequence, context_length: int, capacity: int) -> tuple[list[int], str]:
    """The oracle: tokens and kind of finish of a request that runs alone, without cache, chunks or preemption."""
    sampling = seq.request.sampling
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
    state = first_hash(seq.version)
    for token in seq.request.prompt_token_ids:
        state = prefix_hash(state, token)
    tokens: list[int] = []
    length = len(seq.request.prompt_token_ids)
    if sampling.max_new_tokens is None:
        longest = min(context_length, capacity + 1) - length
    else:
        longest = min(sampling.max_new_tokens, context_length - length)
    while len(tokens) < longest:
        token = next_token(state, seq.seed, VOCAB_SIZE)
        tokens.append(token)
        state = prefix_hash(state, token)
        if token in stops and len(tokens) >= sampling.min_new_tokens:
            return tokens, "stop"
    return tokens, "length"


class Simulation:
    """Builds the parts of a scenario and runs it to its end; ``run`` raises AssertionError on the first surprise."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = s = scenario
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
        )
        self.scheduler = Scheduler(self.limits, self.kv, self.residency)
        self.worker = FakeWorker(
            page_size=s.page_size,
            num_pages=s.num_pages,
            num_slots=s.num_slots,
            vocab_size=VOCAB_SIZE,
            fail_copy=lambda version: self.random.random() < s.copy_failure_rate,
            fail_token=lambda seq: self.random.random() < s.token_error_rate,
        )
        self.registry = AdapterRegistry()
        self.answers: dict[str, Answer] = {}
        self.in_flight: deque[StepPlan] = deque()
        self.passes: dict[int, int] = {}
        self._sequences: dict[int, Sequence] = {}
        self.admitted: set[int] = set()
        self.num_steps = 0
        self.max_passed = 0
        self._next_id = 0
        prefix_lengths = (0, 3, 9, 17, 26)
        self._prefixes = [self._tokens(length) for length in prefix_lengths]
        for index in range(s.num_adapters):
            self._load(f"a{index}", pinned=index < s.num_pinned)

    def run(self) -> None:
        s = self.scenario
        num_left = s.num_requests
        # Each request alone takes fewer than 64 steps; what exceeds their sum is a live-lock.
        limit = 64 * s.num_requests + 1000
        while num_left or self._open():
            assert self.num_steps < limit, "the simulation does not come to an end"
            arriving = min(num_left, self._poisson(s.arrivals_per_step))
            for _ in range(arriving):
                self._submit()
            num_left -= arriving
            self._maybe_abort()
            self._maybe_replace()
            self._step()
        self._settle()

    def _step(self) -> None:
        self.num_steps += 1
        waiting = [a.seq for a in self.answers.values() if a.seq.state is SequenceState.WAITING]
        plan = self.scheduler.plan()
        self.scheduler.check_integrity()
        if plan is not None:
            self._check_plan(plan, waiting)
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

    def _check_plan(self, plan: StepPlan, waiting: list[Sequence]) -> None:
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
                    self._count_pass(seq, newcomer)

    def _count_pass(self, seq: Sequence, newcomer: Sequence) -> None:
        if seq.version and not newcomer.version:
            # What a request of the base model takes is no adapter's room.
            return
        if self.limits.policy == "fcfs":
            assert seq.version, "a request of the base model was passed"
        self.passes[seq.id] = self.passes.get(seq.id, 0) + 1
        self.max_passed = max(self.max_passed, self.passes[seq.id])
        assert self.passes[seq.id] <= self.limits.max_passes, "the bound on passes is broken"

    def _take_outputs(self) -> None:
        for output in self.scheduler.drain():
            answer = self.answers[output.rid]
            assert answer.finish is None, f"{output.rid} goes on after its end"
            answer.tokens.extend(output.token_ids)
            answer.logprobs.extend(output.logprobs)
            answer.prompt_logprobs.extend(output.prompt_logprobs)
            answer.cached.add(output.cached_tokens)
            answer.finish = output.finish
            if output.finish is not None:
                self.registry.release(answer.seq.version)
                self._drop_unleased()
                self._check_answer(answer, output)

    def _check_answer(self, answer: Answer, output: RequestOutput) -> None:
        seq, finish = answer.seq, answer.finish
        assert finish is not None
        tokens, kind = expected_answer(seq, self.limits.context_length, self.kv.capacity)
        assert answer.tokens == tokens[: len(answer.tokens)]
        assert len(answer.cached) == 1, f"cached_tokens changed: {answer.cached}"
        assert output.cached_tokens < seq.num_prompt
        assert self.scenario.radix or output.cached_tokens == 0
        if seq.request.return_logprob:
            count = len(answer.tokens)
            assert [entry.token_id for entry in answer.logprobs] == answer.tokens[:count]
        if finish.kind == "abort":
            assert answer.was_aborted or finish.status_code == 500
            return
        assert (answer.tokens, finish.kind) == (tokens, kind)
        start = seq.request.logprob_start_len
        if seq.request.return_logprob and start >= 0:
            found = [(entry.logprob, entry.token_id) for entry in answer.prompt_logprobs]
            prompt = seq.request.prompt_token_ids
            assert found == [
                (-float(p) if p else None, prompt[p]) for p in range(start, len(prompt))
            ]

    def _settle(self) -> None:
        """After the last request: nothing is held, nothing is remembered."""
        while (plan := self.scheduler.plan()) is not None or self.in_flight:
            if plan is not None:
                self.worker.submit(plan)
                self.in_flight.append(plan)
            self.scheduler.commit(self.in_flight.popleft(), self.worker.collect())
        self.scheduler.check_integrity()
        assert not self.worker.rows, "the worker keeps state of sequences that have ended"
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        for name in list(self.registry.loaded()):
            self.registry.unload(name)
        self._drop_unleased()
        self.registry.check_integrity()
        assert not self.residency.resident()
        assert self.allocator.num_free_elems == self.allocator.num_elems
        assert self.kv.num_available == self.kv.num_pages
        assert self.kv.flush()
        assert self.kv.num_free == self.kv.num_pages
        self.scheduler.check_integrity()

    def _open(self) -> bool:
        return any(answer.finish is None for answer in self.answers.values())

    # -- traffic -------------------------------------------------------------------------------------------------

    def _submit(self) -> None:
        request = self._request()
        seq = Sequence(self._next_id, request, self.registry.lease(request.adapter), self._next_id)
        self._next_id += 1
        self._sequences[seq.id] = seq
        self.answers[request.rid] = Answer(seq, request.adapter)
        self.scheduler.add(seq)

    def _request(self) -> Request:
        rng = self.random
        prompt = rng.choice(self._prefixes) + self._tokens(rng.randint(1, 9))
        if rng.random() < 0.05:
            prompt = prompt + self._tokens(60 - len(prompt))
        most = self.kv.capacity + 1 - len(prompt)
        max_new = rng.choice((None, 0, 1, 2, 5, 12, 30))
        if max_new is not None:
            max_new = min(max_new, most)
        return Request(
            rid=f"r{self._next_id}",
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
        return f"a{rng.choices(range(s.num_adapters), weights)[0]}"

    def _maybe_abort(self) -> None:
        if self.random.random() >= self.scenario.abort_rate:
            return
        open_ones = [answer for answer in self.answers.values() if answer.finish is None]
        if open_ones:
            answer = self.random.choice(open_ones)
            answer.was_aborted = True
            reason = FinishReason(kind="abort", message="the test says so", status_code=499)
            self.scheduler.abort(answer.seq.id, reason)

    def _maybe_replace(self) -> None:
        if self.random.random() >= self.scenario.replace_rate:
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
        if version in self.residency:
            self.residency.set_pinned(version, pinned=pinned)
            return
        size = random.Random(content)
        classes = [0] * size.randint(0, 6) + [1] * size.randint(1, 4)
        size.shuffle(classes)
        self.residency.add(version, classes, pinned=pinned)

    def _drop_unleased(self) -> None:
        for version in self.registry.pop_unleased():
            self.residency.remove(version)

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
