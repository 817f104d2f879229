from __future__ import annotations

from lorikeet.adapters.tiers import Tier
from lorikeet.core.request import Request, SamplingParams
from lorikeet.core.sequence import Sequence
from lorikeet.scheduler.admission import Admission, Round
from lorikeet.scheduler.limits import SchedulerLimits, StepBudget
from lorikeet.scheduler.queue import RunningSet, WaitingQueue


class Desk:
    """A queue and an endless supply of rows; sequences run until they are told to stop."""

    def __init__(self, *, policy: str = "fcfs", max_loras: int = 2, max_passes: int = 16) -> None:
        self.limits = SchedulerLimits(
            max_running=1000,
            max_step_tokens=1000,
            max_prefill_tokens=1000,
            context_length=100,
            max_loras_per_batch=max_loras,
            eos_token_ids=frozenset(),
            policy=policy,
            max_passes=max_passes,
        )
        self.queue = WaitingQueue()
        self.running = RunningSet()
        self.lengths: dict[int, int] = {}
        self.tiers: dict[int, Tier] = {}
        self.admission = Admission(
            self.limits,
            self.queue,
            self.running,
            lambda seq: self.lengths.get(seq.id, 0),
            self,
        )
        self.num_free_reads = 2
        self.ended: list[int] = []
        self.num_made = 0
        self.num_tried = 0
        self.no_room: set[int] = set()

    def tier(self, version: int) -> Tier:
        return self.tiers.get(version, Tier.DEVICE)

    def take_ended_reads(self) -> list[int]:
        ended, self.ended = self.ended, []
        return ended

    def end_read(self, version: int, tier: Tier) -> None:
        self.tiers[version] = tier
        self.num_free_reads += 1
        self.ended.append(version)

    def arrive(self, *versions: int) -> list[Sequence]:
        seqs: list[Sequence] = []
        for version in versions:
            request = Request(prompt_token_ids=[1], sampling=SamplingParams())
            seqs.append(Sequence(self.num_made, request, version, 0))
            self.num_made += 1
            self.queue.push(seqs[-1])
        return seqs

    def step(self) -> list[int]:
        """One round. Returns the versions admitted, in order."""
        budget = StepBudget.for_step(
            self.limits,
            num_rows=0,
            num_running=len(self.running),
            num_adapters=len(self.running.num_of_version),
        )
        admitted: list[int] = []
        self.admission.note_reads()
        candidates = Round(self.admission, budget)
        while (seq := candidates.next()) is not None:
            if seq.version in self.no_room:
                candidates.refuse(seq)
                continue
            self.num_tried += 1
            if self.tiers.get(seq.version) is Tier.DISK:
                if self.num_free_reads:
                    self.num_free_reads -= 1
                    self.tiers[seq.version] = Tier.READING
                candidates.park(seq)
                continue
            if self.tiers.get(seq.version) is Tier.HOST:
                self.tiers[seq.version] = Tier.COPYING
                candidates.park(seq)
                continue
            self.queue.remove(seq)
            budget.adapters -= bool(seq.version) and seq.version not in self.running.num_of_version
            self.running.add(seq)
            admitted.append(seq.version)
        candidates.close()
        self.queue.check_integrity(self.running.num_of_version, self.admission.is_off)
        return admitted

    def stop(self, version: int) -> None:
        """Every sequence of a version ends."""
        for seq in [seq for seq in self.running.sequences() if seq.version == version]:
            if self.running.remove(seq):
                self.queue.offer(version)


def test_first_come_first_served() -> None:
    desk = Desk()
    desk.arrive(1, 0, 2, 1, 0)
    assert desk.step() == [1, 0, 2, 1, 0]


def test_a_third_adapter_waits_alone() -> None:
    desk = Desk()
    desk.arrive(1, 2, 3, 1, 0, 3, 2)
    assert desk.step() == [1, 2, 1, 0, 2]
    desk.stop(1)
    assert desk.step() == [3, 3]


def test_the_base_model_never_waits_for_adapters() -> None:
    desk = Desk(max_passes=1)
    desk.arrive(1, 2, 3)
    desk.step()
    desk.arrive(*[0] * 50)
    assert desk.step() == [0] * 50


def test_the_number_of_passes_is_bounded() -> None:
    desk = Desk(max_passes=16)
    desk.arrive(1, 2, 3)
    desk.step()
    desk.arrive(*[1, 2] * 40)
    assert len(desk.step()) <= 16
    assert desk.step() == []
    desk.stop(2)
    assert desk.step()[0] == 3, "first in line for the room that appears"


def test_one_adapter_drains_early_and_the_other_keeps_its_rows() -> None:
    desk = Desk(max_passes=16)
    desk.arrive(1, 1, 2, 3)
    desk.step()
    desk.arrive(*[1, 2] * 8)
    admitted = desk.step()
    assert (admitted.count(1), admitted.count(2)) == (8, 1), "2 has fewer sequences to wait for"


def test_draining_is_decided_once() -> None:
    desk = Desk(max_passes=8)
    desk.arrive(1, 2, 2, 3)
    desk.step()
    assert desk.admission.draining() == 1
    desk.arrive(1)
    desk.step()
    assert desk.admission.draining() == 1
    desk.stop(1)
    assert desk.step() == [3]
    desk.stop(3)
    assert desk.admission.draining() == 2


