"""Reads adapters on threads, from wherever they come to packed weights.

Loads, reloads and downloads have threads of their own. Reloads, and what the resolver finds, are what requests wait for.
Everything begins with what the disk has; what turns out to need the network goes on among the downloads, where a host
that is silent holds up its own only.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from lorikeet.adapters.sources.resolver import Resolver
from lorikeet.adapters.sources.source import pin_source, public_path
from lorikeet.adapters.sources.transfer import NeedsNetworkError, Reach, Transfer
from lorikeet.core.adapters import Origin, ReadOrder, Trust
from lorikeet.errors import AdapterError, AdapterNotFoundError
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.tensors import accept_tensors
from lorikeet.masking import shortened

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Several at a time, since disks may be slow, too.
NUM_LOADS = 4
NUM_RELOADS = 2
NUM_DOWNLOADS = 16
# From one host: a silent one must leave places for the others.
NUM_DOWNLOADS_PER_HOST = 4


@dataclass(frozen=True, slots=True)
class ReadAdapter:
    """An adapter that was read, and where.

    Attributes:
        report: what it changes in the base model; empty if it was read again.
    """

    adapter: HostAdapter
    origin: Origin
    report: dict[str, object] = field(default_factory=dict[str, object])


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
        resolver: Resolver | None = None,
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
        self._transfers: dict[Future[ReadAdapter], Transfer] = {}

    def read(self, order: ReadOrder) -> Future[ReadAdapter]:
        """Begin to read an adapter. The future is never "running": it can be cancelled until it has its answer.

        It ends with AdapterNotFoundError if the resolver finds nothing, with AdapterError if the adapter cannot be
        served, or if none of its origins has its bytes any more. What was downloaded is read again from the cache, and
        its source is asked only if it has left that.
        """
        reply: Future[ReadAdapter] = Future()
        reach = Reach.LOCAL if order.digest is None else Reach.CACHE
        is_load = order.digest is None and order.origins
        threads = self._loads if is_load else self._reloads
        threads.submit(lambda: self._run(reply, order, Transfer(reach)))
        return reply

    def cancel(self, read: Future[ReadAdapter], order: ReadOrder) -> None:
        """Nobody wants this any more: take it back or end its download, and remove what was sent for it."""
        read.cancel()
        if transfer := self._transfers.get(read):
            transfer.cancel()
        if order.sent is not None:
            self.forget(*order.origins)

    def forget(self, origin: Origin) -> None:
        """An origin is not read again: what was written for it goes."""
        if origin.spool is not None:
            spool = origin.spool
            with suppress(RuntimeError):  # closed: then all of them go
                self._reloads.submit(lambda: shutil.rmtree(spool, ignore_errors=True))

    def close(self) -> None:
        """End what is being downloaded, and stop after what is being read."""
        for threads in (self._loads, self._reloads, self._downloads):
            threads.close()
        for transfer in list(self._transfers.values()):
            transfer.cancel()

    def _run(self, reply: Future[ReadAdapter], order: ReadOrder, transfer: Transfer) -> None:
        """Read within a reach, and once more among the downloads if that is not far enough."""
        host = None
        self._transfers[reply] = transfer
        try:
            # Asked after the line above: who cancels it from now on finds the transfer.
            if not reply.cancelled():
                self._answer(reply, order, transfer)
        except NeedsNetworkError as error:
            host = error.host
        finally:
            del self._transfers[reply]
        if host is not None:
            # The transfer is made when the job begins: only then does its time run.
            self._downloads.submit(
                lambda: self._run(reply, order, Transfer(Reach.NETWORK, self._download_seconds)),
                host,
            )

    def _answer(self, reply: Future[ReadAdapter], order: ReadOrder, transfer: Transfer) -> None:
        """Give ``reply`` what is read, or why it cannot be. What was sent goes if that fails, or if nobody waits any more.

        Raises:
            NeedsNetworkError: it needs more than ``transfer`` reaches; there is no answer yet.
        """
        try:
            read = self._read(order, transfer)
        except NeedsNetworkError:
            if transfer.reach < Reach.NETWORK:
                raise
            raise AssertionError("there is nothing beyond the network") from None
        except BaseException as error:  # noqa: BLE001 - whoever looks at the future raises it
            _remove_sent(order)
            if reply.set_running_or_notify_cancel():
                reply.set_exception(error)
        else:
            if reply.set_running_or_notify_cancel():
                reply.set_result(read)
            else:
                _remove_sent(order)

    def _read(self, order: ReadOrder, transfer: Transfer) -> ReadAdapter:
        if order.digest is not None:
            return self._read_again(order, order.digest, transfer)
        if not order.origins:
            return self._find_and_read(order.name, transfer)
        (origin,) = order.origins
        if order.sent is not None:
            accept_tensors(order.sent.config, Path(order.sent.weights))
        return self._read_first(order.name, origin, transfer)

    def _read_first(self, name: str, origin: Origin, transfer: Transfer) -> ReadAdapter:
        adapter = self._read_files(name, origin, transfer, is_first=True)
        if origin.spool is None:
            pinned = pin_source(origin.path, Path(adapter.path))
            origin = msgspec.structs.replace(origin, pinned=pinned)
        return ReadAdapter(adapter, origin, self._report(adapter))

    def _read_files(
        self, name: str, origin: Origin, transfer: Transfer, *, is_first: bool
    ) -> HostAdapter:
        path = origin.spool or origin.pinned or origin.path
        return self._load_files(
            name, path, trust=origin.trust, is_first=is_first, transfer=transfer
        )

    def _find_and_read(self, name: str, transfer: Transfer) -> ReadAdapter:
        assert self._resolver is not None
        path = self._resolver.find(name)
        if path is None:
            raise AdapterNotFoundError(f"adapter '{shortened(name)}' was not found", "lora_path")
        try:
            return self._read_first(name, Origin(str(path), trust="resolver"), transfer)
        except AdapterError as error:
            self._resolver.reject(name, str(error))
            raise

    def _read_again(self, order: ReadOrder, digest: str, transfer: Transfer) -> ReadAdapter:
        began = time.monotonic()
        reason = f"adapter '{shortened(order.name)}' has no files to be read from"
        farther: NeedsNetworkError | None = None
        for origin in order.origins:
            try:
                adapter = self._read_files(order.name, origin, transfer, is_first=False)
            except NeedsNetworkError as error:
                farther = farther or error
                continue
            except AdapterError as error:
                reason = f"its files could not be read again: {error}"
                continue
            if adapter.digest == digest:
                logger.info(
                    "Adapter %s read again: %.2f MB, %.0f ms",
                    order.name,
                    adapter.nbytes / 1e6,
                    (time.monotonic() - began) * 1e3,
                )
                return ReadAdapter(adapter, origin)
            reason = f"its files at {public_path(origin.path)} have changed since it was loaded; load it again"
        if farther is not None:
            raise farther
        raise AdapterError(reason)


def _remove_sent(order: ReadOrder) -> None:
    if order.sent is not None:
        shutil.rmtree(Path(order.sent.weights).parent, ignore_errors=True)


class ReaderThreads:
    """Runs jobs, the oldest first, each on a thread of its own, which the interpreter does not wait for at its end.

    Why not a ``ThreadPoolExecutor``: the interpreter joins its threads before it ends, and one that waits for a silent
    host does not end.

    Args:
        name: of the threads.
        most: jobs at a time.
        most_per_key: jobs at a time with the same key; None: any number.
    """

    def __init__(self, name: str, most: int, most_per_key: int | None = None) -> None:
        self._name = name
        self._most = most
        self._most_per_key = most if most_per_key is None else most_per_key
        self._lock = threading.Lock()
        self._waiting: list[tuple[str, Callable[[], Any], Future[Any]]] = []
        self._running: Counter[str] = Counter()
        self._is_closed = False

    def submit(self, job: Callable[[], T], key: str = "") -> Future[T]:
        """Run ``job`` as soon as there is a place. Cancel the future to take it back until then."""
        future: Future[T] = Future()
        with self._lock:
            if self._is_closed:
                future.cancel()
                return future
            self._waiting.append((key, job, future))
            self._start_next()
        return future

    def close(self) -> None:
        """Take back what has not begun, and take nothing more. Does not wait."""
        with self._lock:
            self._is_closed = True
            waiting, self._waiting = self._waiting, []
        for _, _, future in waiting:
            future.cancel()

    def _start_next(self) -> None:
        """Start what may run. The caller holds the lock."""
        rest: list[tuple[str, Callable[[], Any], Future[Any]]] = []
        for key, job, future in self._waiting:
            has_place = self._running.total() < self._most
            if not has_place or self._running[key] >= self._most_per_key:
                if not future.cancelled():
                    rest.append((key, job, future))
            elif future.set_running_or_notify_cancel():
                self._running[key] += 1
                thread = threading.Thread(
                    target=self._run, args=(key, job, future), name=self._name, daemon=True
                )
                thread.start()
        self._waiting = rest

    def _run(self, key: str, job: Callable[[], Any], future: Future[Any]) -> None:
        try:
            result = job()
        except BaseException as error:  # noqa: BLE001 - whoever looks at the future raises it
            future.set_exception(error)
        else:
            future.set_result(result)
        with self._lock:
            self._running[key] -= 1
            if not self._running[key]:
                del self._running[key]
            if not self._is_closed:
                self._start_next()
