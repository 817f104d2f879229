"""Which adapter leaves device or host memory. Pure functions; a new policy is a row in ``POLICIES``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter that may leave: not pinned, not in use, nothing of it on its way.

    Attributes:
        last_use: clock when it was last in use.
        since: clock when it came to the tier that it may leave.
        wanted: its place in the order in which the queue wants adapters; None if nobody there wants it.
    """

    version: int
    last_use: int
    since: int
    wanted: int | None = None


def least_recently_used(candidate: Candidate) -> int:
    return candidate.last_use


def first_in(candidate: Candidate) -> int:
    return candidate.since


POLICIES: dict[str, Callable[[Candidate], int]] = {"lru": least_recently_used, "fifo": first_in}


def eviction_order(candidates: Iterable[Candidate], policy: str) -> list[int]:
    """Versions in the order in which they should leave.

    The queue goes before the clock: whoever is not wanted leaves first, by the policy; among the wanted, the one
    that is needed last leaves first (what Belady's rule says about the part of the future that is known).

    Args:
        policy: a key of ``POLICIES``; KeyError otherwise.
    """
    rank = _rank(policy)
    return [candidate.version for candidate in sorted(candidates, key=rank)]


def first_to_leave(candidates: Iterable[Candidate], policy: str) -> int | None:
    """The first of ``eviction_order``, in linear time; None if there is no candidate."""
    first = min(candidates, key=_rank(policy), default=None)
    return first.version if first is not None else None


def _rank(policy: str) -> Callable[[Candidate], tuple[bool, int, int, int]]:
    age = POLICIES[policy]

    def rank(candidate: Candidate) -> tuple[bool, int, int, int]:
        place = candidate.wanted
        return (place is not None, -(place or 0), age(candidate), candidate.version)

    return rank
