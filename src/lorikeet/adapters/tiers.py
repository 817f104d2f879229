"""Where an adapter version can be, how it moves between there, what residency remembers about it, and who leaves first.

The queue goes before the clock: whoever is not wanted leaves first, by the policy; among the wanted, the one that is
needed last leaves first (what Belady's rule says about the part of the future that is known). The :class:`Ledger` knows
the wanted ones; the others stand in an :class:`IdleLine`. A new policy is a row in ``POLICIES``.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum


class Tier(Enum):
    """Where a version is. ``LEGAL_MOVES`` says what may follow what."""

    #: Only its source exists; it has to be read before anything else.
    DISK = "disk"
    #: A reader thread is at work; it holds a place in host memory already.
    READING = "reading"
    #: Packed in host memory, ready to be copied.
    HOST = "host"
    #: A copy is planned and not known to be complete; it owns a slot and pages.
    COPYING = "copying"
    #: On the device (and in host memory). Sequences may run.
    DEVICE = "device"
    #: It could not be read again. It holds nothing; new bytes bring it back, or another try.
    FAILED = "failed"


# A version that somebody loads arrives the same way as one that was read: through READING.
LEGAL_MOVES: dict[Tier, frozenset[Tier]] = {
    Tier.DISK: frozenset({Tier.READING}),
    Tier.READING: frozenset({Tier.HOST, Tier.FAILED}),
    Tier.HOST: frozenset({Tier.COPYING, Tier.DISK}),
    Tier.COPYING: frozenset({Tier.DEVICE, Tier.HOST}),
    Tier.DEVICE: frozenset({Tier.HOST}),
    Tier.FAILED: frozenset({Tier.READING, Tier.DISK}),
}

#: Tiers that take a place in host memory: what is on the device is in host memory, too.
IN_HOST_MEMORY = frozenset({Tier.READING, Tier.HOST, Tier.COPYING, Tier.DEVICE})
#: Those of them that a version may leave at once: nothing of it is being read or copied.
IN_REACH = frozenset({Tier.HOST, Tier.DEVICE})


@dataclass(slots=True, eq=False)
class Resident:
    """One version, as ``adapters/residency.py`` knows it.

    Attributes:
        page_classes: class of each of its rank pages, in the order of ``HostAdapter.pages``.
        needs: how many these are of each class.
        pages: offsets of its rank pages; empty unless it owns a slot.
        spread: how many of these lie in which slab.
        uses: sequences that run with it, counting those whose last step is not committed.
        last_use: clock of its arrival in a tier, or of the newest admission or release if that is later.
        since: clock of its arrival on the device.
        host_since: clock of its arrival in host memory.
        removed: taken out by ``remove``; forgotten when nobody uses it and no copy of it is on its way.
        reason: why it is ``FAILED``.
        refused_at: value of ``Ledger.num_changes`` when there was no room for it; no use in asking again before that moves.
        num_failures: copies that failed since the last one that did not.
        retry_at: when a pin whose copy failed is placed again, in seconds of ``Residency``'s clock.
    """

    version: int
    page_classes: tuple[int, ...] = ()
    pinned: bool = False
    needs: Mapping[int, int] = field(default_factory=dict[int, int])
    tier: Tier = Tier.DISK
    slot: int = 0
    pages: tuple[int, ...] = ()
    spread: Mapping[int, int] = field(default_factory=dict[int, int])
    uses: int = 0
    last_use: int = 0
    since: int = 0
    host_since: int = 0
    removed: bool = False
    reason: str | None = None
    refused_at: int = -1
    num_failures: int = 0
    retry_at: float = 0.0

    def enter(self, tier: Tier) -> None:
        if tier not in LEGAL_MOVES[self.tier]:
            raise ValueError(
                f"version {self.version}: {self.tier.value} -> {tier.value} is not legal"
            )
        self.tier = tier

    @property
    def is_idle(self) -> bool:
        """True if it may be moved down: nobody uses it, nothing of it is on its way, and it is not pinned."""
        return self.tier in IN_REACH and self.uses == 0 and not self.pinned


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


#: Place in the queue's order of what does not wait in line: a pin, or an adapter that is being loaded.
FIRST = -1


class Ledger:
    """What both tiers look at, and who may leave them.

    Whoever changes an entry says so: :meth:`move` for its tier, :meth:`note` for its users, its pin and its times. So
    nobody ever walks over all entries.

    Attributes:
        wanted: version -> its place in the order in which the queue wants adapters.
        clock: moves with each use.
        num_changes: moves whenever a refusal may have become wrong.
        num_in: tier -> entries there, those that are removed not counted.
        moved: versions whose tier has changed since somebody took note of them.

    Args:
        policy: a key of ``POLICIES``.
    """

    def __init__(self, policy: str) -> None:
        self._age = POLICIES[policy]
        self.entries: dict[int, Resident] = {}
        self.wanted: dict[int, int] = {}
        self.clock = 0
        self.num_changes = 0
        self.num_in: Counter[Tier] = Counter()
        self.moved: set[int] = set()
        # Versions that may be evicted and that the queue does not want.
        self._leaving_host = IdleLine()
        self._leaving_device = IdleLine()

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def add(self, version: int) -> Resident:
        """A new entry, on disk."""
        entry = self.entries[version] = Resident(version)
        self.num_in[entry.tier] += 1
        return entry

    def move(self, entry: Resident, tier: Tier) -> None:
        """An entry changes its tier; ValueError if that is not legal."""
        before = entry.tier
        entry.enter(tier)
        if not entry.removed:
            self.num_in[before] -= 1
            self.num_in[tier] += 1
            self.moved.add(entry.version)
        self.note(entry)

    def take_moved(self) -> list[int]:
        """Versions whose tier has changed since the last call, in no order; some may be gone."""
        moved, self.moved = list(self.moved), set()
        return moved

    def set_removed(self, entry: Resident, *, removed: bool) -> None:
        if entry.removed != removed:
            entry.removed = removed
            self.num_in[entry.tier] += -1 if removed else 1
            self.note(entry)

    def note(self, entry: Resident) -> None:
        """Whether an entry may leave, or in whose stead, may have changed."""
        version = entry.version
        if not self._may_leave(entry) or version in self.wanted:
            self._leaving_host.discard(version)
            self._leaving_device.discard(version)
            return
        self._leaving_host.put(version, self._age(entry.last_use, entry.host_since))
        if entry.tier is Tier.DEVICE:
            self._leaving_device.put(version, self._age(entry.last_use, entry.since))
        else:
            self._leaving_device.discard(version)

    def want(self, versions: Iterable[int]) -> None:
        """The queue wants these, in this order."""
        wanted = {version: place for place, version in enumerate(versions)}
        if wanted == self.wanted:
            return
        changed = wanted.keys() ^ self.wanted.keys()
        self.wanted = wanted
        self.num_changes += 1
        for version in changed:
            entry = self.entries.get(version)
            if entry is not None:
                self.note(entry)

    def place(self, entry: Resident) -> int:
        """Where ``entry`` stands in line; whoever the queue does not name stands behind all others."""
        return FIRST if entry.pinned else self.wanted.get(entry.version, len(self.wanted))

    def leaving_host(self, place: int) -> Iterator[Resident]:
        """Who may leave host memory, and the device if need be, for one that stands at ``place``; the first goes first.

        The ledger must not change while this is read.
        """
        yield from self._leaving(self._leaving_host, IN_REACH, place)

    def leaving_device(self, place: int) -> Iterator[Resident]:
        """Who may leave the device for one that stands at ``place``, like ``leaving_host``."""
        yield from self._leaving(self._leaving_device, frozenset({Tier.DEVICE}), place)

    def check_integrity(self) -> None:
        """Recount.

        Raises:
            AssertionError: a count is wrong, or somebody stands in the wrong line.
        """
        present = [entry for entry in self.entries.values() if not entry.removed]
        if +self.num_in != Counter(entry.tier for entry in present):
            raise AssertionError(f"entries counted by tier: {self.num_in}")
        idle = [e for e in present if e.is_idle and e.version not in self.wanted]
        for line, there in (
            (self._leaving_host, {e.version: self._age(e.last_use, e.host_since) for e in idle}),
            (
                self._leaving_device,
                {e.version: self._age(e.last_use, e.since) for e in idle if e.tier is Tier.DEVICE},
            ),
        ):
            if list(line) != sorted(there, key=lambda version: (there[version], version)):
                raise AssertionError(f"{list(line)} stand in line, of {there}")

    def _leaving(self, line: IdleLine, tiers: frozenset[Tier], place: int) -> Iterator[Resident]:
        for version in line:
            yield self.entries[version]
        for version, wanted_at in reversed(self.wanted.items()):
            if wanted_at <= place:
                return
            entry = self.entries.get(version)
            if entry is not None and self._may_leave(entry) and entry.tier in tiers:
                yield entry

    @staticmethod
    def _may_leave(entry: Resident) -> bool:
        return entry.is_idle and not entry.removed
