"""Where each adapter version is, and what should move: decisions only, the pool performs them.

Half-open life of a slot and its pages: from ``_place`` (the copy is written into the next plan) until ``_vacate``. In
between nobody else gets them. ``_vacate`` happens only when no sequence uses the version and no copy of it is on its
way; a sequence counts as a user until the last step that computes with it is committed, so pages are never overwritten
under a running step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

from lorikeet.core.plan import PageCopy
from lorikeet.errors import AdapterError
from lorikeet.lora.eviction import POLICIES, Candidate, eviction_order
from lorikeet.lora.rank_pages import RankPageAllocator
from lorikeet.lora.tiers import Resident, Tier


class Admission(Enum):
    """Answer to a sequence that wants to run with a version."""

    #: It may run in the step that is being planned: resident, or copied before that step computes.
    READY = "ready"
    #: Not now: what holds the room is in use or pinned. Ask again after something was released.
    NO_ROOM = "no room"


class Residency:
    """Slots and rank pages of the device tier.

    Version 0 is the base model: always ready, in slot 0, and it takes nothing.

    Args:
        num_slots: rows of the device's page tables, slot 0 included.
        policy: ``lru`` or ``fifo``, see ``lora/eviction.py``.
        max_pinned: at most this many versions may be pinned.

    Raises:
        ValueError: an unknown policy, or no slot besides the base model's.
    """

    def __init__(
        self, *, allocator: RankPageAllocator, num_slots: int, policy: str, max_pinned: int
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"eviction policy {policy!r}; known: {', '.join(POLICIES)}")
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; slot 0 is needed for the base model")
        self._allocator = allocator
        self._num_slots = num_slots
        self._policy = policy
        self._max_pinned = max_pinned
        self._entries: dict[int, Resident] = {}
        self._free_slots = list(range(num_slots - 1, 0, -1))
        self._wanted: dict[int, int] = {}
        # Pinned versions whose copy was not planned yet.
        self._unplaced_pins: set[int] = set()
        self._clock = 0
        # Moves whenever room may have appeared; see Resident.refused_at.
        self._room_clock = 0
        self._freed_slots: list[int] = []
        self._copies: list[PageCopy] = []

    def __contains__(self, version: int) -> bool:
        entry = self._entries.get(version)
        return version == 0 or (entry is not None and not entry.removed)

    def add(self, version: int, page_classes: Sequence[int], *, pinned: bool = False) -> None:
        """A version is in host memory now and may be admitted.

        Args:
            page_classes: class of each of its rank pages.
            pinned: resident from now on; its copy is planned as soon as there is room.

        Raises:
            AdapterError: it can never fit, or too many are pinned.
            ValueError: the version is there already.
        """
        if version in self:
            raise ValueError(f"version {version} is there already")
        if pinned:
            self._check_pin()
        self._check_size(page_classes)
        entry = self._entries.get(version)
        if entry is None:
            entry = Resident(version, tuple(page_classes), pinned)
            self._entries[version] = entry
        else:
            # The same content comes back while sequences still run with it: as if it had never left.
            entry.removed, entry.pinned = False, pinned
        if pinned:
            self._unplaced_pins.add(version)
        self._room_clock += 1

    def remove(self, version: int) -> None:
        """A version leaves host memory for good. What it holds on the device is freed once nobody uses it.

        Raises:
            ValueError: the version is not there.
        """
        entry = self._find(version)
        entry.removed, entry.pinned = True, False
        self._unplaced_pins.discard(version)
        self._room_clock += 1
        self._settle(entry)

    def set_pinned(self, version: int, *, pinned: bool) -> None:
        """Pin or unpin a version.

        Raises:
            AdapterError: too many would be pinned.
            ValueError: the version is not there.
        """
        entry = self._find(version)
        if pinned and not entry.pinned:
            self._check_pin()
        entry.pinned = pinned
        if pinned:
            self._unplaced_pins.add(version)
        else:
            self._unplaced_pins.discard(version)
        self._room_clock += 1

    def admit(self, version: int) -> Admission:
        """Ask for a version for one more sequence. READY counts as one use, to be undone by ``release``.

        Raises:
            ValueError: the version is not there.
        """
        if version == 0:
            return Admission.READY
        entry = self._find(version)
        if entry.broken or not self._is_placed(entry):
            return Admission.NO_ROOM
        entry.uses += 1
        self._clock += 1
        entry.last_use = self._clock
        return Admission.READY

    def release(self, version: int) -> None:
        """One sequence less uses a version.

        Raises:
            ValueError: nobody uses it.
        """
        if version == 0:
            return
        entry = self._entries.get(version)
        if entry is None or entry.uses == 0:
            raise ValueError(f"version {version} is not in use")
        entry.uses -= 1
        self._clock += 1
        entry.last_use = self._clock
        if entry.uses == 0:
            self._room_clock += 1
            self._settle(entry)

    def slot(self, version: int) -> int:
        """Device slot of a version that was admitted; 0 for the base model.

        Raises:
            ValueError: the version has no slot.
        """
        if version == 0:
            return 0
        entry = self._entries.get(version)
        if entry is None or entry.slot == 0:
            raise ValueError(f"version {version} has no slot")
        return entry.slot

    def is_resident(self, version: int) -> bool:
        """True if admitting the version moves nothing."""
        return version == 0 or self._find(version).slot != 0

    def tier(self, version: int) -> Tier:
        return self._find(version).tier

    def want(self, versions: Iterable[int]) -> None:
        """Say which versions the queue wants, in its order; eviction avoids them, the last ones least."""
        self._wanted = {version: place for place, version in enumerate(versions)}

    @property
    def has_decisions(self) -> bool:
        """True if the next plan may have something to move, even if nothing is computed."""
        return bool(self._freed_slots or self._copies or self._unplaced_pins)

    def take_decisions(self) -> tuple[list[int], list[PageCopy]]:
        """Slots freed and copies decided since the last call, for the plan that is being made."""
        for version in sorted(self._unplaced_pins):
            # A pin whose copy fails later is not tried again until a request asks for it.
            if self._is_placed(self._entries[version]):
                self._unplaced_pins.discard(version)
        decisions = (self._freed_slots, self._copies)
        self._freed_slots, self._copies = [], []
        return decisions

    def copies_done(self, copied: Iterable[int], failed: Mapping[int, str] | Iterable[int]) -> None:
        """A step is committed: its copies are complete, or failed and give their room back.

        Raises:
            ValueError: no copy of that version was on its way.
        """
        for version in copied:
            entry = self._copying(version)
            entry.enter(Tier.DEVICE)
            self._settle(entry)
        for version in failed:
            entry = self._copying(version)
            entry.enter(Tier.HOST)
            entry.broken = True
            self._settle(entry)
        self._room_clock += 1

    def num_uses(self, version: int) -> int:
        entry = self._entries.get(version)
        return entry.uses if entry is not None else 0

    def resident(self) -> list[int]:
        """Versions that own a slot."""
        return [entry.version for entry in self._entries.values() if entry.slot]

    def check_integrity(self) -> None:
        """Recount slots and pages.

        Raises:
            AssertionError: a slot or page is leaked or shared, or a version is in an impossible state.
        """
        owners = [entry for entry in self._entries.values() if entry.slot]
        slots = sorted([*(entry.slot for entry in owners), *self._free_slots])
        if slots != list(range(1, self._num_slots)):
            raise AssertionError(f"slots in use and free: {slots}, of {self._num_slots}")
        self._allocator.check_integrity(page for entry in owners for page in entry.pages)
        for entry in self._entries.values():
            is_there = entry.tier in (Tier.COPYING, Tier.DEVICE) or entry.broken
            if is_there != bool(entry.slot) or len(entry.pages) != is_there * len(
                entry.page_classes
            ):
                raise AssertionError(
                    f"version {entry.version} is at {entry.tier} with slot {entry.slot}"
                )
            if entry.uses and not entry.slot:
                raise AssertionError(f"version {entry.version} is in use and not on the device")
            idle = entry.uses == 0 and entry.tier is not Tier.COPYING
            if idle and (entry.broken or entry.removed):
                raise AssertionError(f"version {entry.version} should have given its room back")

    def _find(self, version: int) -> Resident:
        entry = self._entries.get(version)
        if entry is None or entry.removed:
            raise ValueError(f"version {version} is not in host memory")
        return entry

    def _copying(self, version: int) -> Resident:
        entry = self._entries.get(version)
        if entry is None or entry.tier is not Tier.COPYING:
            raise ValueError(f"no copy of version {version} is on its way")
        return entry

    def _check_pin(self) -> None:
        num_pinned = sum(entry.pinned for entry in self._entries.values())
        if num_pinned >= self._max_pinned:
            raise AdapterError(
                f"cannot pin another adapter: {num_pinned} are pinned and {self._max_pinned} is the most "
                "(max_loras_per_batch - 1), or the others face starvation"
            )

    def _check_size(self, page_classes: Sequence[int]) -> None:
        """Refuse what would not fit beside as many pinned versions of the same size as there may be."""
        for page_class, count in Counter(page_classes).items():
            room = self._allocator.guaranteed_pages(page_class)
            if count * (self._max_pinned + 1) > room:
                raise AdapterError(
                    f"the adapter needs {count} rank pages of class {page_class}; the device pool guarantees "
                    f"{room} for {self._max_pinned + 1} adapters"
                )

    def _is_placed(self, entry: Resident) -> bool:
        """Give a version its slot and pages if it has none. False if there is no room."""
        if entry.slot:
            return True
        if entry.refused_at == self._room_clock:
            return False
        victims = self._victims_for(entry)
        if victims is None:
            entry.refused_at = self._room_clock
            return False
        for victim in victims:
            self._vacate(victim)
        pages = self._allocator.alloc(entry.page_classes)
        if pages is None:
            raise AssertionError(f"version {entry.version} does not fit where it was said to")
        entry.slot, entry.pages = self._free_slots.pop(), tuple(pages)
        entry.enter(Tier.COPYING)
        self._clock += 1
        entry.since = entry.last_use = self._clock
        self._copies.append(PageCopy(version=entry.version, slot=entry.slot, page_ids=pages))
        return True

    def _victims_for(self, entry: Resident) -> list[Resident] | None:
        """Whom to evict for a version, as few as the policy's order allows; None if all of them are not enough."""
        victims: list[Resident] = []
        if self._has_room(entry, victims):
            return victims
        candidates = [
            Candidate(e.version, e.last_use, e.since, self._wanted.get(e.version))
            for e in self._entries.values()
            if e.may_leave
        ]
        for version in eviction_order(candidates, self._policy):
            victims.append(self._entries[version])
            if self._has_room(entry, victims):
                break
        else:
            return None
        # The first ones may have turned out useless (pages of other classes): whoever can stay, stays.
        for victim in victims[:-1][::-1]:
            others = [other for other in victims if other is not victim]
            if self._has_room(entry, others):
                victims = others
        return victims

    def _has_room(self, entry: Resident, victims: list[Resident]) -> bool:
        if not self._free_slots and not victims:
            return False
        freed = [page for victim in victims for page in victim.pages]
        return self._allocator.fits(entry.page_classes, freed)

    def _settle(self, entry: Resident) -> None:
        """Carry out what waited for the last user to leave."""
        if entry.uses or entry.tier is Tier.COPYING:
            return
        if entry.slot and (entry.broken or entry.removed):
            self._vacate(entry)
        if entry.removed:
            del self._entries[entry.version]

    def _vacate(self, entry: Resident) -> None:
        """Take slot and pages away from a version."""
        if entry.uses or entry.tier is Tier.COPYING:
            raise AssertionError(f"version {entry.version} is in use and must not leave its slot")
        self._allocator.free(entry.pages)
        self._free_slots.append(entry.slot)
        self._freed_slots.append(entry.slot)
        entry.slot, entry.pages, entry.broken = 0, (), False
        if entry.tier is Tier.DEVICE:
            entry.enter(Tier.HOST)
        self._room_clock += 1
