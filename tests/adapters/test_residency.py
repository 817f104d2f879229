from __future__ import annotations

import pytest

from lorikeet.adapters.rank_pages import RankPageAllocator
from lorikeet.adapters.residency import Residency
from lorikeet.adapters.tiers import LEGAL_MOVES, Resident, Tier
from lorikeet.core.plan import PageCopy
from lorikeet.errors import AdapterError
from tests.support.residency_rig import NO_ROOM, READY, WAIT, bring, make, use


def test_the_base_model_takes_nothing() -> None:
    residency = make(num_slots=1)
    assert residency.admit(0) is READY
    assert (residency.slot(0), residency.is_resident(0), 0 in residency) == (0, True, True)
    residency.release(0)
    assert residency.take_decisions() == ([], [])


def test_admission_plans_a_copy_once() -> None:
    residency = make()
    residency.add(7, [0, 0])
    assert residency.tier(7) is Tier.HOST
    assert residency.admit(7) is WAIT
    assert residency.admit(7) is WAIT
    assert residency.tier(7) is Tier.COPYING
    slots, copies = residency.take_decisions()
    assert residency.usable() == []
    assert (slots, copies) == ([], [PageCopy(version=7, slot=1, page_ids=[0, 10])])
    assert (residency.has_copies_in_flight, residency.num_uses(7)) == (True, 0)
    residency.copies_done([7], {})
    assert not residency.has_copies_in_flight
    assert residency.admit(7) is READY
    assert (residency.tier(7), residency.slot(7), residency.num_uses(7)) == (Tier.DEVICE, 1, 1)
    assert residency.take_decisions() == ([], [])
    assert residency.usable() == [7]
    residency.check_integrity()


def test_adapters_in_use_stay() -> None:
    residency = make(num_slots=3)
    for version in (1, 2, 3, 4):
        residency.add(version, [0])
    bring(residency, 1)
    assert residency.admit(2) is WAIT
    assert residency.admit(3) is NO_ROOM, "no slot"
    residency.copies_done([2], {})
    assert residency.admit(3) is WAIT, "2 came for nobody"
    residency.release(1)
    residency.take_decisions()
    assert residency.admit(4) is WAIT, "1 is idle now"
    slots, copies = residency.take_decisions()
    assert slots == [1]
    assert [(copy.version, copy.slot) for copy in copies] == [(4, 1)]
    assert residency.tier(1) is Tier.HOST
    residency.check_integrity()


def test_a_copy_on_its_way_stays() -> None:
    residency = make(num_slots=2)
    residency.add(1, [0])
    residency.add(2, [0])
    assert residency.admit(1) is WAIT
    assert residency.admit(2) is NO_ROOM
    residency.copies_done([1], {})
    assert residency.admit(2) is WAIT


def test_pages_are_room_too() -> None:
    residency = make(num_slots=5, num_pages=4)
    residency.add(1, [0] * 2)
    residency.add(2, [0] * 2)
    residency.add(3, [0])
    use(residency, 1)
    bring(residency, 2)
    assert residency.admit(3) is WAIT, "1 leaves"
    assert list(residency.device.placed) == [2, 3]
    residency.check_integrity()


@pytest.mark.parametrize(("policy", "leaves"), [("lru", 2), ("fifo", 1)])
def test_policy(policy: str, leaves: int) -> None:
    residency = make(policy=policy)
    for version in (1, 2, 3):
        residency.add(version, [0])
    use(residency, 1)
    use(residency, 2)
    use(residency, 1)
    use(residency, 3)
    assert list(residency.device.placed) == sorted({1, 2, 3} - {leaves})


def test_eviction_looks_at_the_queue_before_the_clock() -> None:
    residency = make()
    for version in (1, 2, 3, 4):
        residency.add(version, [0])
    use(residency, 1)
    use(residency, 2)
    residency.ledger.want([3, 1])
    use(residency, 3)
    assert list(residency.device.placed) == [1, 3]
    residency.ledger.want([4, 1, 3])
    use(residency, 4)
    assert list(residency.device.placed) == [1, 4], "3 is wanted later than 1"


