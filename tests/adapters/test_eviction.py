from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorikeet.adapters.tiers import POLICIES, IdleLine


def test_policies() -> None:
    assert POLICIES["lru"](30, 1) == 30
    assert POLICIES["fifo"](30, 1) == 1


def test_the_oldest_stands_in_front() -> None:
    line = IdleLine()
    for version, age in ((1, 30), (2, 10), (3, 20), (4, 10)):
        line.put(version, age)
    assert list(line) == [2, 4, 3, 1]
    line.put(2, 25)
    line.discard(3)
    line.discard(3)
    assert (list(line), len(line), 3 in line, 2 in line) == ([4, 2, 1], 3, False, True)


@given(st.lists(st.tuples(st.integers(0, 6), st.one_of(st.none(), st.integers(0, 4)))))
def test_the_order_is_that_of_sorting(changes: list[tuple[int, int | None]]) -> None:
    line, ages = IdleLine(), dict[int, int]()
    for version, age in changes:
        if age is None:
            line.discard(version)
            ages.pop(version, None)
        else:
            line.put(version, age)
            ages[version] = age
        assert list(line) == sorted(ages, key=lambda version: (ages[version], version))
