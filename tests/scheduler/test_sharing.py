"""How a step is shared among prompts: the bound of ``scheduler/scheduler.py``, for thousands of random requests.

What a step computes is only counted here, so that prompts may be long; ``test_simulation.py`` looks at everything else.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from lorikeet.adapters.rank_pages import RankPageAllocator
from lorikeet.adapters.residency import Residency
from lorikeet.core.plan import SampledToken, StepPlan, StepResult
from lorikeet.core.request import Request, SamplingParams
from lorikeet.core.sequence import Sequence
from lorikeet.kv.manager import KVManager
from lorikeet.scheduler.limits import SchedulerLimits
from lorikeet.scheduler.scheduler import Scheduler


@dataclass
class Prompt:
    """A prompt on its way.

    Attributes:
        cost: its tokens by their price.
        left: what is left of that.
        before: what the prompts that the bound counts cost at its arrival or came with since, itself included.
        in_order: the same for first come first served.
        num_steps: planned since it came.
    """

    seq: Sequence
    cost: int
    left: int
    before: int
    in_order: int
    num_steps: int = 0


class Counter:
    """A scheduler that computes nothing.

    Args:
        has_room: there are rows and pages for everybody, and prompts end with their first token: the bound holds.
    """

    def __init__(
        self,
        max_step_tokens: int,
        *,
        even_length: int | None = None,
        num_pages: int = 2000,
        page_size: int = 1024,
        max_running: int = 10**4,
        has_room: bool = True,
    ) -> None:
        self._has_room = has_room
        self.limits = SchedulerLimits(
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            max_prefill_tokens=10**6,
            context_length=10**6,
            max_loras_per_batch=1,
            eos_token_ids=frozenset(),
            even_length=even_length,
        )
        self.kv = KVManager(page_size, num_pages, radix=False)
        residency = Residency(
            allocator=RankPageAllocator((10,), 10, 1, [1]), num_slots=2, policy="lru", max_pinned=0
        )
        self.scheduler = Scheduler(self.limits, self.kv, residency)
        self.open: dict[int, Prompt] = {}
        self.num_steps = 0
        self._next_id = 0

    def add(self, length: int, *, max_new: int = 1) -> Prompt:
        request = Request(
            prompt_token_ids=[0] * length,
            sampling=SamplingParams(max_new_tokens=max_new),
        )
        seq = Sequence(self._next_id, request, 0, 0)
        self._next_id += 1
        self.scheduler.add(seq)
        cost = sum(map(self.limits.price, range(length)))
        prompt = Prompt(seq, cost, cost, cost, cost)
        for other in self.open.values():
            prompt.in_order += other.left
            if other.seq.length_class <= seq.length_class:
                prompt.before += other.left
            elif seq.length_class < other.seq.length_class:
                other.before += cost
        self.open[seq.id] = prompt
        return prompt

    def step(self) -> StepPlan | None:
        """Plan and commit; check that the step is full and that nobody waits longer than the bound says."""
        plan = self.scheduler.plan()
        if plan is None:
            assert not self.open
            return None
        self.num_steps += bool(plan.chunks)
        price, half = self.limits.price, (self.limits.max_step_tokens - len(plan.rows)) // 2
        for prompt in self.open.values():
            prompt.num_steps += 1
        for chunk in plan.chunks:
            self.open[chunk.seq].left -= sum(map(price, range(chunk.start, chunk.end)))
        spent = sum(sum(map(price, range(c.start, c.end))) for c in plan.chunks)
        is_full = spent >= self.limits.max_step_tokens - len(plan.rows)
        if self._has_room and not is_full:
            assert not any(prompt.left for prompt in self.open.values()), "there was more to do"
        tokens = [SampledToken(seq=c.seq, token_id=1) for c in plan.chunks if c.sample]
        tokens += [SampledToken(seq=row.seq, token_id=1) for row in plan.rows]
        self.scheduler.commit(plan, StepResult(step=plan.step, tokens=tokens))
        self.scheduler.drain()
        if self.num_steps % 32 == 0:
            self.scheduler.check_integrity()
        for chunk in plan.chunks:
            if chunk.sample and self._has_room:
                prompt = self.open[chunk.seq]
                assert prompt.num_steps <= -(-prompt.before // half), "the bound is broken"
                assert prompt.num_steps <= -(-prompt.in_order // half), "it had to wait too long"
        for chunk in plan.chunks:
            if chunk.sample:
                del self.open[chunk.seq]
        return plan

    def steps_until_done(self, prompt: Prompt) -> int:
        """Until its first token."""
        begin = self.num_steps
        while prompt.seq.id in self.open:
            self.step()
        return self.num_steps - begin


def _lengths(rng: random.Random, chunk: int) -> Callable[[], int]:
    """Mostly short prompts, and every now and then one of many steps."""

    def draw() -> int:
        kind = rng.random()
        if kind < 0.7:
            return rng.randint(1, max(1, chunk // 4))
        return rng.randint(1, 4 * chunk) if kind < 0.95 else rng.randint(5 * chunk, 40 * chunk)

    return draw


@pytest.mark.parametrize("even_length", [None, 150])
@pytest.mark.parametrize("chunk", [2, 7, 64, 256])
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_holds_for_random_prompts(seed: int, chunk: int, even_length: int | None) -> None:
    rng = random.Random(seed)
    counter = Counter(chunk, even_length=even_length)
    length = _lengths(rng, chunk)
    backlog = num_in_order = 0
    for _ in range(300):
        arriving = [length() for _ in range(rng.choice((0, 0, 0, 1, 2)))]
        for size in arriving:
            backlog += counter.add(size).cost
        if backlog:
            num_in_order += 1
            backlog -= min(chunk, backlog)
        counter.step()
    num_in_order += -(-backlog // chunk)
    while counter.step() is not None:
        pass
    # A price may be cut off at a step's end; without prices the steps are those of first come first served.
    most = num_in_order if even_length is None else num_in_order + 1
    assert counter.num_steps <= most, "sharing takes more steps"


@pytest.mark.parametrize("chunk", [256, 2048, 8192])
def test_one_token_behind_two_prompts_of_50000_takes_one_step(chunk: int) -> None:
    counter = Counter(chunk)
    first, second = counter.add(50_000), counter.add(50_000)
    counter.step()
    assert counter.steps_until_done(counter.add(1)) == 1
    assert first.left < 50_000 - chunk
    assert second.left == 50_000, "prompts of one class go in order"
    num_left = counter.steps_until_done(second)
    assert counter.num_steps == -(-100_001 // chunk)
    assert num_left > 1


def test_prompts_under_way_wait_for_shorter_ones_too() -> None:
    counter = Counter(100)
    longest = counter.add(10_000)
    counter.step()
    middle = counter.add(700)
    counter.step()
    short = counter.add(50)
    assert counter.steps_until_done(short) == 1
    # Half of a step for each of its own 700 tokens, and for the 50 that passed it.
    assert counter.steps_until_done(middle) <= 15
    assert longest.left > 9_000


def test_a_stream_of_short_prompts_leaves_a_long_one_half_of_each_step() -> None:
    counter = Counter(100)
    long = counter.add(5_000)
    while long.seq.id in counter.open:
        for _ in range(4):
            counter.add(25)
        counter.step()
    assert counter.num_steps == 100


def test_a_stream_of_short_prompts_does_not_keep_the_second_long_one_from_its_turn() -> None:
    """The first half is for whoever came first, under way or not."""
    counter = Counter(100)
    first, second = counter.add(1_000), counter.add(1_000)
    while counter.open.keys() & {first.seq.id, second.seq.id}:
        for _ in range(2):
            # Of a class of their own: they take more than one step each and are under way at its end.
            counter.add(60)
        counter.step()
    assert counter.num_steps <= 40


def test_short_prompts_are_served_in_order() -> None:
    counter = Counter(100)
    counter.add(5_000)
    shorts = [counter.add(length) for length in (50, 10, 30, 1)]
    done: list[int] = []
    while plan := counter.step():
        done += [chunk.seq for chunk in plan.chunks if chunk.sample]
    assert done[:-1] == [prompt.seq.id for prompt in shorts]


def test_the_last_row_is_for_the_first_in_line() -> None:
    counter = Counter(100, max_running=2, has_room=False)
    first, second = counter.add(300), counter.add(300)
    counter.step()
    short = counter.add(1)
    starts: list[int] = []
    chunks: list[int] = []
    while (plan := counter.step()) is not None:
        starts += [start.seq for start in plan.starts]
        chunks += [chunk.seq for chunk in plan.chunks]
    assert starts == [second.seq.id, short.seq.id]
    assert chunks[:2] == [first.seq.id, first.seq.id]


def test_short_prompts_pass_one_that_waits_for_pages_and_let_it_in_in_the_end() -> None:
    counter = Counter(100, num_pages=100, page_size=16, has_room=False)
    running = counter.add(800, max_new=300)
    while running.seq.id in counter.open:
        counter.step()
    big = counter.add(1_000)
    passed = 0
    while big.seq.id in counter.open:
        counter.add(16)
        plan = counter.step()
        assert plan is not None
        if big.left == 1_000:
            passed += len(plan.starts)
    assert passed == counter.limits.max_passes