def test_nobody_makes_room_for_one_that_is_wanted_later() -> None:
    residency = make(max_host=3)
    for version in (1, 2, 3):
        residency.add(version, [0])
    use(residency, 1)
    use(residency, 2)
    residency.ledger.want([1, 2, 3])
    assert residency.admit(3) is NO_ROOM
    residency.ledger.want([1, 3])
    assert residency.admit(3) is WAIT, "nobody wants 2 any more"
    assert list(residency.device.placed) == [1, 3]


def test_what_the_queue_wants_is_copied_ahead() -> None:
    residency = make(num_slots=4)
    for version in (1, 2, 3, 4):
        residency.add(version, [0])
    bring(residency, 1)
    residency.take_decisions()
    residency.ledger.want([2, 3, 4])
    assert [copy.version for copy in residency.take_decisions()[1]] == [2, 3]
    residency.copies_done([2], {})
    assert residency.take_decisions() == ([], []), "whoever is there is wanted before 4"
    residency.ledger.want([4])
    residency.copies_done([3], {})
    slots, copies = residency.take_decisions()
    assert (slots, [copy.version for copy in copies]) == ([2], [4])


def test_no_more_victims_than_needed() -> None:
    allocator = RankPageAllocator((10, 20), 20, 4, [1, 2])
    residency = Residency(allocator=allocator, num_slots=9, policy="lru", max_pinned=0)
    residency.add(1, [0, 0])
    residency.add(2, [1, 1])
    residency.add(3, [1, 1])
    for version in (1, 2):
        use(residency, version)
    use(residency, 3)
    assert residency.device.num_evictions == 1
    assert list(residency.device.placed) == [1, 3], "1 is the oldest, but its pages are of no use"
    residency.check_integrity()


def test_a_refusal_is_remembered_until_something_is_released() -> None:
    residency = make(num_slots=2)
    residency.add(1, [0])
    residency.add(2, [0])
    bring(residency, 1)
    assert residency.admit(2) is NO_ROOM
    assert residency.admit(2) is NO_ROOM
    residency.release(1)
    assert residency.admit(2) is WAIT


def test_pinned_is_copied_unasked_and_stays() -> None:
    residency = make(num_slots=3)
    residency.add(1, [0], pinned=True)
    _, copies = residency.take_decisions()
    assert [copy.version for copy in copies] == [1]
    residency.copies_done([1], {})
    for version in (2, 3, 4):
        residency.add(version, [0])
        use(residency, version)
        assert 1 in residency.device.placed
    residency.set_pinned(1, pinned=False)
    residency.add(5, [0])
    use(residency, 5)
    assert list(residency.device.placed) == [4, 5]
    residency.check_integrity()


def test_a_pin_waits_for_room() -> None:
    residency = make(num_slots=2)
    residency.add(1, [0])
    bring(residency, 1)
    residency.add(2, [0], pinned=True)
    assert [copy.version for copy in residency.take_decisions()[1]] == [1]
    assert residency.has_unplaced_pins
    residency.release(1)
    assert [copy.version for copy in residency.take_decisions()[1]] == [2]


def test_too_many_pins_are_starvation() -> None:
    residency = make(max_pinned=1)
    residency.add(1, [0], pinned=True)
    with pytest.raises(AdapterError, match="starvation"):
        residency.add(2, [0], pinned=True)
    assert 2 not in residency
    residency.add(2, [0])
    with pytest.raises(AdapterError, match="starvation"):
        residency.set_pinned(2, pinned=True)
    residency.set_pinned(1, pinned=True)
    residency.set_pinned(1, pinned=False)
    residency.set_pinned(2, pinned=True)


def test_what_can_never_fit_is_refused() -> None:
    residency = make(num_pages=4, max_pinned=1)
    with pytest.raises(AdapterError, match=r"needs 3 rank pages of class 0.*guarantees 4 for 2"):
        residency.add(1, [0, 0, 0])


