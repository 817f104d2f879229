"""A call of many completions leaves room for others."""

from __future__ import annotations

import pytest

from lorikeet.adapters.rank_pages import RankPageAllocator
from lorikeet.adapters.residency import Residency
from lorikeet.core.failure import Failure
from lorikeet.core.request import FinishReason, Request, SamplingParams
from lorikeet.core.sequence import Sequence
from lorikeet.kv.manager import KVManager
from lorikeet.scheduler.limits import SchedulerLimits
from lorikeet.scheduler.queue import CallShares, most_following
from lorikeet.scheduler.scheduler import Scheduler
from tests.support.fake_worker import FakeWorker

MAX_RUNNING = 16
LEFT = MAX_RUNNING // 8


def sequence(number: int, call: int | None = None, max_new_tokens: int = 1) -> Sequence:
    sampling = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
    return Sequence(number, Request(prompt_token_ids=[1, 2, 3], sampling=sampling), 0, 5, call)


class Engine:
    """A scheduler, and a worker that computes nothing."""

    def __init__(self) -> None:
        limits = SchedulerLimits(
            max_running=MAX_RUNNING,
            max_step_tokens=64,
            max_prefill_tokens=1000,
            context_length=1000,
            max_loras_per_batch=1,
            eos_token_ids=frozenset(),
        )
        residency = Residency(
            allocator=RankPageAllocator((10,), 10, 1, [1]), num_slots=2, policy="lru", max_pinned=0
        )
        self.scheduler = Scheduler(limits, KVManager(4, 4096, radix=False), residency)
        self.worker = FakeWorker(page_size=4, num_pages=4096, num_slots=2, vocab_size=1000)
        self.ended: list[int] = []

    def add(self, call: int, count: int, max_new_tokens: int = 1) -> None:
        """A call of ``count`` completions; ``call`` is the id of the first."""
        for number in range(call, call + count):
            self.scheduler.add(sequence(number, call, max_new_tokens))

    def step(self) -> list[int]:
        """Ids of the completions that end."""
        plan = self.scheduler.plan()
        if plan is not None:
            self.worker.submit(plan)
            self.scheduler.commit(plan, self.worker.collect())
        self.scheduler.check_integrity()
        ended = [output.id for output in self.scheduler.drain() if output.finish is not None]
        self.ended += ended
        return ended


@pytest.mark.parametrize(("rows", "followers"), [(1, 1), (7, 7), (8, 7), (48, 42), (256, 224)])
def test_an_eighth_of_the_rows_is_left(rows: int, followers: int) -> None:
    assert most_following(rows) == followers


def test_a_neighbour_does_not_wait_for_a_call_of_many() -> None:
    engine = Engine()
    engine.add(0, 1000, max_new_tokens=400)
    for _ in range(3):
        engine.step()
    # The first completion takes one of the rows that are left, too.
    assert engine.scheduler.num_running == MAX_RUNNING - LEFT + 1
    assert engine.scheduler.num_waiting == 1000 - engine.scheduler.num_running
    for number in range(1000, 1020):
        engine.add(number, 1)
        assert engine.step() == [number], "it runs in the next step"


def test_all_of_a_call_are_served_and_nobody_is_left() -> None:
    engine = Engine()
    engine.add(0, 500, max_new_tokens=3)
    for _ in range(500):
        engine.step()
        if not engine.scheduler.has_work:
            break
    assert sorted(engine.ended) == list(range(500))
    assert engine.scheduler.num_waiting == 0


def test_calls_of_many_take_turns() -> None:
    engine = Engine()
    engine.add(0, 300, max_new_tokens=2)
    engine.add(300, 300, max_new_tokens=2)
    while len(engine.ended) < 300:
        engine.step()
    of_second = sum(number >= 300 for number in engine.ended)
    assert 120 <= of_second <= 180, "half of what has ended is of the call that came second"


def test_whoever_is_held_back_can_be_aborted() -> None:
    engine = Engine()
    engine.add(0, 100, max_new_tokens=50)
    engine.step()
    for number in range(20, 100):
        engine.scheduler.abort(
            number, FinishReason(kind="abort", failure=Failure("aborted", "bye"))
        )
        engine.scheduler.check_integrity()
    ended = engine.step()
    assert sorted(ended) == list(range(20, 100))
    assert engine.scheduler.num_waiting + engine.scheduler.num_running == 20


def test_a_failed_adapter_ends_those_that_are_held_back() -> None:
    engine = Engine()
    engine.add(0, 100, max_new_tokens=50)
    engine.step()
    engine.scheduler.fail_version(0, Failure("refused", "it broke"))
    assert sorted(engine.step()) == list(range(100))


def test_completions_of_no_call_are_not_held_back() -> None:
    engine = Engine()
    for number in range(100):
        engine.scheduler.add(sequence(number, max_new_tokens=50))
    engine.step()
    assert engine.scheduler.num_running == MAX_RUNNING


def test_one_of_each_call_in_turn() -> None:
    shares = CallShares(1)
    assert shares.take(sequence(0, 0))
    assert shares.take(sequence(1, 0)), "the first that follows"
    for number in (2, 3, 4):
        assert not shares.take(sequence(number, 0))
    assert shares.take(sequence(10, 10)), "the first of its call"
    for number in (11, 12):
        assert not shares.take(sequence(number, 10))
    assert len(shares) == 5
    found: list[int] = []
    last = sequence(1, 0)
    while len(shares):
        assert shares.next() is None, "one of them waits or runs"
        assert not shares.forget(last), "it was not held back"
        last = shares.next()
        assert last is not None
        found.append(last.id)
    assert found == [2, 11, 3, 12, 4]


def test_whoever_comes_later_does_not_pass_those_that_are_held_back() -> None:
    shares = CallShares(1)
    assert shares.take(sequence(1, 0))
    held = sequence(2, 0)
    assert not shares.take(held)
    assert not shares.forget(sequence(1, 0))
    assert not shares.take(sequence(11, 10)), "there is room, but one that came before waits for it"
    assert shares.next() is held
    assert shares.forget(sequence(11, 10)), "it was held back"
    assert len(shares) == 0
