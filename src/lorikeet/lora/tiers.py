"""Where an adapter version can be, how it moves between there, and what residency remembers about it."""

from __future__ import annotations

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


@dataclass(slots=True, eq=False)
class Resident:
    """One version, as ``lora/residency.py`` knows it.

    Attributes:
        page_classes: class of each of its rank pages, in the order of ``HostAdapter.pages``.
        pages: offsets of its rank pages; empty unless it owns a slot.
        uses: sequences that run with it, counting those whose last step is not committed.
        last_use: clock of its arrival in a tier, or of the newest admission or release if that is later.
        since: clock of its arrival on the device.
        host_since: clock of its arrival in host memory.
        removed: taken out by ``remove``; forgotten when nobody uses it and no copy of it is on its way.
        reason: why it is ``FAILED``.
        refused_at: value of ``Ledger.num_changes`` when there was no room for it; no use in asking again before that moves.
    """

    version: int
    page_classes: tuple[int, ...]
    pinned: bool
    tier: Tier = Tier.DISK
    slot: int = 0
    pages: tuple[int, ...] = ()
    uses: int = 0
    last_use: int = 0
    since: int = 0
    host_since: int = 0
    removed: bool = False
    reason: str | None = None
    refused_at: int = -1

    def enter(self, tier: Tier) -> None:
        if tier not in LEGAL_MOVES[self.tier]:
            raise ValueError(
                f"version {self.version}: {self.tier.value} -> {tier.value} is not legal"
            )
        self.tier = tier

    @property
    def is_idle(self) -> bool:
        """True if it may be moved down: nobody uses it, nothing of it is on its way, and it is not pinned."""
        return self.tier in (Tier.HOST, Tier.DEVICE) and self.uses == 0 and not self.pinned


#: Place in the queue's order of what does not wait in line: a pin, or an adapter that is being loaded.
FIRST = -1


@dataclass(slots=True)
class Ledger:
    """What both tiers look at.

    Attributes:
        policy: a key of ``eviction.POLICIES``.
        wanted: version -> its place in the order in which the queue wants adapters.
        clock: moves with each use.
        num_changes: moves whenever a refusal may have become wrong.
    """

    policy: str
    entries: dict[int, Resident] = field(default_factory=dict[int, Resident])
    wanted: dict[int, int] = field(default_factory=dict[int, int])
    clock: int = 0
    num_changes: int = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def place(self, entry: Resident) -> int:
        """Where ``entry`` stands in line; whoever the queue does not name stands behind all others."""
        return FIRST if entry.pinned else self.wanted.get(entry.version, len(self.wanted))

    def may_make_room(self, entry: Resident, place: int) -> bool:
        """True if ``entry`` may be moved down for one that stands at ``place``."""
        return entry.is_idle and self.wanted.get(entry.version, place + 1) > place
