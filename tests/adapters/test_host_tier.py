from __future__ import annotations

import pytest

from lorikeet.adapters.residency import AdapterAdmission
from lorikeet.adapters.tiers import Tier
from lorikeet.errors import AdapterError
from tests.support.count_operations import count_operations
from tests.support.residency_rig import NO_ROOM, WAIT, bring, has_host_room, make, use


def test_loads_beyond_the_host_limit() -> None:
    residency = make(max_host=2, max_pinned=1)
    for version in (1, 2, 3):
        assert has_host_room(residency)
        residency.add(version, [0])
    assert residency.host.take_drops() == [1]
    assert residency.host.take_drops() == []
    assert residency.tier(1) is Tier.DISK
    residency.set_pinned(2, pinned=True)
    bring(residency, 3)
    assert not has_host_room(residency)
    with pytest.raises(AdapterError, match="--max-loaded-loras"):
        residency.add(4, [0])
    assert 4 not in residency
    residency.release(3)
    residency.add(4, [0])
    assert residency.host.take_drops() == [3]
    assert residency.take_decisions()[0] == [1], "off the device first"
    residency.check_integrity()


@pytest.mark.parametrize(("policy", "leaves"), [("lru", 2), ("fifo", 1)])
def test_host_victims_follow_the_policy(policy: str, leaves: int) -> None:
    residency = make(policy=policy, max_host=3)
    for version in (1, 2, 3):
        residency.add(version, [0])
    use(residency, 1)
    residency.add(4, [0])
    assert residency.host.take_drops() == [leaves]


def test_an_evicted_version_comes_back_on_demand() -> None:
    residency = make(max_host=2)
    for version in (1, 2, 3):
        residency.add(version, [0])
    residency.host.take_drops()
    assert residency.admit(1) is WAIT
    assert residency.tier(1) is Tier.READING
    assert (residency.host.take_drops(), residency.take_reads()) == ([2], [1])
    assert residency.take_reads() == []
    assert residency.admit(1) is WAIT
    residency.check_integrity()
    assert residency.read_done(1, [0])
    assert residency.tier(1) is Tier.HOST
    use(residency, 1)
    residency.check_integrity()


def test_no_room_to_read() -> None:
    residency = make(max_host=2)
    for version in (1, 2, 3):
        residency.add(version, [0])
    bring(residency, 2, 3)
    assert residency.admit(1) is NO_ROOM, "both are in use"
    residency.release(3)
    residency.ledger.want([3, 1])
    assert residency.admit(1) is NO_ROOM, "3 is wanted before"
    residency.ledger.want([1, 3])
    assert residency.admit(1) is WAIT
    residency.check_integrity()


def test_reads_ahead_in_the_order_of_the_queue() -> None:
    residency = make(max_host=2)
    for version in range(1, 6):
        residency.add(version, [0])
    residency.ledger.want([3, 2, 1])
    residency.take_decisions()
    assert residency.host.reads
    assert residency.take_reads() == [3, 2], "4 and 5 are wanted by nobody, 3 before 1"
    assert not residency.host.reads
    assert residency.host.take_drops() == [1, 2, 3, 4, 5]
    residency.check_integrity()


def test_a_failed_read() -> None:
    residency = make(max_host=1, max_pinned=0)
    residency.add(1, [0])
    residency.add(2, [0])
    assert residency.admit(1) is WAIT
    assert residency.read_failed(1, "it has changed")
    assert (residency.tier(1), residency.failure(1)) == (Tier.FAILED, "it has changed")
    assert residency.host.take_failures() == {1: "it has changed"}
    assert residency.host.take_failures() == {}
    assert residency.admit(1) is AdapterAdmission.FAILED
    assert residency.take_reads() == []
    residency.check_integrity()
    residency.add(1, [0])
    assert (residency.tier(1), residency.failure(1)) == (Tier.HOST, None)
    use(residency, 1)
    residency.check_integrity()


def test_a_failed_version_can_be_removed() -> None:
    residency = make(max_host=1, max_pinned=0)
    residency.add(1, [0])
    residency.add(2, [0])
    assert residency.admit(1) is WAIT
    residency.read_failed(1, "it has changed")
    residency.remove(1)
    assert (1 in residency, residency.failure(1), residency.host.take_failures()) == (
        False,
        None,
        {},
    )
    residency.check_integrity()


