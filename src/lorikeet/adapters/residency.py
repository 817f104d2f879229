"""Where each adapter version is, and what should move: decisions only, others read and copy.

::

    DISK --take_reads--> READING --read_done--> HOST --admit, prefetch, pin--> COPYING --copies_done--> DEVICE
      ^                     |                    | ^                             |                        |
      +-----eviction--------|--------------------+ +--------copy failed----------+--------eviction--------+
                            +--read_failed--> FAILED --retry--> DISK

A version is usable on the device only. What is on the device is in host memory, too. Both tiers keep to the queue's
order (``Ledger.want``): a version makes room only for one that is wanted before it, so what was fetched for a request stays
until that request ran.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum

from lorikeet.adapters.device_tier import DeviceTier
from lorikeet.adapters.host_tier import MAX_READS, HostTier
from lorikeet.adapters.layout import PoolLayout
from lorikeet.adapters.rank_pages import RankPageAllocator
from lorikeet.adapters.tiers import IN_HOST_MEMORY, POLICIES, Ledger, Resident, Tier
from lorikeet.core.plan import PageCopy
from lorikeet.errors import AdapterError

# A pin whose copy failed is placed again after this long, and after twice as long each time that it fails again.
_RETRY_S = 1.0
_MAX_RETRY_S = 60.0


class AdapterAdmission(Enum):
    """Answer to a sequence that wants to run with a version."""

    #: It is on the device: the sequence may run in the step that is being planned.
    READY = "ready"
    #: It is being read or copied, or stands in line for being read, and asks nothing of others. Ask again later.
    WAIT = "wait"
    #: What holds the room on the device or in host memory is in use, pinned or wanted before. Ask again later.
    NO_ROOM = "no room"
    #: It could not be read; ``Residency.failure`` says why.
    FAILED = "failed"


class Residency:
    """Knows where every adapter version is and decides what moves.

    Version 0 is the base model: always ready, in slot 0, and it takes nothing.

    Attributes:
        ledger: who is where, and in what order the queue wants them.
        host, device: the two tiers; what may be asked of them alone is asked there.

    Args:
        num_slots: rows of the device's page tables, slot 0 included.
        policy: ``lru`` or ``fifo``, see ``adapters/tiers.py``.
        max_pinned: at most this many versions may be pinned.
        max_host: at most this many versions are in host memory, those being read included; None means any number.
        max_reads: at most this many versions are being read.
        clock: seconds, for what is tried again after a while.

    Raises:
        ValueError: an unknown policy, no slot besides the base model's, or host memory for pinned versions only.
    """

    def __init__(
        self,
        *,
        allocator: RankPageAllocator,
        num_slots: int,
        policy: str,
        max_pinned: int,
        max_host: int | None = None,
        max_reads: int = MAX_READS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"eviction policy {policy!r}; known: {', '.join(POLICIES)}")
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; slot 0 is needed for the base model")
        if max_host is not None and max_host <= max_pinned:
            raise ValueError(f"max_host is {max_host}; {max_pinned} pinned versions would fill it")
        self._max_pinned = max_pinned
        self.ledger = Ledger(policy)
        self._entries = self.ledger.entries
        self.device = DeviceTier(self.ledger, allocator, num_slots)
        self.host = HostTier(self.ledger, max_host, self.device.evict, max_reads)
        self._clock = clock
        self._num_pinned = 0
        # Pinned versions whose copy was not planned yet, or failed.
        self._unplaced_pins: set[int] = set()

    @classmethod
    def of_pool(
        cls, layout: PoolLayout | None, *, policy: str = "lru", max_host: int | None = None
    ) -> Residency:
        """The residency of a pool with this layout. None is no pool: the base model is all there is."""
        if layout is None:
            return cls(allocator=RankPageAllocator(), num_slots=1, policy=policy, max_pinned=0)
        allocator = RankPageAllocator(
            layout.class_elems, layout.slab_elems, layout.num_slabs, layout.reserved_slabs
        )
        return cls(
            allocator=allocator,
            num_slots=layout.num_slots,
            policy=policy,
            max_pinned=layout.max_loras_per_batch - 1,
            max_host=max_host,
        )

    def __contains__(self, version: int) -> bool:
        entry = self._entries.get(version)
        return version == 0 or (entry is not None and not entry.removed)

    # -- what is there -------------------------------------------------------------------------------------------

    def add(self, version: int, page_classes: Sequence[int], *, pinned: bool = False) -> None:
        """The bytes of a version have come to host memory; it may be admitted.

        One that is on disk, being read or failed may come this way, too; a read that is on its way is then for nothing.

        Args:
            page_classes: class of each of its rank pages.
            pinned: resident from now on; its copy is planned as soon as there is room.

        Raises:
            AdapterError: it can never fit, too many are pinned, or host memory is full of versions that are pinned,
                in use or on their way.
            ValueError: the version is in host memory already.
        """
        entry = self._entries.get(version)
        if (
            entry is not None
            and not entry.removed
            and entry.tier in IN_HOST_MEMORY - {Tier.READING}
        ):
            raise ValueError(f"version {version} is there already")
        if pinned and not (entry is not None and entry.pinned):
            self._check_pin()
        self.device.check_size(page_classes, self._max_pinned + 1)
        if entry is None or not self._is_reading(version):
            self.host.take_place()
        if entry is None:
            entry = self.ledger.add(version)
        self.ledger.set_removed(entry, removed=False)
        self._set_pin(entry, pinned=entry.pinned or pinned)
        if entry.tier in (Tier.DISK, Tier.FAILED):
            self.ledger.move(entry, Tier.READING)
        if entry.tier is Tier.READING:
            self.host.arrive(entry, page_classes)
        self.ledger.num_changes += 1

    def remove(self, version: int) -> None:
        """A version is unloaded. What it holds on the device is freed once nobody uses it and no copy is on its way.

        Its bytes are the caller's to drop; ``host.take_drops`` does not name it. A copy that is on its way needs a
        reference of its own.

        Raises:
            ValueError: the version is not there.
        """
        entry = self._find(version)
        self.host.forget(entry)
        self._set_pin(entry, pinned=False)
        self.ledger.set_removed(entry, removed=True)
        self.ledger.num_changes += 1
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
        self._set_pin(entry, pinned=pinned)
        self.ledger.num_changes += 1

    def failure(self, version: int) -> str | None:
        """Why a version is FAILED; None if it is not, or not there."""
        entry = self._entries.get(version)
        return entry.reason if entry is not None and not entry.removed else None

    def tier(self, version: int) -> Tier:
        return self._find(version).tier

    def is_resident(self, version: int) -> bool:
        """True if a sequence may run with the version now."""
        return version == 0 or self._find(version).tier is Tier.DEVICE

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

    def num_uses(self, version: int) -> int:
        entry = self._entries.get(version)
        return entry.uses if entry is not None else 0

    def usable(self) -> list[int]:
        """Versions on the device whose copies are complete."""
        return [v for v, entry in self.device.placed.items() if entry.tier is Tier.DEVICE]

    @property
    def has_copies_in_flight(self) -> bool:
        """True if copies are decided or on their way: steps are needed to learn of their end."""
        return self.device.num_copying > 0

    # -- use -----------------------------------------------------------------------------------------------------

    def admit(self, version: int) -> AdapterAdmission:
        """Ask for a version for one more sequence; starts its read or its copy if there is room.

        READY counts as one use, to be undone by ``release``.

        Raises:
            ValueError: the version is not there.
        """
        if version == 0:
            return AdapterAdmission.READY
        entry = self._find(version)
        if entry.tier is Tier.DEVICE:
            entry.uses += 1
            entry.last_use = self.ledger.tick()
            self.ledger.note(entry)
            return AdapterAdmission.READY
        if entry.tier is Tier.FAILED:
            return AdapterAdmission.FAILED
        if entry.tier is Tier.DISK and self.host.num_free_reads <= 0:
            return AdapterAdmission.WAIT
        if entry.tier is Tier.DISK and not self.host.start_read(entry):
            return AdapterAdmission.NO_ROOM
        if entry.tier is Tier.HOST and not self.device.place(entry):
            return AdapterAdmission.NO_ROOM
        return AdapterAdmission.WAIT

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
        entry.last_use = self.ledger.tick()
        self.ledger.note(entry)
        if entry.uses == 0:
            self.ledger.num_changes += 1
            self._settle(entry)

    @property
    def has_decisions(self) -> bool:
        """True if the next plan has something to move, even if nothing is computed."""
        return bool(self.device.freed_slots or self.device.copies)

    @property
    def has_unplaced_pins(self) -> bool:
        return bool(self._unplaced_pins)

    def take_decisions(self) -> tuple[list[int], list[PageCopy]]:
        """Slots freed and copies decided since the last call, for the plan that is being made.

        Pinned versions are placed first, then what the queue wants is read and copied ahead.
        """
        self._place_pins()
        # Reads first: a copy ahead would hold on to a place in host memory that one wanted earlier needs.
        self.host.read_ahead([*sorted(self._unplaced_pins), *self.ledger.wanted])
        self.device.copy_ahead()
        device = self.device
        decisions = (device.freed_slots, device.copies)
        device.freed_slots, device.copies = [], []
        return decisions

    def copies_done(self, copied: Iterable[int], failed: Mapping[int, str] | Iterable[int]) -> None:
        """Copies are complete, or failed and give their room back. They may have been decided any number of steps ago.

        Raises:
            ValueError: no copy of that version was on its way.
        """
        for version in copied:
            self._end_copy(version, ok=True)
        for version in failed:
            self._end_copy(version, ok=False)

    # -- host memory ---------------------------------------------------------------------------------------------

    def take_reads(self) -> list[int]:
        """Versions to read now, as decided by ``admit`` and ``take_decisions``, in the queue's order.

        Each is answered by ``read_done`` or ``read_failed``. Carry out the drops first: they make the room for these.
        """
        reads, self.host.reads = self.host.reads, []
        return [version for version in reads if self._is_reading(version)]

    def read_done(self, version: int, page_classes: Sequence[int]) -> bool:
        """READING -> HOST.

        Returns:
            False if the bytes are not wanted any more: the version was removed, or came by ``add`` meanwhile.
        """
        if not self._is_reading(version):
            return False
        entry = self._entries[version]
        self.host.arrive(entry, page_classes)
        if entry.pinned:
            self._unplaced_pins.add(version)
        self.ledger.num_changes += 1
        return True

    def read_failed(self, version: int, reason: str) -> bool:
        """READING -> FAILED; the scheduler ends the sequences that wait for it.

        Returns:
            False if nobody cares any more, as for ``read_done``.
        """
        if not self._is_reading(version):
            return False
        self._unplaced_pins.discard(version)
        self.host.fail(self._entries[version], reason)
        return True

    def retry(self, version: int) -> None:
        """FAILED -> DISK: whatever was in the way of reading it may have gone.

        Raises:
            ValueError: the version is not there, or has not failed.
        """
        entry = self._find(version)
        if entry.tier is not Tier.FAILED:
            raise ValueError(f"version {version} has not failed: {entry.tier.value}")
        self.ledger.move(entry, Tier.DISK)
        entry.reason = None
        if entry.pinned:
            self._unplaced_pins.add(version)
        self.ledger.num_changes += 1

    @property
    def num_free_reads(self) -> int:
        """How many more versions may be read at this moment, if there is room for them."""
        return self.host.num_free_reads

    def take_ended_reads(self) -> list[int]:
        """Versions that are not being read any more, whatever came of it, since the last call."""
        ended, self.host.ended = list(self.host.ended), {}
        return ended

    def check_integrity(self) -> None:
        """Recount both tiers.

        Raises:
            AssertionError: a slot, page or place is leaked or shared, or a version is in an impossible state.
        """
        self.device.check_integrity()
        self.host.check_integrity()
        self.ledger.check_integrity()
        pinned = {entry.version for entry in self._entries.values() if entry.pinned}
        if len(pinned) != self._num_pinned or not self._unplaced_pins <= pinned:
            raise AssertionError(
                f"{self._num_pinned} pins counted, {self._unplaced_pins} not placed, of {pinned}"
            )
        for entry in self._entries.values():
            if entry.uses and entry.tier is not Tier.DEVICE:
                raise AssertionError(f"version {entry.version} is in use and not on the device")
            if entry.removed and not entry.uses and entry.tier is not Tier.COPYING:
                raise AssertionError(f"version {entry.version} should have given its room back")
            if (entry.reason is not None) != (entry.tier is Tier.FAILED):
                raise AssertionError(f"version {entry.version} is {entry.tier}: {entry.reason}")

    # -- inside --------------------------------------------------------------------------------------------------

    def _find(self, version: int) -> Resident:
        entry = self._entries.get(version)
        if entry is None or entry.removed:
            raise ValueError(f"version {version} is not in host memory and was not there before")
        return entry

    def _is_reading(self, version: int) -> bool:
        entry = self._entries.get(version)
        return entry is not None and not entry.removed and entry.tier is Tier.READING

    def _set_pin(self, entry: Resident, *, pinned: bool) -> None:
        """Pin or unpin; a pin is placed with the next plan, if it is not placed already."""
        self._num_pinned += pinned - entry.pinned
        entry.pinned = pinned
        if pinned:
            self._unplaced_pins.add(entry.version)
        else:
            self._unplaced_pins.discard(entry.version)
        self.ledger.note(entry)

    def _check_pin(self) -> None:
        if self._num_pinned >= self._max_pinned:
            raise AdapterError(
                f"cannot pin another adapter: {self._num_pinned} are pinned and {self._max_pinned} is the most "
                "(max_loras_per_batch - 1), or the others face starvation"
            )

    def _place_pins(self) -> None:
        for version in sorted(self._unplaced_pins):
            entry = self._entries[version]
            if entry.tier is Tier.HOST and entry.retry_at <= self._clock():
                self.device.place(entry)
            if entry.tier in (Tier.COPYING, Tier.DEVICE):
                self._unplaced_pins.discard(version)

    def _end_copy(self, version: int, *, ok: bool) -> None:
        entry = self._entries.get(version)
        if entry is None or entry.tier is not Tier.COPYING:
            raise ValueError(f"no copy of version {version} is on its way")
        self.device.end_copy(entry, ok=ok)
        if ok:
            entry.num_failures = 0
        elif entry.pinned:
            delay = min(_MAX_RETRY_S, _RETRY_S * 2 ** min(entry.num_failures, 8))
            entry.num_failures += 1
            entry.retry_at = self._clock() + delay
            self._unplaced_pins.add(version)
        self._settle(entry)

    def _settle(self, entry: Resident) -> None:
        """Free what a removed version holds, once nobody uses it and no copy of it is on its way."""
        if not entry.removed or entry.uses or entry.tier is Tier.COPYING:
            return
        if entry.tier is Tier.DEVICE:
            self.device.vacate(entry)
        del self._entries[entry.version]
