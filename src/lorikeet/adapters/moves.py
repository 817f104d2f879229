"""Carries out what the residency decides about host memory: drops bytes and reads versions again."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from itertools import count
from typing import Any

from lorikeet.adapters.records import (
    FIRST_RETRY_S,
    LAST_RETRY_S,
    AdapterRecord,
    Load,
    StoreState,
)
from lorikeet.adapters.tiers import Tier
from lorikeet.core.adapters import AdapterFacts, HostBytes, Origin, ReadOrder
from lorikeet.errors import AdapterError
from lorikeet.masking import printable, without_paths

logger = logging.getLogger(__name__)

# Seconds between two looks for pinned versions that are not on the device, because a copy has failed.
PINS_S = 10.0

# Tiers whose versions have their bytes in host memory.
IN_MEMORY = frozenset({Tier.HOST, Tier.COPYING, Tier.DEVICE})

ReadResult = AdapterFacts | BaseException


class HostMoves:
    """Keeps host memory as the residency wants it.

    Args:
        host: None without LoRA; then nothing is ever read.

    Attributes:
        nbytes: of the versions that count as in host memory.
    """

    def __init__(self, state: StoreState, host: HostBytes | None) -> None:
        self._state = state
        self._registry = state.registry
        self._residency = state.residency
        self._records = state.records
        self._counters = state.counters
        self._host = host
        self._tickets = count(1)
        # Ticket -> the load or version that is being read.
        self._reading: dict[int, Load | AdapterRecord] = {}
        self._pins_due = time.monotonic() + PINS_S
        self.nbytes = 0

    @property
    def _bytes(self) -> HostBytes:
        assert self._host is not None, "nothing is read without LoRA"
        return self._host

    @property
    def is_reading(self) -> bool:
        return bool(self._reading)

    def pending(self) -> list[Future[Any]]:
        """What to wait for, if there is nothing else to do."""
        return self._bytes.pending() if self._reading else []

    def read(self, reader: Load | AdapterRecord, order: ReadOrder) -> None:
        """Begin to read for a load, or a version again."""
        reader.ticket = next(self._tickets)
        self._reading[reader.ticket] = reader
        self._bytes.read(reader.ticket, order)

    def cancel(self, reader: Load | AdapterRecord) -> None:
        """Give up a read, whether it is under way or at its end."""
        if reader.ticket is not None:
            self._reading.pop(reader.ticket, None)
            self._bytes.cancel(reader.ticket)
            reader.ticket = None

    def collect(self) -> list[tuple[Load, ReadResult]]:
        """Take in the reads that have ended. Those of loads are the caller's to finish."""
        loads: list[tuple[Load, ReadResult]] = []
        if not self._reading:
            return loads
        for ticket, result in self._bytes.reads_done():
            reader = self._reading.pop(ticket)
            if not isinstance(result, AdapterFacts):
                reader.ticket = None
            if isinstance(reader, Load):
                loads.append((reader, result))
            else:
                self._finish(reader, result)
        return loads

    def poll(self) -> None:
        """Drop what has left, begin new reads."""
        self._retry_pins()
        self._drop_evicted()
        for version in self._residency.take_reads():
            self._begin(self._records[version])
        self._drop_evicted()

    def retry(self, record: AdapterRecord) -> bool:
        """Somebody asks for a version that could not be read: let it be read again, if it is time for that."""
        if time.monotonic() < record.retry_at:
            return False
        self._residency.retry(record.version)
        return True

    def put(self, record: AdapterRecord, load: Load) -> None:
        """A load has brought a version, which the residency counts as in host memory.

        Who left for it goes with the next ``poll``, when it is known which version its name has left behind.
        """
        assert load.ticket is not None
        self.cancel(record)  # for nothing now
        self._bytes.keep(load.ticket, record.version)
        load.ticket = None
        self._arrive(record)

    def drop(self, record: AdapterRecord) -> None:
        """Forget a version's bytes, and the read that should bring them."""
        self.cancel(record)
        if record.is_held or record.is_kept:
            self._bytes.drop(record.version)
        self._leave(record)
        record.is_kept = False

    def forget(self, origin: Origin) -> None:
        """An origin is not read again."""
        self._bytes.forget(origin)

    def check_integrity(self) -> None:
        # Bytes that were evicted since the last poll may still be there.
        self._drop_evicted()
        records = self._records.values()
        for record in records:
            in_host = self._residency.tier(record.version) in IN_MEMORY
            assert in_host == record.is_held, f"version {record.version}: bytes and tier differ"
            assert not (record.is_held and record.is_kept)
        assert self.nbytes == sum(record.facts.nbytes for record in records if record.is_held)
        readers = [*records, *self._state.loads.values()]
        tickets = {reader.ticket for reader in readers if reader.ticket is not None}
        assert tickets == self._reading.keys(), f"reads of forgotten versions: {self._reading}"
        there = {record.version for record in records if record.is_held or record.is_kept}
        if self._host is not None:
            self._host.check_integrity(there, tickets)

    def _begin(self, record: AdapterRecord) -> None:
        if record.is_kept:
            if self._residency.read_done(record.version, record.facts.page_classes):
                self._arrive(record)
            return
        record.read_began = time.monotonic()
        self.read(
            record,
            ReadOrder(
                name=self._registry.info(record.version).name,
                origins=tuple(reversed(record.origins.values())),
                digest=record.facts.digest,
            ),
        )

    def _finish(self, record: AdapterRecord, result: ReadResult) -> None:
        """The read of a version has ended."""
        if not isinstance(result, AdapterFacts):
            self._fail(record, result)
            return
        self._counters.reloads += 1
        seconds = time.monotonic() - record.read_began
        self._counters.sample("adapter_reload_seconds", seconds)
        assert record.ticket is not None
        if self._residency.read_done(record.version, result.page_classes):
            self._bytes.keep(record.ticket, record.version)
            record.ticket = None
            self._arrive(record)
        else:
            self.cancel(record)

    def _fail(self, record: AdapterRecord, error: BaseException) -> None:
        version, seconds = record.version, record.retry_seconds
        if not isinstance(error, AdapterError):
            logger.error("reading adapter version %d again failed", version, exc_info=error)
        reason = str(error) or type(error).__name__
        record.retry_at = time.monotonic() + seconds
        record.retry_seconds = min(2 * seconds, LAST_RETRY_S)
        logger.warning(
            "Adapter %s failed: version %d, %s; read again at the earliest in %.0f s",
            ", ".join(self._registry.names_of(version)),
            version,
            reason,
            seconds,
        )
        # Requests are told the reason, but not where the files lie.
        origins = record.origins.values()
        shown = without_paths(printable(reason), *(origin.path for origin in origins))
        self._residency.read_failed(version, shown)

    def _retry_pins(self) -> None:
        """Try again to read the pinned versions that could not be read, though no request asks for them."""
        now = time.monotonic()
        if now < self._pins_due:
            return
        self._pins_due = now + PINS_S
        if not self._residency.ledger.num_in[Tier.FAILED]:
            return
        for version, record in self._records.items():
            if self._registry.is_pinned(version) and self._residency.failure(version) is not None:
                self.retry(record)

    def _arrive(self, record: AdapterRecord) -> None:
        """A version's bytes are in host memory, and count as such."""
        record.retry_at, record.retry_seconds = 0.0, FIRST_RETRY_S
        record.is_kept = False
        if not record.is_held:
            record.is_held = True
            self.nbytes += record.facts.nbytes

    def _leave(self, record: AdapterRecord) -> None:
        """A version's bytes do not count as in host memory any more."""
        if record.is_held:
            record.is_held = False
            self.nbytes -= record.facts.nbytes

    def _drop_evicted(self) -> None:
        for version in self._residency.host.take_drops():
            record = self._records.get(version)
            if record is None or not record.is_held:
                continue
            self._leave(record)
            record.is_kept = self._registry.is_hidden(version)
            if not record.is_kept:
                self._bytes.drop(version)
            self._counters.host_evictions += 1
            logger.info(
                "Adapter %s evicted from host memory: version %d, %.2f MB",
                self._registry.info(version).name,
                version,
                record.facts.nbytes / 1e6,
            )