def test_failed_copy_gives_its_room_back() -> None:
    residency = make(num_slots=2)
    residency.add(1, [0])
    residency.add(2, [0])
    assert residency.admit(1) is WAIT
    residency.take_decisions()
    residency.copies_done([], {1: "device lost"})
    assert (list(residency.device.placed), residency.tier(1)) == ([], Tier.HOST)
    residency.check_integrity()
    assert residency.admit(2) is WAIT
    slots, copies = residency.take_decisions()
    assert (slots, [copy.slot for copy in copies]) == ([1], [1])
    residency.copies_done([2], {})
    assert residency.admit(1) is WAIT, "it may be tried again"
    residency.check_integrity()


def test_remove_waits_for_the_last_user() -> None:
    residency = make()
    residency.add(1, [0])
    bring(residency, 1)
    residency.remove(1)
    assert 1 not in residency
    assert residency.slot(1) == 1, "the sequence that runs with it goes on"
    residency.release(1)
    assert list(residency.device.placed) == []
    assert residency.take_decisions()[0] == [1]
    residency.check_integrity()
    with pytest.raises(ValueError, match="not in host memory"):
        residency.admit(1)


@pytest.mark.parametrize("ok", [False, True])
def test_remove_waits_for_the_copy(ok: bool) -> None:
    residency = make()
    residency.add(1, [0])
    assert residency.admit(1) is WAIT
    residency.remove(1)
    assert (1 in residency, list(residency.device.placed)) == (False, [1])
    residency.check_integrity()
    residency.copies_done([1] if ok else [], {} if ok else {1: "lost"})
    assert (list(residency.device.placed), residency.take_decisions()[0]) == ([], [1])
    residency.check_integrity()


def test_a_version_may_come_back_before_it_is_gone() -> None:
    residency = make()
    residency.add(1, [0])
    bring(residency, 1)
    residency.remove(1)
    residency.add(1, [0])
    residency.release(1)
    assert list(residency.device.placed) == [1]
    residency.check_integrity()


def test_remove_of_an_idle_version_frees_it_at_once() -> None:
    residency = make()
    residency.add(1, [0])
    use(residency, 1)
    residency.remove(1)
    assert (list(residency.device.placed), residency.take_decisions()[0]) == ([], [1])
    residency.add(2, [0])
    residency.remove(2)
    assert residency.take_decisions()[0] == []


def test_misuse_is_refused() -> None:
    residency = make()
    residency.add(1, [0])
    with pytest.raises(ValueError, match="there already"):
        residency.add(1, [0])
    with pytest.raises(ValueError, match="not in use"):
        residency.release(1)
    with pytest.raises(ValueError, match="no slot"):
        residency.slot(1)
    with pytest.raises(ValueError, match="no copy"):
        residency.copies_done([1], {})
    for call in (residency.admit, residency.remove, residency.tier):
        with pytest.raises(ValueError, match="not in host memory"):
            call(9)
    with pytest.raises(ValueError, match="known: lru, fifo"):
        make(policy="random")
    with pytest.raises(ValueError, match="slot 0"):
        make(num_slots=0)
    with pytest.raises(ValueError, match="would fill it"):
        make(max_host=1, max_pinned=1)


@pytest.mark.parametrize("before", Tier)
@pytest.mark.parametrize("after", Tier)
def test_only_legal_moves(before: Tier, after: Tier) -> None:
    resident = Resident(1, (0,), pinned=False, tier=before)
    if after in LEGAL_MOVES[before]:
        resident.enter(after)
        assert resident.tier is after
    else:
        with pytest.raises(ValueError, match=f"{before.value} -> {after.value}"):
            resident.enter(after)


def test_every_tier_is_reachable_and_left() -> None:
    assert set(LEGAL_MOVES) == set(Tier)
    assert all(LEGAL_MOVES.values())
    assert frozenset().union(*LEGAL_MOVES.values()) == set(Tier)


