"""One rank's adapters in host memory: read on threads, held by version, dropped when rank 0 says so.

Which of them are held is decided by ``adapters/residency.py`` and ordered through ``core.adapters.HostBytes``, which this
is the one rank's part of.
"""

from __future__ import annotations

from collections.abc import Set
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from lorikeet.core.adapters import AdapterFacts, Origin, ReadOrder
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.reader import AdapterReader, ReadAdapter


@dataclass(slots=True, eq=False)
class _Read:
    """A read that is under way, or whose bytes wait for what becomes of them.

    Attributes:
        is_told: ``reads_done`` has told of its end.
    """

    order: ReadOrder
    future: Future[ReadAdapter]
    is_told: bool = False


class HostMemory:
    """Adapters in main memory. Everything here is called on the thread of the loop.

    Args:
        reader: its threads read.
    """

    def __init__(self, reader: AdapterReader) -> None:
        self._reader = reader
        self._reads: dict[int, _Read] = {}
        self._held: dict[int, HostAdapter] = {}

    # -- rank 0's orders, see core.adapters.HostBytes ---------------------------------------------------------------

    def read(self, ticket: int, order: ReadOrder) -> None:
        assert ticket not in self._reads, f"ticket {ticket} is used twice"
        self._reads[ticket] = _Read(order, self._reader.read(order))

    def reads_done(self) -> list[tuple[int, AdapterFacts | BaseException]]:
        done: list[tuple[int, AdapterFacts | BaseException]] = []
        for ticket, read in list(self._reads.items()):
            if read.is_told or not read.future.done():
                continue
            error = read.future.exception()
            if error is None:
                read.is_told = True
                done.append((ticket, _facts(read.future.result())))
            else:
                del self._reads[ticket]
                done.append((ticket, error))
        return done

    def keep(self, ticket: int, version: int) -> None:
        self._held.setdefault(version, self._reads.pop(ticket).future.result().adapter)

    def cancel(self, ticket: int) -> None:
        read = self._reads.pop(ticket)
        self._reader.cancel(read.future, read.order)

    def drop(self, version: int) -> None:
        del self._held[version]

    def forget(self, origin: Origin) -> None:
        self._reader.forget(origin)

    def pending(self) -> list[Future[Any]]:
        return [read.future for read in self._reads.values() if not read.is_told]

    def check_integrity(self, versions: Set[int], tickets: Set[int]) -> None:
        assert self._held.keys() == versions, f"{list(self._held)} are held, not {versions}"
        assert self._reads.keys() == tickets, f"{list(self._reads)} are read, not {tickets}"

    # -- for this rank's worker -------------------------------------------------------------------------------------

    def get(self, version: int) -> HostAdapter:
        """The bytes of a version; KeyError if they are not held."""
        return self._held[version]

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters held."""
        return sum(adapter.nbytes for adapter in self._held.values())

    def __len__(self) -> int:
        """How many versions are held."""
        return len(self._held)

    def close(self) -> None:
        """End what is being read."""
        self._reader.close()


def _facts(read: ReadAdapter) -> AdapterFacts:
    adapter = read.adapter
    return AdapterFacts(
        digest=adapter.digest,
        origin=read.origin,
        page_classes=adapter.page_classes,
        rank=adapter.rank,
        targets=adapter.targets,
        nbytes=adapter.nbytes,
        report=read.report,
        chat_templates=dict(adapter.chat_templates),
    )