def test_no_room_on_the_device_blocks_like_no_slot() -> None:
    desk = Desk(max_loras=4, max_passes=8)
    desk.no_room = {3}
    desk.arrive(3, 1, 2, 0)
    assert desk.step() == [1, 2, 0]
    desk.arrive(*[2] * 20, 4)
    assert desk.step() == [2] * 6, "3 has been passed eight times"
    desk.no_room = set()
    admitted = desk.step()
    assert admitted[0] == 3
    assert admitted[1:] == [2] * 14 + [4]


def test_a_round_gives_up_after_a_few_refusals() -> None:
    desk = Desk(max_loras=8, max_passes=64)
    desk.no_room = set(range(1, 17))
    desk.arrive(*range(1, 18), 0)
    assert desk.step() == [0], "version 17 is behind too many that have no room"
    desk.no_room.discard(2)
    assert desk.step() == [2, 17]


def test_a_read_holds_nobody_up() -> None:
    desk = Desk(max_loras=2, max_passes=4)
    desk.tiers = {1: Tier.READING}
    desk.arrive(1, 2, 3, 4)
    assert desk.step() == [2, 3], "a read takes no adapter's place"
    desk.arrive(*[2, 3] * 20)
    assert 0 < len(desk.step()) <= 4, "4 is blocked, for it waits for a place"
    desk.stop(2)
    assert desk.step()[0] == 4
    desk.end_read(1, Tier.DEVICE)
    assert desk.step() == [], "now 1 waits for a place, too"
    desk.stop(3)
    assert desk.step()[0] == 1


def test_a_burst_of_absent_adapters_is_looked_at_once() -> None:
    """Two reads at a time, in the order of the queue; a step looks at what has changed and not at the whole burst."""
    desk = Desk(max_loras=500, max_passes=4)
    burst = range(1, 301)
    desk.tiers = dict.fromkeys(burst, Tier.DISK)
    desk.arrive(*burst, 301)
    assert desk.step() == [301], "301 is there and waits for nobody"
    assert desk.num_tried == 301
    assert [v for v in burst if desk.tiers[v] is Tier.READING] == [1, 2]
    desk.num_tried = 0
    for version in burst:
        assert desk.tiers[version] is Tier.READING, "in order"
        desk.end_read(version, Tier.DEVICE)
        assert desk.step() == [version]
    assert desk.num_tried <= 2 * len(burst)


def test_whoever_stands_in_line_for_a_read_may_leave() -> None:
    desk = Desk(max_loras=9, max_passes=4)
    desk.tiers = dict.fromkeys((1, 2, 3, 4), Tier.DISK)
    seqs = desk.arrive(1, 2, 3, 3, 4)
    desk.step()
    for gone in (seqs[2], seqs[4]):  # one of two that wait for 3, and whoever waits for 4
        desk.queue.remove(gone)
    assert desk.step() == []
    desk.tiers[3] = Tier.READING  # ahead, by the residency
    desk.num_free_reads = 0
    desk.end_read(3, Tier.DEVICE)
    assert desk.step() == [3]
    assert desk.arrive(4)
    desk.end_read(1, Tier.DEVICE)
    assert desk.step() == [1]
    assert desk.tiers[4] is Tier.READING
    desk.end_read(4, Tier.DEVICE)
    desk.end_read(2, Tier.DEVICE)
    assert desk.step() == [2, 4]


def test_with_every_place_taken_only_those_who_could_run_are_blocked() -> None:
    desk = Desk(max_loras=1, max_passes=4)
    desk.arrive(1)
    desk.step()
    desk.tiers = {2: Tier.READING}
    desk.arrive(2, *[1] * 30)
    assert desk.step() == [1] * 30


def test_a_copy_keeps_a_place() -> None:
    desk = Desk(max_loras=2, max_passes=16)
    desk.tiers = {1: Tier.HOST}
    desk.arrive(1, 2, 3, 2)
    assert desk.step() == [2, 2]
    assert desk.tiers[1] is Tier.COPYING
    assert desk.step() == [], "3 would take the place of 1"
    desk.tiers[1] = Tier.DEVICE
    assert desk.step() == [1]
    desk.stop(2)
    assert desk.step() == [3]


def test_preempted_come_first_whatever_the_policy() -> None:
    desk = Desk(policy="lpm")
    (early,) = desk.arrive(1)
    desk.step()
    waiting = desk.arrive(1, 0)
    desk.lengths = {seq.id: 50 for seq in waiting}
    desk.running.remove(early)
    early.enter(type(early.state).PREEMPTED)
    desk.queue.push_front(early)
    candidates = Round(desk.admission, StepBudget(100, 100, 2))
    assert candidates.next() is early


def test_longest_prefix_first() -> None:
    desk = Desk(policy="lpm")
    seqs = desk.arrive(1, 1, 2, 0)
    desk.lengths = {seqs[1].id: 8, seqs[2].id: 4, seqs[3].id: 6}
    assert desk.step() == [1, 0, 2, 1]


def test_longest_prefix_passes_a_bounded_number_of_times() -> None:
    desk = Desk(policy="lpm", max_passes=5)
    (poor,) = desk.arrive(1)
    rich = desk.arrive(*[1] * 30)
    desk.lengths = {seq.id: 9 for seq in rich}
    order: list[int] = []
    candidates = Round(desk.admission, StepBudget(100, 100, 2))
    while (seq := candidates.next()) is not None:
        order.append(seq.id)
        desk.queue.remove(seq)
    assert order.index(poor.id) == 5