@pytest.mark.parametrize("how", ["failed copy", "no memory"])
def test_a_pin_that_did_not_arrive_is_placed_again_later(how: str) -> None:
    now = 100.0
    residency = make(num_slots=3, clock=lambda: now)
    residency.add(1, [0], pinned=True)
    for delay in (1.0, 2.0, 4.0):
        assert [copy.version for copy in residency.take_decisions()[1]] == [1]
        assert not residency.has_unplaced_pins
        residency.copies_done([], {1: "lost"} if how == "failed copy" else [1])
        assert residency.has_unplaced_pins
        now += delay - 0.1
        residency.take_decisions()
        assert residency.tier(1) is Tier.HOST, "not at once"
        now += 0.2
        residency.check_integrity()
    residency.take_decisions()
    residency.copies_done([1], {})
    assert residency.tier(1) is Tier.DEVICE
    assert not residency.has_unplaced_pins
    residency.remove(1)
    residency.take_decisions()
    residency.check_integrity()


def test_a_request_for_a_pin_that_did_not_arrive_does_not_wait_for_the_retry() -> None:
    residency = make(clock=lambda: 0.0)
    residency.add(1, [0], pinned=True)
    residency.take_decisions()
    residency.copies_done([], [1])
    assert residency.admit(1) is WAIT
    assert residency.tier(1) is Tier.COPYING


def test_a_pin_that_fails_for_days_is_still_tried() -> None:
    now = 0.0
    residency = make(clock=lambda: now)
    residency.add(1, [0], pinned=True)
    for _ in range(2000):
        assert residency.take_decisions()[1], "a minute later at most"
        residency.copies_done([], [1])
        now += 61.0


def test_an_unpinned_version_is_not_placed_again_by_itself() -> None:
    now = 0.0
    residency = make(clock=lambda: now)
    residency.add(1, [0], pinned=True)
    residency.take_decisions()
    residency.set_pinned(1, pinned=False)
    residency.copies_done([], [1])
    now = 1000.0
    assert residency.take_decisions()[1] == []
    assert not residency.has_unplaced_pins


def test_a_pin_whose_read_failed_is_placed_when_it_is_there() -> None:
    residency = make(max_host=2, max_pinned=1)
    for version in (1, 2, 3):
        residency.add(version, [0])
    residency.set_pinned(1, pinned=True)
    residency.take_decisions()
    residency.read_failed(1, "the disk is busy")
    assert not residency.has_unplaced_pins
    residency.add(1, [0])
    assert [copy.version for copy in residency.take_decisions()[1]] == [1]


def test_counts_by_tier_and_what_has_moved() -> None:
    residency = make(max_host=2)
    for version in (1, 2, 3):
        residency.add(version, [0])
    assert sorted(residency.ledger.take_moved()) == [1, 2, 3]
    assert residency.ledger.take_moved() == []
    bring(residency, 3)
    assert residency.ledger.take_moved() == [3]
    counts = {tier: residency.ledger.num_in[tier] for tier in Tier if residency.ledger.num_in[tier]}
    assert counts == {Tier.DISK: 1, Tier.HOST: 1, Tier.DEVICE: 1}
    residency.remove(3)
    assert residency.ledger.num_in[Tier.DEVICE] == 0, "it runs on, but is not listed"
    residency.release(3)
    residency.check_integrity()


def test_a_version_that_could_not_be_read_may_be_read_again() -> None:
    residency = make(max_host=2, max_pinned=1)
    for version in (1, 2, 3):
        residency.add(version, [0])
    assert residency.tier(1) is Tier.DISK
    assert residency.admit(1) is WAIT
    residency.take_reads()
    residency.read_failed(1, "the disk is busy")
    assert residency.failure(1) == "the disk is busy"
    residency.check_integrity()
    residency.retry(1)
    assert (residency.failure(1), residency.tier(1)) == (None, Tier.DISK)
    residency.check_integrity()
    assert residency.admit(1) is WAIT
    assert residency.take_reads() == [1]
    assert residency.read_done(1, [0])
    residency.check_integrity()
    with pytest.raises(ValueError, match="has not failed"):
        residency.retry(1)
