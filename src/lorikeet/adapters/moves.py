"""Carries out what the residency decides about host memory: bytes dropped, versions read again."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future

from lorikeet.adapters.records import AdapterCounters, Known
from lorikeet.adapters.registry import AdapterRegistry
from lorikeet.adapters.residency import Residency
from lorikeet.adapters.tiers import Tier
from lorikeet.errors import AdapterError
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.host_memory import HostCache
from lorikeet.lora.reader import AdapterReader
from lorikeet.masking import printable, without_paths

logger = logging.getLogger(__name__)


# Seconds until a version that could not be read is read again if somebody asks for it (or if it is pinned): the first
# and the longest wait, each twice as long as the one before.
FIRST_RETRY_S = 10.0
LAST_RETRY_S = 600.0
# Seconds between two looks for pinned versions that are not on the device, because a copy has failed.
PINS_S = 10.0

# Tiers whose versions have their bytes in host memory.
IN_MEMORY = frozenset({Tier.HOST, Tier.COPYING, Tier.DEVICE})


class HostMoves:
    """Host memory follows the residency.

    Args:
        known: versions that the registry knows, and where their bytes can be read; shared with the store.
    """

    def __init__(
        self,
        *,
        residency: Residency,
        registry: AdapterRegistry,
        host: HostCache,
        reader: AdapterReader,
        known: Mapping[int, Known],
        counters: AdapterCounters,
    ) -> None:
        self._residency = residency
        self._registry = registry
        self._host = host
        self._reader = reader
        self._known = known
        self._counters = counters
        self._reads: dict[int, Future[HostAdapter]] = {}
        self._began: dict[int, float] = {}
        # Versions that could not be read: when they may be read again, and how long the next wait is.
        self._retries: dict[int, tuple[float, float]] = {}
        self._pins_due = time.monotonic() + PINS_S
        # Versions that no name means any more, which requests still wait for. Their files may have been overwritten by
        # their successor's, so their bytes stay here until the residency wants them again.
        self._kept: dict[int, HostAdapter] = {}

    @property
    def pending(self) -> list[Future[HostAdapter]]:
        """Reads under way."""
        return list(self._reads.values())

    def poll(self) -> None:
        """Take in finished reads, drop what has left, begin new reads."""
        for version in [version for version, read in self._reads.items() if read.done()]:
            self._finish(version)
        self._retry_pins()
        self._drop_evicted()
        for version in self._residency.take_reads():
            self._begin(version)
        self._drop_evicted()

    def retry(self, version: int) -> bool:
        """Somebody asks for a version that could not be read: let it be read again, if it is time for that."""
        not_before, _ = self._retries.get(version, (0.0, 0.0))
        if time.monotonic() < not_before:
            return False
        self._residency.retry(version)
        return True

    def put(self, version: int, adapter: HostAdapter) -> None:
        """A load has brought a version, which the residency counts from now on as in host memory.

        Who left for it goes with the next ``poll``, when it is known which version its name has left behind.
        """
        self.drop(version)  # evicted and still here, or being read: for nothing now
        self._host.put(version, adapter)

    def drop(self, version: int) -> None:
        """Forget a version's bytes, and the read that should bring them."""
        self._kept.pop(version, None)
        self._retries.pop(version, None)
        self._began.pop(version, None)
        read = self._reads.pop(version, None)
        if read is not None:
            self._reader.cancel(read)
        if version in self._host:
            self._host.drop(version)

    def check_integrity(self) -> None:
        # Who has left since the last poll may still be here.
        self._drop_evicted()
        for version in self._known:
            in_host = self._residency.tier(version) in IN_MEMORY
            assert in_host == (version in self._host), f"version {version}: bytes and tier differ"
        ours = {*self._reads, *self._kept, *self._began, *self._retries}
        assert ours <= self._known.keys(), f"reads of forgotten versions: {ours}"

    def _begin(self, version: int) -> None:
        kept = self._kept.pop(version, None)
        if kept is not None:
            self._arrive(version, kept)
            return
        info, known = self._registry.info(version), self._known[version]
        self._began[version] = time.monotonic()
        self._reads[version] = self._reader.reload(
            info.name, reversed(known.origins.values()), known.digest
        )

    def _finish(self, version: int) -> None:
        read = self._reads.pop(version)
        seconds = time.monotonic() - self._began.pop(version)
        error = read.exception()
        if error is None:
            adapter = read.result()
            self._counters.reloads += 1
            self._counters.sample("adapter_reload_seconds", seconds)
            self._arrive(version, adapter)
            return
        if not isinstance(error, AdapterError):
            logger.error("reading adapter version %d again failed", version, exc_info=error)
        reason = str(error) or type(error).__name__
        names = ", ".join(self._registry.names_of(version))
        _, seconds = self._retries.get(version, (0.0, FIRST_RETRY_S))
        self._retries[version] = (time.monotonic() + seconds, min(2 * seconds, LAST_RETRY_S))
        logger.warning(
            "Adapter %s failed: version %d, %s; read again at the earliest in %.0f s",
            names,
            version,
            reason,
            seconds,
        )
        # Requests are told it, and where the files lie is not their matter.
        origins = self._known[version].origins.values()
        shown = without_paths(printable(reason), *(origin.path for origin in origins))
        self._residency.read_failed(version, shown)

    def _retry_pins(self) -> None:
        """Nobody has to ask for a pinned version that could not be read."""
        now = time.monotonic()
        if now < self._pins_due:
            return
        self._pins_due = now + PINS_S
        for version in list(self._retries):
            if self._registry.is_pinned(version) and self._residency.failure(version) is not None:
                self.retry(version)

    def _arrive(self, version: int, adapter: HostAdapter) -> None:
        self._retries.pop(version, None)
        if self._residency.read_done(version, adapter.page_classes):
            self._host.put(version, adapter)

    def _drop_evicted(self) -> None:
        for version in self._residency.take_host_drops():
            if version not in self._host:
                continue
            adapter = self._host.get(version)
            if self._registry.is_hidden(version):
                self._kept[version] = adapter
            self._host.drop(version)
            self._counters.host_evictions += 1
            logger.info(
                "Adapter %s evicted from host memory: version %d, %.2f MB",
                adapter.name,
                version,
                adapter.nbytes / 1e6,
            )
