"""Slots and rank pages of the device: which versions have them, and which are evicted to make room.

Half-open life of a slot and its pages: from ``place`` (the copy is written into the next plan) until ``vacate``. In
between nobody else gets them. ``vacate`` happens only when no sequence uses the version and no copy of it is on its
way; a sequence counts as a user until the last step that computes with it is committed, so pages are never overwritten
under a running step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lorikeet.adapters.rank_pages import RankPageAllocator, Trial
from lorikeet.adapters.tiers import Ledger, Resident, Tier
from lorikeet.core.plan import PageCopy
from lorikeet.errors import AdapterError

# Copies ahead of need that may be on their way at a time: an urgent one stands behind no more than these.
_MAX_COPIES_AHEAD = 2


class DeviceTier:
    """Who owns which slot and which pages.

    Attributes:
        placed: versions that own a slot.
        freed_slots, copies: decided since the last plan took them.
        num_copying: copies that are decided or on their way.
        num_evictions: versions that had to leave for others, since the start.
    """

    def __init__(self, ledger: Ledger, allocator: RankPageAllocator, num_slots: int) -> None:
        self._ledger = ledger
        self._allocator = allocator
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, 0, -1))
        self.placed: dict[int, Resident] = {}
        self.freed_slots: list[int] = []
        self.copies: list[PageCopy] = []
        self.num_copying = 0
        self.num_evictions = 0

    def check_size(self, page_classes: Sequence[int], num_adapters: int) -> None:
        """Refuse an adapter that would not fit beside as many pinned ones of its size as there may be."""
        for page_class, count in Counter(page_classes).items():
            room = self._allocator.guaranteed_pages(page_class)
            if count * num_adapters > room:
                raise AdapterError(
                    f"the adapter needs {count} rank pages of class {page_class}; the device pool guarantees "
                    f"{room} for {num_adapters} adapters"
                )

    def place(self, entry: Resident) -> bool:
        """HOST -> COPYING: give a version slot and pages, and plan its copy. False if there is no room."""
        if entry.refused_at == self._ledger.num_changes:
            return False
        victims = self._victims_for(entry)
        if victims is None:
            entry.refused_at = self._ledger.num_changes
            return False
        for victim in victims:
            self.evict(victim)
        pages = self._allocator.alloc(entry.page_classes)
        if pages is None:
            raise AssertionError(f"version {entry.version} does not fit where it was said to")
        entry.slot, entry.pages = self._free_slots.pop(), tuple(pages)
        entry.spread = self._allocator.spread(pages)
        entry.since = entry.last_use = self._ledger.tick()
        self._ledger.move(entry, Tier.COPYING)
        self.placed[entry.version] = entry
        self.num_copying += 1
        self.copies.append(PageCopy(version=entry.version, slot=entry.slot, page_ids=pages))
        return True

    def copy_ahead(self) -> None:
        """Place what the queue wants, in its order, until there is no room for the next."""
        for version in self._ledger.wanted:
            if self.num_copying >= _MAX_COPIES_AHEAD:
                return
            entry = self._ledger.entries.get(version)
            if entry is None or entry.removed or entry.tier is not Tier.HOST:
                continue
            if not self.place(entry):
                return

    def end_copy(self, entry: Resident, *, ok: bool) -> None:
        """COPYING -> DEVICE, or back to HOST with its room given up."""
        self.num_copying -= 1
        if ok:
            self._ledger.move(entry, Tier.DEVICE)
            self._ledger.num_changes += 1
        else:
            self._give_back(entry)

    def evict(self, entry: Resident) -> None:
        """DEVICE -> HOST for the sake of another version."""
        self.num_evictions += 1
        self.vacate(entry)

    def vacate(self, entry: Resident) -> None:
        """DEVICE -> HOST: take slot and pages away from a version."""
        if entry.uses or entry.tier is not Tier.DEVICE:
            raise AssertionError(f"version {entry.version} is in use and must not leave its slot")
        self._give_back(entry)

    def check_integrity(self) -> None:
        """Recount slots and pages.

        Raises:
            AssertionError: a slot or page is leaked or shared, or a version owns what it should not.
        """
        slots = sorted([*(entry.slot for entry in self.placed.values()), *self._free_slots])
        if slots != list(range(1, self._num_slots)):
            raise AssertionError(f"slots in use and free: {slots}, of {self._num_slots}")
        self._allocator.check_integrity(
            page for entry in self.placed.values() for page in entry.pages
        )
        num_copying = sum(entry.tier is Tier.COPYING for entry in self.placed.values())
        if num_copying != self.num_copying:
            raise AssertionError(f"{self.num_copying} copies counted, {num_copying} found")
        for entry in self._ledger.entries.values():
            is_there = entry.tier in (Tier.COPYING, Tier.DEVICE)
            owns = (bool(entry.slot), len(entry.pages), entry.version in self.placed)
            if owns != (is_there, is_there * len(entry.page_classes), is_there):
                raise AssertionError(
                    f"version {entry.version} is at {entry.tier} with slot {entry.slot}"
                )

    def _give_back(self, entry: Resident) -> None:
        self._allocator.free(entry.pages)
        self._free_slots.append(entry.slot)
        self.freed_slots.append(entry.slot)
        entry.slot, entry.pages, entry.spread = 0, (), {}
        del self.placed[entry.version]
        self._ledger.move(entry, Tier.HOST)
        self._ledger.num_changes += 1

    def _victims_for(self, entry: Resident) -> list[Resident] | None:
        """Versions to evict so that another fits, as few as the policy's order allows; None if evicting all is not enough."""
        trial, ledger = self._allocator.trial(), self._ledger
        if self._free_slots and trial.fits(entry.needs):
            return []
        victims: list[Resident] = []
        for victim in ledger.leaving_device(ledger.place(entry)):
            victims.append(victim)
            trial.free(victim.spread)
            if trial.fits(entry.needs):
                return self._needed(trial, victims, entry)
        return None

    def _needed(self, trial: Trial, victims: list[Resident], entry: Resident) -> list[Resident]:
        """Those of the victims that are really needed: the pages of the first may be of other classes than those asked for."""
        needed = victims[-1:]
        for victim in victims[-2::-1]:
            trial.keep(victim.spread)
            if not trial.fits(entry.needs):
                trial.free(victim.spread)
                needed.append(victim)
        return needed[::-1]
