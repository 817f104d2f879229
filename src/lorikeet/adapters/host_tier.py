"""How many versions host memory holds, and which are evicted to make room. The bytes lie in ``lora/host_memory.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from lorikeet.adapters.tiers import FIRST, IN_HOST_MEMORY, Ledger, Resident, Tier
from lorikeet.errors import AdapterError

# Reads on their way at a time. More would not be faster, since only some are at work, but each takes a place from an
# adapter that is there.
MAX_READS = 64


class HostTier:
    """Counts the versions in host memory against their limit.

    Args:
        max_host: versions at a time, those being read included; None means any number.
        leave_device: takes slot and pages away from an idle version, since what is on the device is here, too.
        max_reads: versions that are read at a time, at most.

    Attributes:
        drops: versions that left since the caller asked last, in order; their bytes are not needed any more.
        reads: decided since the caller asked last, in order.
        failures: why reads failed, since the scheduler asked last.
        ended: versions that are not being read any more, since the scheduler asked last.
    """

    def __init__(
        self,
        ledger: Ledger,
        max_host: int | None,
        leave_device: Callable[[Resident], None],
        max_reads: int = MAX_READS,
    ) -> None:
        self._ledger = ledger
        self._max_host = max_host
        self._leave_device = leave_device
        self._max_reads = max_reads
        self._num_held = 0
        self.drops: dict[int, None] = {}
        self.reads: list[int] = []
        self.failures: dict[int, str] = {}
        self.ended: dict[int, None] = {}

    @property
    def num_free_reads(self) -> int:
        """How many more may be read at this moment, if there is room for them."""
        return self._max_reads - self._ledger.num_in[Tier.READING]

    def take_place(self) -> None:
        """Make room for a version that is being loaded, whoever is wanted.

        Raises:
            AdapterError: everything in host memory is pinned, in use or on its way.
        """
        if not self._make_room(FIRST):
            raise AdapterError(
                "host memory is full: every adapter there is pinned, in use or on its way, and --max-loaded-loras "
                "allows no more"
            )
        self._num_held += 1

    def start_read(self, entry: Resident) -> bool:
        """DISK -> READING. False if there is no room."""
        if not self._make_room(self._ledger.place(entry)):
            return False
        self._num_held += 1
        self._ledger.move(entry, Tier.READING)
        self.reads.append(entry.version)
        return True

    def read_ahead(self, versions: Iterable[int]) -> None:
        """Start reads of those that are on disk, in this order, until there is no room for the next, or enough are read."""
        for version in versions:
            entry = self._ledger.entries.get(version)
            if entry is None or entry.removed or entry.tier is not Tier.DISK:
                continue
            if self.num_free_reads <= 0 or not self.start_read(entry):
                return

    def arrive(self, entry: Resident, page_classes: Sequence[int]) -> None:
        """READING -> HOST."""
        # It may have been evicted without its bytes having been dropped: now they must not be.
        self.drops.pop(entry.version, None)
        entry.page_classes, entry.needs = tuple(page_classes), Counter(page_classes)
        entry.reason = None
        entry.host_since = entry.last_use = self._ledger.tick()
        self._ledger.move(entry, Tier.HOST)
        self.ended[entry.version] = None

    def fail(self, entry: Resident, reason: str) -> None:
        """READING -> FAILED."""
        self._ledger.move(entry, Tier.FAILED)
        self.ended[entry.version] = None
        entry.reason = self.failures[entry.version] = reason
        self._give_place()

    def forget(self, entry: Resident) -> None:
        """A version is removed; its bytes are the caller's to drop."""
        self.failures.pop(entry.version, None)
        self.drops.pop(entry.version, None)
        self.ended[entry.version] = None
        if entry.tier in IN_HOST_MEMORY:
            self._give_place()

    def take_drops(self) -> list[int]:
        """Versions that were evicted since the last call; their bytes are to be dropped."""
        drops, self.drops = list(self.drops), {}
        return drops

    def take_failures(self) -> dict[int, str]:
        """Versions that became FAILED since the last call, and why."""
        failures, self.failures = self.failures, {}
        return failures

    def check_integrity(self) -> None:
        """Check the number of versions in host memory.

        Raises:
            AssertionError: the count is wrong or above the limit.
        """
        held = sum(
            entry.tier in IN_HOST_MEMORY and not entry.removed
            for entry in self._ledger.entries.values()
        )
        if held != self._num_held:
            raise AssertionError(f"{self._num_held} versions counted in host memory, {held} found")
        if self._max_host is not None and held > self._max_host:
            raise AssertionError(f"{held} versions in host memory, at most {self._max_host} may be")

    def _make_room(self, place: int) -> bool:
        """Let an idle version go if there is no free place; it stands behind ``place`` in the queue's order."""
        if self._max_host is None or self._num_held < self._max_host:
            return True
        victim = next(self._ledger.leaving_host(place), None)
        if victim is None:
            return False
        if victim.tier is Tier.DEVICE:
            self._leave_device(victim)
        self._ledger.move(victim, Tier.DISK)
        self.drops[victim.version] = None
        self._give_place()
        return True

    def _give_place(self) -> None:
        self._num_held -= 1
        self._ledger.num_changes += 1