@pytest.mark.parametrize("again", [False, True])
def test_removed_while_it_is_read(again: bool) -> None:
    residency = make(max_host=1, max_pinned=0)
    residency.add(1, [0])
    residency.add(2, [0])
    assert residency.admit(1) is WAIT
    residency.remove(1)
    assert residency.take_reads() == []
    if again:
        residency.add(1, [0])
    assert not residency.read_done(1, [0]), "nobody wants these bytes"
    assert not residency.read_failed(1, "late")
    assert (1 in residency, residency.failure(1)) == (again, None)
    residency.check_integrity()


def test_a_load_overtakes_a_read() -> None:
    residency = make(max_host=1, max_pinned=0)
    residency.add(1, [0])
    residency.add(2, [0])
    assert residency.admit(1) is WAIT
    residency.add(1, [0])
    assert (residency.tier(1), residency.read_done(1, [0])) == (Tier.HOST, False)
    assert residency.host.take_drops() == [2]
    residency.check_integrity()


def test_a_drop_that_nobody_carried_out_yet_is_forgotten_when_new_bytes_come() -> None:
    residency = make(max_host=1, max_pinned=0)
    residency.add(1, [0])
    residency.add(2, [0])
    residency.add(1, [0])
    assert residency.host.take_drops() == [2]
    residency.add(2, [0])
    residency.remove(1)
    assert residency.host.take_drops() == [], "a removed one is not named"


def test_a_pin_on_disk_is_read_and_copied() -> None:
    residency = make(max_host=2, max_pinned=1)
    for version in (1, 2, 3):
        residency.add(version, [0])
    residency.ledger.want([2, 3])
    residency.set_pinned(1, pinned=True)
    assert residency.has_unplaced_pins
    residency.take_decisions()
    assert residency.take_reads() == [1]
    assert residency.host.take_drops() == [1, 3]
    residency.read_done(1, [0])
    assert 1 in [copy.version for copy in residency.take_decisions()[1]]
    assert not residency.has_unplaced_pins


@pytest.mark.parametrize("policy", ["lru", "fifo"])
def test_a_choice_costs_the_same_among_thousands(policy: str) -> None:
    """Of those in memory and of those on disk: a load that evicts, a use, and a read that evicts."""
    counts: list[list[int]] = []
    for num_adapters in (100, 5_000):
        residency = make(policy=policy, max_host=num_adapters // 2)
        for version in range(1, num_adapters):
            residency.add(version, [0])
        residency.host.take_drops()
        residency.ledger.want(range(num_adapters - 70, num_adapters - 10))
        load = count_operations(lambda r=residency, v=num_adapters: r.add(v, [0]))[0]
        once = count_operations(lambda r=residency, v=num_adapters - 1: use(r, v))[0]
        read = count_operations(lambda r=residency: r.admit(1))[0]
        assert residency.tier(1) is Tier.READING
        assert len(residency.host.take_drops()) == 2
        counts.append([load, once, read])
    few, many = counts
    assert all(more <= less + 10 for less, more in zip(few, many, strict=True)), counts


def test_reads_at_a_time() -> None:
    residency = make(max_host=10, max_reads=2)
    for version in range(1, 16):
        residency.add(version, [0])
    residency.host.take_drops()
    assert [residency.admit(version) for version in (1, 2, 3)] == [WAIT] * 3
    assert (residency.take_reads(), residency.tier(3), residency.num_free_reads) == (
        [1, 2],
        Tier.DISK,
        0,
    )
    residency.ledger.want([3, 4])
    residency.take_decisions()
    assert residency.take_reads() == []
    residency.take_ended_reads()
    residency.read_failed(1, "gone")
    assert (residency.take_ended_reads(), residency.num_free_reads) == ([1], 1)
    residency.take_decisions()
    assert residency.take_reads() == [3], "in the order of the queue"
    residency.remove(2)
    assert (residency.take_ended_reads(), residency.num_free_reads) == ([2], 1)
    residency.check_integrity()
