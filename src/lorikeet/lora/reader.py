"""Reading adapters away from the loop: from wherever they come to packed weights, on a few threads.

Loads, reloads and downloads have threads of their own. Reloads, and what the resolver finds, are what requests wait for.
Everything begins with what the disk has; what turns out to need the network goes on among the downloads, where a host
that is silent holds up its own only.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from lorikeet.adapters.sources.source import pin_source, public_path
from lorikeet.adapters.sources.transfer import NeedsNetworkError, Reach, Transfer
from lorikeet.errors import AdapterError, AdapterNotFoundError
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.reader_threads import ReaderThreads
from lorikeet.lora.tensors import accept_tensors
from lorikeet.masking import shortened

logger = logging.getLogger(__name__)

# What is shown as the path of an adapter that was sent as tensors.
TENSORS_PATH = "__tensor__"
# Several, since a disk may be slow, too.
NUM_LOADS = 4
NUM_RELOADS = 2
NUM_DOWNLOADS = 16
# From one host, so that one that is silent leaves places for the others.
NUM_DOWNLOADS_PER_HOST = 4

T = TypeVar("T")

Trust = Literal["operator", "resolver", "request"]
"""Who has named a path: the operator (``--lora-paths``, or this process itself), who may name any; a request through the
resolver's directory; or a request by itself."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an adapter's bytes can be read, the first time and after every eviction.

    Attributes:
        path: as the user named it; what replies and lists show.
        trust: who has named it, which decides where it may lead.
        spool: directory that a client's tensors were written to, and that is removed with it.
        pinned: ``path`` with the commit of a hub id, so that a branch that moves on changes nothing; None if the same.
    """

    path: str
    trust: Trust = "request"
    spool: Path | None = None
    pinned: str | None = None


@dataclass(frozen=True, slots=True)
class ReadAdapter:
    """What a load has read."""

    adapter: HostAdapter
    origin: Origin
    report: dict[str, object] = field(default_factory=dict[str, object])


class Finder(Protocol):
    """A resolver: adapters by their names, see ``adapters/sources/resolver.py``. Called on a reader's thread."""

    def find(self, name: str) -> Path | None: ...

    def reject(self, name: str, reason: str) -> None: ...


class LoadFiles(Protocol):
    """Resolve a path, read, check and pack. Raises AdapterError. Called on a reader's thread.

    ``trust``: who has named the path. ``is_first``: a name comes to mean the adapter, so that its chat templates are
    read, too. ``transfer``: how far and how long; beyond it NeedsNetworkError is raised.
    """

    def __call__(
        self, name: str, path: str, *, trust: Trust, is_first: bool, transfer: Transfer
    ) -> HostAdapter: ...


