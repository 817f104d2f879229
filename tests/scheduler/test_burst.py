"""Hundreds of requests for adapters that are on disk, among thousands that nobody asks for: a step pays for what changes."""

from __future__ import annotations

from lorikeet.adapters.rank_pages import RankPageAllocator
from lorikeet.adapters.residency import Residency
from lorikeet.adapters.tiers import Tier
from lorikeet.core.request import Request, SamplingParams
from lorikeet.core.sequence import Sequence
from lorikeet.kv.manager import KVManager
from lorikeet.scheduler.limits import SchedulerLimits
from lorikeet.scheduler.scheduler import Scheduler
from tests.support.count_operations import count_operations
from tests.support.fake_worker import FakeWorker

BURST, MAX_HOST, MAX_LORAS, PER_STEP = 600, 512, 8, 4


class Burst:
    """An engine without a model, with ``num_adapters`` registered; the last ones are in host memory.

    Attributes:
        largest: the most operations that one plan took.
    """

    def __init__(self, num_adapters: int) -> None:
        self.kv = KVManager(4, 256, radix=False)
        self.residency = Residency(
            allocator=RankPageAllocator((10,), 10, 2 * MAX_LORAS, [2 * MAX_LORAS]),
            num_slots=1 + 2 * MAX_LORAS,
            policy="lru",
            max_pinned=1,
            max_host=MAX_HOST,
        )
        for version in range(1, 1 + num_adapters):
            self.residency.add(version, [0])
        self.residency.host.take_drops()
        limits = SchedulerLimits(
            max_running=16,
            max_step_tokens=64,
            max_prefill_tokens=1000,
            context_length=100,
            max_loras_per_batch=MAX_LORAS,
            eos_token_ids=frozenset(),
        )
        self.scheduler = Scheduler(limits, self.kv, self.residency)
        self.worker = FakeWorker(
            page_size=4, num_pages=256, num_slots=1 + 2 * MAX_LORAS, vocab_size=1000
        )
        self.reading: list[int] = []
        self.largest = 0
        self.num_ended = 0

    def ask(self, *versions: int) -> None:
        for number, version in enumerate(versions):
            request = Request(prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_new_tokens=1))
            self.scheduler.add(Sequence(number, request, version, seed=5))

    def step(self) -> int:
        """Plan, execute, and finish a few reads. Returns the operations of the plan."""
        count, plan = count_operations(self.scheduler.plan)
        if plan is not None:
            self.worker.submit(plan)
            self.scheduler.commit(plan, self.worker.collect())
        self.num_ended += sum(output.finish is not None for output in self.scheduler.drain())
        self.residency.host.take_drops()
        self.reading += self.residency.take_reads()
        for version in self.reading[:PER_STEP]:
            self.residency.read_done(version, [0])
        del self.reading[:PER_STEP]
        return count


def test_a_burst_of_absent_adapters() -> None:
    """The plan that sees the burst first looks at each once; no later one does, and the registered ones cost nothing."""
    first: dict[int, int] = {}
    later: dict[int, int] = {}
    for num_adapters in (2_000, 10_000):
        burst = Burst(num_adapters)
        burst.step()  # takes note of the loads
        burst.ask(*range(1, 1 + BURST))
        first[num_adapters] = burst.step()
        assert burst.residency.ledger.num_in[Tier.READING] + PER_STEP == 64, (
            "so many are read at a time"
        )
        counts: list[int] = []
        for _ in range(400):
            counts.append(burst.step())
            if burst.num_ended == BURST:
                break
        assert burst.num_ended == BURST, "everybody is served"
        later[num_adapters] = max(counts)
        burst.scheduler.check_integrity()
    assert first[10_000] < 1.05 * first[2_000]
    assert first[10_000] < 1_000 * BURST
    assert later[10_000] < 1.05 * later[2_000]
    assert later[10_000] < 1_000 * 64, "a step of a long burst costs as much as one of a short"
