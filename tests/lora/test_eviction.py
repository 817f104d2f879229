from __future__ import annotations

import pytest

from lorikeet.lora.eviction import Candidate, eviction_order, first_to_leave

CANDIDATES = [
    Candidate(version=1, last_use=30, since=1),
    Candidate(version=2, last_use=10, since=3),
    Candidate(version=3, last_use=20, since=2),
]


def test_lru_takes_the_one_unused_longest() -> None:
    assert eviction_order(CANDIDATES, "lru") == [2, 3, 1]


def test_fifo_takes_the_one_that_came_first() -> None:
    assert eviction_order(CANDIDATES, "fifo") == [1, 3, 2]


@pytest.mark.parametrize("policy", ["lru", "fifo"])
def test_the_queue_goes_before_the_clock(policy: str) -> None:
    wanted = [Candidate(4, last_use=1, since=0, wanted=0), Candidate(5, 2, 0, wanted=7)]
    order = eviction_order([*wanted, *CANDIDATES], policy)
    assert order[3:] == [5, 4], "needed last, leaves first"
    assert order[:3] == eviction_order(CANDIDATES, policy)


def test_order_does_not_depend_on_the_input_order() -> None:
    tied = [Candidate(version, 5, 5) for version in (9, 7, 8)]
    assert eviction_order(tied, "lru") == eviction_order(tied[::-1], "lru") == [7, 8, 9]


def test_unknown_policy() -> None:
    with pytest.raises(KeyError):
        eviction_order(CANDIDATES, "random")


def test_the_first_of_the_order_alone() -> None:
    wanted = [Candidate(4, last_use=1, since=0, wanted=0), Candidate(5, 2, 0, wanted=7)]
    for policy in ("lru", "fifo"):
        for candidates in (CANDIDATES, wanted, [*wanted, *CANDIDATES]):
            assert first_to_leave(candidates, policy) == eviction_order(candidates, policy)[0]
        assert first_to_leave([], policy) is None