class AdapterReader:
    """Threads that read adapters.

    Args:
        load: from a path to packed weights.
        report: what is told of an adapter when it is loaded.
        resolver: finds names that are not loaded; None: they stay unknown.
        download_seconds: that one download may take; None: any time.
    """

    def __init__(
        self,
        load: LoadFiles,
        *,
        report: Callable[[HostAdapter], dict[str, object]] = lambda adapter: {},
        resolver: Finder | None = None,
        download_seconds: float | None = None,
    ) -> None:
        self._load_files = load
        self._report = report
        self._resolver = resolver
        self._download_seconds = download_seconds
        self._loads = ReaderThreads("adapter-load", NUM_LOADS)
        self._reloads = ReaderThreads("adapter-reload", NUM_RELOADS)
        self._downloads = ReaderThreads("adapter-download", NUM_DOWNLOADS, NUM_DOWNLOADS_PER_HOST)
        # Downloads that may have to be ended, by the future of what they are for.
        self._transfers: dict[Future[Any], Transfer] = {}

    @property
    def can_find(self) -> bool:
        return self._resolver is not None

    def load(self, name: str, origin: Origin) -> Future[ReadAdapter]:
        return self._submit(
            self._loads, Reach.LOCAL, lambda transfer: self._read(name, origin, transfer)
        )

    def load_tensors(
        self, name: str, config: Mapping[str, object], weights: Path
    ) -> Future[ReadAdapter]:
        """Read what was sent from the file where it lies, now and after each eviction.

        Its directory goes with the load, if that fails or is cancelled, or when its origin is forgotten.
        """
        origin = Origin(TENSORS_PATH, trust="operator", spool=weights.parent)
        read = self._submit(
            self._loads,
            Reach.LOCAL,
            lambda transfer: self._read_tensors(name, config, weights, origin, transfer),
        )
        read.add_done_callback(lambda read: self.forget(origin) if read.cancelled() else None)
        return read

    def find(self, name: str) -> Future[ReadAdapter]:
        """Ask the resolver for a name and read what it finds; AdapterNotFoundError if it finds nothing."""
        return self._submit(
            self._reloads, Reach.LOCAL, lambda transfer: self._find_and_read(name, transfer)
        )

    def reload(self, name: str, origins: Iterable[Origin], digest: str) -> Future[HostAdapter]:
        """Read a version again; AdapterError if none of its origins has its bytes any more.

        What was downloaded is read from the cache, and its source is asked only if it has left that.
        """
        known = tuple(origins)
        return self._submit(
            self._reloads,
            Reach.CACHE,
            lambda transfer: self._read_again(name, known, digest, transfer),
        )

    def discard(self, read: Future[ReadAdapter]) -> None:
        """Nobody wants what this load brings: end it, and remove what it has written as soon as it is at an end."""
        self.cancel(read)
        read.add_done_callback(_remove_spool_of)

    def cancel(self, read: Future[Any]) -> None:
        """Nobody waits for this any more: take it back, or end its download."""
        read.cancel()
        if transfer := self._transfers.get(read):
            transfer.cancel()

    def forget(self, origin: Origin) -> None:
        """An origin is not read again: what was written for it goes."""
        if origin.spool is None:
            return
        spool = origin.spool
        with suppress(RuntimeError):  # closed: then all of them go
            self._reloads.submit(lambda: shutil.rmtree(spool, ignore_errors=True))

    def close(self) -> None:
        """End what is being downloaded, and stop after what is being read."""
        for threads in (self._loads, self._reloads, self._downloads):
            threads.close()
        for transfer in list(self._transfers.values()):
            transfer.cancel()

    def _submit(
        self, threads: ReaderThreads, reach: Reach, job: Callable[[Transfer], T]
    ) -> Future[T]:
        """Run ``job`` within ``reach``, and once more among the downloads if that is not far enough.

        The future is never "running": it can be cancelled until it has its answer.
        """
        reply: Future[T] = Future()

        def run(transfer: Transfer) -> None:
            host = None
            self._transfers[reply] = transfer
            try:
                # After the line above: whoever cancels it from now on finds the transfer.
                if not reply.cancelled():
                    _answer(reply, transfer, job)
            except NeedsNetworkError as error:
                host = error.host
            finally:
                del self._transfers[reply]
            if host is not None:
                self._downloads.submit(run_far, host)

        def run_far() -> None:
            run(Transfer(Reach.NETWORK, self._download_seconds))

        threads.submit(lambda: run(Transfer(reach)))
        return reply

    def _read(self, name: str, origin: Origin, transfer: Transfer) -> ReadAdapter:
        adapter = self._read_files(name, origin, transfer, is_first=True)
        if origin.spool is None:
            origin = replace(origin, pinned=pin_source(origin.path, Path(adapter.path)))
        return ReadAdapter(adapter, origin, self._report(adapter))

    def _read_files(
        self, name: str, origin: Origin, transfer: Transfer, *, is_first: bool
    ) -> HostAdapter:
        path = origin.pinned or origin.path if origin.spool is None else str(origin.spool)
        return self._load_files(
            name, path, trust=origin.trust, is_first=is_first, transfer=transfer
        )

    def _read_tensors(
        self,
        name: str,
        config: Mapping[str, object],
        weights: Path,
        origin: Origin,
        transfer: Transfer,
    ) -> ReadAdapter:
        try:
            accept_tensors(config, weights)
            return self._read(name, origin, transfer)
        except BaseException:
            shutil.rmtree(weights.parent, ignore_errors=True)
            raise

    def _find_and_read(self, name: str, transfer: Transfer) -> ReadAdapter:
        assert self._resolver is not None
        path = self._resolver.find(name)
        if path is None:
            raise AdapterNotFoundError(f"adapter '{shortened(name)}' was not found", "lora_path")
        try:
            return self._read(name, Origin(str(path), trust="resolver"), transfer)
        except AdapterError as error:
            self._resolver.reject(name, str(error))
            raise

    def _read_again(
        self, name: str, origins: tuple[Origin, ...], digest: str, transfer: Transfer
    ) -> HostAdapter:
        began = time.monotonic()
        reason = f"adapter '{shortened(name)}' has no files to be read from"
        farther: NeedsNetworkError | None = None
        for origin in origins:
            try:
                adapter = self._read_files(name, origin, transfer, is_first=False)
            except NeedsNetworkError as error:
                farther = farther or error
                continue
            except AdapterError as error:
                reason = f"its files could not be read again: {error}"
                continue
            if adapter.digest == digest:
                logger.info(
                    "Adapter %s read again: %.2f MB, %.0f ms",
                    name,
                    adapter.nbytes / 1e6,
                    (time.monotonic() - began) * 1e3,
                )
                return adapter
            reason = f"its files at {public_path(origin.path)} have changed since it was loaded; load it again"
        if farther is not None:
            raise farther
        raise AdapterError(reason)


def _answer(reply: Future[T], transfer: Transfer, job: Callable[[Transfer], T]) -> None:
    """Give ``reply`` what ``job`` returns or raises. What nobody waits for any more goes.

    Raises:
        NeedsNetworkError: it needs more than ``transfer`` reaches; there is no answer yet.
    """
    try:
        result = job(transfer)
    except NeedsNetworkError:
        if transfer.reach < Reach.NETWORK:
            raise
        raise AssertionError("there is nothing beyond the network") from None
    except BaseException as error:  # noqa: BLE001 - whoever looks at the future raises it
        if reply.set_running_or_notify_cancel():
            reply.set_exception(error)
    else:
        if reply.set_running_or_notify_cancel():
            reply.set_result(result)
        else:
            _remove_spool(result)


def _remove_spool_of(read: Future[ReadAdapter]) -> None:
    if not read.cancelled() and read.exception() is None:
        _remove_spool(read.result())


def _remove_spool(result: object) -> None:
    if isinstance(result, ReadAdapter) and result.origin.spool is not None:
        shutil.rmtree(result.origin.spool, ignore_errors=True)
