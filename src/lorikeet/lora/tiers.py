"""Where an adapter version can be, how it moves between there, and what residency remembers about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Tier(Enum):
    """Where a version is. ``LEGAL_MOVES`` says what may follow what."""

    #: Only its files exist; it has to be read before anything else.
    DISK = "disk"
    #: A reader thread is at work; it holds host memory already.
    READING = "reading"
    #: Packed in host memory, ready to be copied.
    HOST = "host"
    #: A copy is planned and not known to be complete; it owns a slot and pages.
    COPYING = "copying"
    #: On the device. Sequences may run.
    DEVICE = "device"


LEGAL_MOVES: dict[Tier, frozenset[Tier]] = {
    Tier.DISK: frozenset({Tier.READING}),
    Tier.READING: frozenset({Tier.HOST, Tier.DISK}),
    Tier.HOST: frozenset({Tier.COPYING, Tier.DISK}),
    Tier.COPYING: frozenset({Tier.DEVICE, Tier.HOST}),
    Tier.DEVICE: frozenset({Tier.HOST}),
}


@dataclass(slots=True, eq=False)
class Resident:
    """One version, as ``lora/residency.py`` knows it.

    Attributes:
        page_classes: class of each of its rank pages, in the order of ``HostAdapter.pages``.
        pages: offsets of its rank pages; empty unless it owns a slot.
        uses: sequences that run with it, counting those whose last step is not committed.
        last_use, since: clock of the newest admission or release, and of the arrival on the device.
        broken: its copy failed; slot and pages are given back when nobody uses it any more.
        removed: taken out by ``remove``; forgotten when nobody uses it any more.
        refused_at: clock of releases when there was no room for it; the answer is the same until that clock moves.
    """

    version: int
    page_classes: tuple[int, ...]
    pinned: bool
    tier: Tier = Tier.HOST
    slot: int = 0
    pages: tuple[int, ...] = ()
    uses: int = 0
    last_use: int = 0
    since: int = 0
    broken: bool = False
    removed: bool = False
    refused_at: int = -1

    def enter(self, tier: Tier) -> None:
        if tier not in LEGAL_MOVES[self.tier]:
            raise ValueError(
                f"version {self.version}: {self.tier.value} -> {tier.value} is not legal"
            )
        self.tier = tier

    @property
    def may_leave(self) -> bool:
        return self.tier is Tier.DEVICE and not self.pinned and self.uses == 0
