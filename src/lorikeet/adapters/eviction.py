"""Which adapter leaves device or host memory.

The queue goes before the clock: whoever is not wanted leaves first, by the policy; among the wanted, the one that is
needed last leaves first (what Belady's rule says about the part of the future that is known). ``adapters/tiers.py`` knows
the wanted ones; the others stand in an :class:`IdleLine`. A new policy is a row in ``POLICIES``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

#: Name -> the age by which a version stands in line, from the clock of its last use and that of its arrival in the tier.
POLICIES: dict[str, Callable[[int, int], int]] = {
    "lru": lambda last_use, since: last_use,
    "fifo": lambda last_use, since: since,
}


class IdleLine:
    """Versions that may leave, the first to leave in front: by age, then by number.

    A sorted list: what a change moves is 8 bytes for each version behind it, less than a microsecond for thousands.
    """

    def __init__(self) -> None:
        self._line: list[tuple[int, int]] = []
        self._ages: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._line)

    def __contains__(self, version: int) -> bool:
        return version in self._ages

    def __iter__(self) -> Iterator[int]:
        """The versions in order; the line must not change meanwhile."""
        for _, version in self._line:
            yield version

    def put(self, version: int, age: int) -> None:
        """Let a version stand in line at its age, whether it did before or not."""
        before = self._ages.get(version)
        if before == age:
            return
        if before is not None:
            self._remove(version, before)
        insort(self._line, (age, version))
        self._ages[version] = age

    def discard(self, version: int) -> None:
        """Take a version out, if it stands there."""
        age = self._ages.pop(version, None)
        if age is not None:
            self._remove(version, age)

    def _remove(self, version: int, age: int) -> None:
        del self._line[bisect_left(self._line, (age, version))]
