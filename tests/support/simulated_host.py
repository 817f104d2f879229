"""Host memory and disk of a simulated engine: reads that take time and fail, drops, loads."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lorikeet.adapters.residency import Residency
from lorikeet.adapters.tiers import Tier


class SimulatedHost:
    """Does what the residency decides, later, and checks it.

    Args:
        read_steps: a read takes up to this many steps.
        failure_rate: share of the reads that fail.

    Attributes:
        held: versions whose bytes are in host memory -> classes of their pages.
        num_reads: version -> reads that were started.
    """

    def __init__(
        self,
        residency: Residency,
        rng: random.Random,
        *,
        max_host: int | None,
        read_steps: int,
        failure_rate: float,
    ) -> None:
        self._residency = residency
        self._random = rng
        self._max_host = max_host
        self._read_steps = read_steps
        self._failure_rate = failure_rate
        self._disk: dict[int, list[int]] = {}
        self._reads: list[tuple[int, int]] = []
        self._now = 0
        self.held: dict[int, list[int]] = {}
        self.num_reads: dict[int, int] = {}

    @property
    def is_reading(self) -> bool:
        return bool(self._reads)

    def load(self, version: int, classes: list[int], *, pinned: bool) -> None:
        """Bring a version's bytes, unless they are there."""
        residency = self._residency
        if version in residency and residency.tier(version) not in (
            Tier.DISK,
            Tier.READING,
            Tier.FAILED,
        ):
            residency.set_pinned(version, pinned=pinned)
            return
        residency.add(version, classes, pinned=pinned)
        self._drop()
        self._disk[version] = self.held[version] = classes
        self._check()

    def remove(self, version: int) -> None:
        self._residency.remove(version)
        self.held.pop(version, None)

    def poll(self) -> tuple[list[int], list[int]]:
        """End reads that are due and begin those that were decided. Returns the versions dropped and to be read."""
        self._now += 1
        reads = self._residency.take_reads()
        drops = self._drop()
        due = [version for end, version in self._reads if end <= self._now]
        self._reads = [(end, version) for end, version in self._reads if end > self._now]
        for version in due:
            self._end_read(version)
        for version in reads:
            self.num_reads[version] = self.num_reads.get(version, 0) + 1
            self._reads.append((self._now + self._random.randint(1, self._read_steps), version))
        self._check()
        return drops, reads

    def _end_read(self, version: int) -> None:
        if self._random.random() < self._failure_rate:
            self._residency.read_failed(version, "the file has changed")
        elif self._residency.read_done(version, self._disk[version]):
            assert version not in self.held, f"version {version} was read and not dropped before"
            self.held[version] = self._disk[version]

    def _drop(self) -> list[int]:
        drops = self._residency.host.take_drops()
        for version in drops:
            del self.held[version]
        return drops

    def _check(self) -> None:
        assert self._max_host is None or len(self.held) <= self._max_host

    def check_copies(self, versions: Sequence[int]) -> None:
        for version in versions:
            assert version in self.held, f"version {version} is copied and not in host memory"
