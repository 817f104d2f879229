"""Reading adapters away from the loop: from wherever they come to packed weights, on a few threads.

Loads and reloads have threads of their own. A load may be a download of minutes; a reload, and what the resolver
finds, is what requests wait for, and its files are local.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from lorikeet.errors import AdapterError, AdapterNotFoundError
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.source import pin_source, public_path
from lorikeet.lora.tensors import accept_tensors

logger = logging.getLogger(__name__)

# What is shown as the path of an adapter that was sent as tensors.
TENSORS_PATH = "__tensor__"
# Several, since one may wait for a slow network all the time.
NUM_LOADS = 4
NUM_RELOADS = 2


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an adapter's bytes can be read, the first time and after every eviction.

    Attributes:
        path: as the user named it; what replies and lists show.
        trusted: named by the operator (``--lora-paths``, the resolver's directory) or written by this process, so
            that ``--lora-root`` does not apply.
        spool: directory that a client's tensors were written to, and that is removed with it.
        pinned: ``path`` with the commit of a hub id, so that a branch that moves on changes nothing; None if the same.
    """

    path: str
    trusted: bool = False
    spool: Path | None = None
    pinned: str | None = None


@dataclass(frozen=True, slots=True)
class ReadAdapter:
    """What a load has read."""

    adapter: HostAdapter
    origin: Origin
    report: dict[str, object] = field(default_factory=dict[str, object])


class Finder(Protocol):
    """A resolver: adapters by their names, see ``lora/resolver.py``. Called on a reader's thread."""

    def find(self, name: str) -> Path | None: ...

    def reject(self, name: str, reason: str) -> None: ...


class LoadFiles(Protocol):
    """Resolve a path, read, check and pack. Raises AdapterError. Called on a reader's thread.

    ``is_first``: a name comes to mean the adapter, so that its chat templates are read, too.
    """

    def __call__(self, name: str, path: str, *, trusted: bool, is_first: bool) -> HostAdapter: ...


class AdapterReader:
    """Threads that read adapters.

    Args:
        load: from a path to packed weights.
        report: what is told of an adapter when it is loaded.
        resolver: finds names that are not loaded; None: they stay unknown.
    """

    def __init__(
        self,
        load: LoadFiles,
        *,
        report: Callable[[HostAdapter], dict[str, object]] = lambda adapter: {},
        resolver: Finder | None = None,
    ) -> None:
        self._load_files = load
        self._report = report
        self._resolver = resolver
        self._loads = ThreadPoolExecutor(NUM_LOADS, thread_name_prefix="adapter-load")
        self._reloads = ThreadPoolExecutor(NUM_RELOADS, thread_name_prefix="adapter-reload")

    @property
    def can_find(self) -> bool:
        return self._resolver is not None

    def load(self, name: str, origin: Origin) -> Future[ReadAdapter]:
        return self._loads.submit(self._read, name, origin)

    def load_tensors(
        self, name: str, config: Mapping[str, object], weights: Path
    ) -> Future[ReadAdapter]:
        """Read what was sent from the file where it lies, now and after each eviction.

        Its directory goes with the load, if that fails or is cancelled, or when its origin is forgotten.
        """
        origin = Origin(TENSORS_PATH, trusted=True, spool=weights.parent)
        read = self._loads.submit(self._read_tensors, name, config, weights, origin)
        read.add_done_callback(lambda read: self.forget(origin) if read.cancelled() else None)
        return read

    def find(self, name: str) -> Future[ReadAdapter]:
        """Ask the resolver for a name and read what it finds; AdapterNotFoundError if it finds nothing."""
        return self._reloads.submit(self._find_and_read, name)

    def reload(self, name: str, origins: Iterable[Origin], digest: str) -> Future[HostAdapter]:
        """Read a version again; AdapterError if none of its origins has its bytes any more."""
        return self._reloads.submit(self._read_again, name, tuple(origins), digest)

    def discard(self, read: Future[ReadAdapter]) -> None:
        """Nobody wants what this load brings: remove what it has written, as soon as it is at an end."""
        if not read.cancel():
            read.add_done_callback(_remove_spool_of)

    def forget(self, origin: Origin) -> None:
        """An origin is not read again: what was written for it goes."""
        if origin.spool is None:
            return
        with suppress(RuntimeError):  # closed: then all of them go
            self._reloads.submit(shutil.rmtree, origin.spool, ignore_errors=True)

    def close(self) -> None:
        """Stop after what is being read."""
        for threads in (self._loads, self._reloads):
            threads.shutdown(wait=False, cancel_futures=True)

    def _read(self, name: str, origin: Origin) -> ReadAdapter:
        adapter = self._read_files(name, origin, is_first=True)
        if origin.spool is None:
            origin = replace(origin, pinned=pin_source(origin.path, Path(adapter.path)))
        return ReadAdapter(adapter, origin, self._report(adapter))

    def _read_files(self, name: str, origin: Origin, *, is_first: bool) -> HostAdapter:
        path = origin.pinned or origin.path if origin.spool is None else str(origin.spool)
        return self._load_files(name, path, trusted=origin.trusted, is_first=is_first)

    def _read_tensors(
        self, name: str, config: Mapping[str, object], weights: Path, origin: Origin
    ) -> ReadAdapter:
        try:
            accept_tensors(config, weights)
            return self._read(name, origin)
        except BaseException:
            shutil.rmtree(weights.parent, ignore_errors=True)
            raise

    def _find_and_read(self, name: str) -> ReadAdapter:
        assert self._resolver is not None
        path = self._resolver.find(name)
        if path is None:
            raise AdapterNotFoundError(f"adapter {name!r} was not found", "lora_path")
        try:
            return self._read(name, Origin(str(path), trusted=True))
        except AdapterError as error:
            self._resolver.reject(name, str(error))
            raise

    def _read_again(self, name: str, origins: tuple[Origin, ...], digest: str) -> HostAdapter:
        began = time.monotonic()
        reason = f"adapter {name!r} has no files to be read from"
        for origin in origins:
            try:
                adapter = self._read_files(name, origin, is_first=False)
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
        raise AdapterError(reason)


def _remove_spool_of(read: Future[ReadAdapter]) -> None:
    if read.cancelled() or read.exception() is not None:
        return
    spool = read.result().origin.spool
    if spool is not None:
        shutil.rmtree(spool, ignore_errors=True)
