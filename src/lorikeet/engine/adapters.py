"""Adapters as the engine sees them: loaded by name, leased by requests, dropped when nobody holds them.

This is glue and owns no decision: names, versions and leases are the registry's, tiers the residency's, bytes the host
cache's, files the reader's. What it adds is their order, and the commands that are under way. Everything here runs on
the engine's loop and nothing blocks: what takes long is a future, and :meth:`LoadedAdapters.poll` looks at it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lorikeet.adapters.registry import AdapterInfo, AdapterRegistry
from lorikeet.adapters.residency import Residency
from lorikeet.adapters.sources.resolver import is_name
from lorikeet.adapters.sources.source import public_path
from lorikeet.adapters.tiers import Tier
from lorikeet.config import LoRAPath
from lorikeet.core.commands import LoadOutcome
from lorikeet.core.messages import AdaptersChanged
from lorikeet.core.views import AdapterDetail
from lorikeet.engine.adapter_moves import IN_MEMORY, HostMoves
from lorikeet.engine.adapter_news import AdapterNews
from lorikeet.engine.adapter_reader import TENSORS_PATH, AdapterReader, Origin, ReadAdapter
from lorikeet.engine.adapter_records import (
    AdapterCounters,
    Known,
    Load,
    Unload,
    as_fault,
    log_load,
)
from lorikeet.engine.adapter_store import BASE_VERSION
from lorikeet.engine.adapter_templates import TemplateNews, Templates
from lorikeet.engine.adapter_unloads import UnloadedNames, Unloads
from lorikeet.errors import ALREADY_LOADED, AdapterError, AdapterNotFoundError, RequestError
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.host_cache import HostCache

logger = logging.getLogger(__name__)

# Names of adapters that a report lists at most; ``metrics.py`` shows so many.
MAX_NAMES = 100


class LoadedAdapters:
    """The store of an engine with LoRA.

    Args:
        host: the bytes; how many may be held is the residency's decision.
    """

    def __init__(
        self,
        *,
        registry: AdapterRegistry,
        residency: Residency,
        host: HostCache,
        reader: AdapterReader,
    ) -> None:
        self._registry = registry
        self._residency = residency
        self._host = host
        self._reader = reader
        self._known: dict[int, Known] = {}
        self._loads: dict[str, Load] = {}
        # Names that were unloaded on purpose: the resolver must not bring them back behind the user's back.
        self._unloaded = UnloadedNames()
        self._cold: dict[int, float] = {}
        self._counters = AdapterCounters()
        self._templates = TemplateNews()
        self._moves = HostMoves(
            residency=residency,
            registry=registry,
            host=host,
            reader=reader,
            known=self._known,
            counters=self._counters,
        )
        self._unloads = Unloads(registry, self._known, self._counters, self._unload_ended)
        self._news = AdapterNews(
            registry=registry,
            residency=residency,
            known=self._known,
            loads=self._loads,
            unloads=self._unloads,
        )

    # -- commands ------------------------------------------------------------------------------------------------

    def load(self, source: LoRAPath) -> int:
        """Load an adapter of the start: blocks until it is in host memory. Its path is the operator's own choice.

        Raises:
            AdapterError: it cannot be served exactly, or the name is taken.
        """
        self._check_name(source.name, replace=False)
        origin = Origin(source.path, trust="operator")
        load = self._begin(source, self._reader.load(source.name, origin), replace=False)
        load.read.exception()  # waits
        self._finish_load(load)
        self._moves.poll()
        return load.reply.result().version

    def start_load(self, source: LoRAPath, *, replace: bool = False) -> Future[LoadOutcome]:
        """Begin to load an adapter. The future is resolved by a later ``poll``; cancel it to drop the load.

        Args:
            replace: a loaded name may mean the new content from then on. Requests keep the one they began with.

        Raises:
            AdapterError: the name is loaded (unless it is to be replaced) or being loaded.
        """
        self._check_name(source.name, replace=replace)
        read = self._reader.load(source.name, Origin(source.path))
        return self._begin(source, read, replace=replace).reply

    def load_tensors(
        self, name: str, config: Mapping[str, object], weights: Path, *, pinned: bool = False
    ) -> Future[LoadOutcome]:
        """Begin to load an adapter that is given as its configuration and a safetensors file, alone in its directory.

        The directory is removed when the adapter is refused or unloaded.

        Raises:
            AdapterError: as ``start_load``.
        """
        try:
            self._check_name(name, replace=False)
        except AdapterError:
            self._reader.forget(Origin(TENSORS_PATH, spool=weights.parent))
            raise
        read = self._reader.load_tensors(name, config, weights)
        source = LoRAPath(name, TENSORS_PATH, pinned=pinned)
        return self._begin(source, read, replace=False).reply

    def find(self, name: str | None) -> Future[None] | None:
        if name is None or not self._reader.can_find or name in self._unloaded:
            return None
        if not is_name(name) or self._registry.get(name) is not None:
            return None
        load = self._loads.get(name)
        if load is None:
            load = self._begin(LoRAPath(name, name), self._reader.find(name), replace=False)
            load.found = True
        # One of its own: others wait for the same, and whoever leaves must not take them along.
        waiter: Future[None] = Future()
        load.waiting.append(waiter)
        return waiter

    def start_unload(self, name: str, *, timeout: float | None = None) -> Future[LoadOutcome]:
        """Hide a name at once. The future is resolved when its last request has ended and its memory is free.

        Args:
            timeout: seconds after which the future fails and says how many still run; the memory is freed later all the
                same.

        Raises:
            AdapterNotFoundError: the name is not loaded.
        """
        info = self._registry.find(name)
        if info.pinned:
            self._unpin_for(name, info.version)
        self._registry.unload(name)
        self._templates.unload(name)
        self._news.name(name)
        self._forget_origin(name, info.version)
        self._unloaded.add(name)
        now = time.monotonic()
        deadline = None if timeout is None else now + timeout
        unload = Unload(name, info.path, info.version, info.nbytes, now, deadline)
        self._unloads.add(unload)
        self._drop_unleased()
        self._unloads.poll()  # another name may mean the version: then there is nothing to wait for
        return unload.reply

    # -- requests ------------------------------------------------------------------------------------------------

    def lease(self, name: str | None, number: int) -> int:
        if name is None:
            return BASE_VERSION
        version = self._registry.lease(name)
        reason = self._residency.failure(version)
        if reason is not None and not self._moves.retry(version):
            self._registry.release(version)
            raise RequestError(f"adapter {name!r} cannot be served: {reason}", "lora_path")
        known = self._known[version]
        known.holders[number] = None
        known.last_use = time.time()
        self._news.version(version)
        if self._residency.tier(version) is not Tier.DEVICE:
            self._cold.setdefault(version, time.monotonic())
        return version

    def release(self, version: int, number: int) -> None:
        if version == BASE_VERSION:
            return
        known = self._known[version]
        del known.holders[number]
        known.last_use = time.time()
        self._news.version(version)
        self._registry.release(version)
        if not known.holders:
            self._cold.pop(version, None)
        self._drop_unleased()

    def note_copied(self, versions: Iterable[int]) -> None:
        for version in versions:
            began = self._cold.pop(version, None)
            if began is not None:
                self._counters.sample("adapter_cold_start_seconds", time.monotonic() - began)

    # -- the loop ------------------------------------------------------------------------------------------------

    def poll(self) -> None:
        for load in [load for load in self._loads.values() if load.is_over]:
            self._finish_load(load)
        self._moves.poll()
        self._unloads.poll()

    def pending(self) -> list[Future[Any]]:
        return [*(load.read for load in self._loads.values()), *self._moves.pending]

    @property
    def is_waiting(self) -> bool:
        return bool(self._loads or self._moves.pending or len(self._unloads))

    def describe(self, name: str | None = None) -> list[AdapterDetail]:
        """All adapters, or those called ``name``: one that is unloading and its successor may share it.

        Raises:
            AdapterNotFoundError: nothing is called ``name``.
        """
        details = self._news.details(name)
        if name is not None and not details:
            self._registry.find(name)  # raises
        return details

    def names(self, versions: Iterable[int]) -> list[str]:
        found: set[str] = set()
        for version in versions:
            found.update(self._registry.names_of(version)[:MAX_NAMES])
            if len(found) >= MAX_NAMES:
                break
        return sorted(found)[:MAX_NAMES]

    def stats(self) -> dict[str, float]:
        values = {f"num_adapters_{tier.value}": float(self._residency.count(tier)) for tier in Tier}
        names = float(len(self._registry))
        return (
            values
            | self._counters.values()
            | {"num_adapters": names, "adapter_host_bytes": float(self._host.nbytes)}
        )

    def take_samples(self) -> dict[str, list[float]]:
        return self._counters.take_samples()

    def take_changes(self) -> AdaptersChanged | None:
        return self._news.take()

    def take_templates(self) -> dict[str, Templates | None]:
        return self._templates.take()

    def close(self) -> None:
        self._reader.close()

    def check_integrity(self, leases: Mapping[int, int]) -> None:
        """Compare registry, residency, host memory and the completions that are open (id -> version)."""
        self._residency.check_integrity()
        self._registry.check_integrity()
        self._host.check_integrity()
        held = {(number, version) for number, version in leases.items() if version}
        ours = {(number, v) for v, known in self._known.items() for number in known.holders}
        assert ours == held, f"leases of {ours}, requests {held}"
        for version, known in self._known.items():
            assert self._registry.num_leases(version) == len(known.holders)
            assert version in self._residency, f"version {version} is unknown to the residency"
        self._moves.check_integrity()
        names = {info.version for info in self._registry.loaded().values()}
        hidden = {unload.version for unload in self._unloads}
        assert names <= self._known.keys()
        assert self._known.keys() >= hidden

    # -- loading -------------------------------------------------------------------------------------------------

    def _check_name(self, name: str, *, replace: bool) -> None:
        """Refuse a name that is taken; one whose files are gone may be loaded anew."""
        load = self._loads.get(name)
        if load is not None:
            raise AdapterError(
                f"adapter {name!r} is already loaded or about to be, from {load.path!r}; wait for it, or choose "
                "another name",
                code=ALREADY_LOADED,
            )
        info = self._registry.get(name)
        if info is None or replace or self._residency.failure(info.version) is not None:
            return
        raise AdapterError(
            f"adapter {name!r} is already loaded from {info.path!r}; unload it first or choose another name",
            code=ALREADY_LOADED,
        )

    def _begin(self, source: LoRAPath, read: Future[ReadAdapter], *, replace: bool) -> Load:
        load = Load(
            name=source.name,
            path=public_path(source.path),
            pinned=source.pinned,
            replace=replace,
            began=time.monotonic(),
            read=read,
        )
        self._loads[source.name] = load
        self._news.name(source.name)
        return load

    def _finish_load(self, load: Load) -> None:
        del self._loads[load.name]
        self._news.name(load.name)
        if load.is_abandoned:
            self._reader.discard(load.read)
            logger.info("Adapter %s: loading was cancelled", load.name)
            return
        error = load.read.exception()
        if error is None:
            try:
                load.succeed(self._register(load, load.read.result()))
            except AdapterError as refusal:
                self._reader.discard(load.read)
                error = refusal
        if error is not None:
            if not load.found:
                self._counters.load_failures += 1
            if not isinstance(error, AdapterNotFoundError):
                logger.warning("Adapter %s not loaded: %s", load.name, error)
            load.fail(as_fault(error, load.name))

    def _register(self, load: Load, read: ReadAdapter) -> LoadOutcome:
        """Place what was read and let the name mean it; nothing has changed if that is refused."""
        name, adapter = load.name, read.adapter
        old = self._registry.get(name)
        version = self._registry.version_of(adapter.digest)
        repin = old is not None and old.pinned and self._unpin_for(name, old.version)
        try:
            self._place(version, adapter, pinned=load.pinned)
        except AdapterError:
            if repin and old is not None:
                self._residency.set_pinned(old.version, pinned=True)
            raise
        if version not in self._known:
            self._known[version] = Known(adapter.digest, read.report)
        path = public_path(read.origin.path)
        name_it = self._registry.register if old is None else self._registry.replace
        name_it(
            name,
            path=path,
            digest=adapter.digest,
            rank=adapter.rank,
            targets=adapter.targets,
            nbytes=adapter.nbytes,
            pinned=load.pinned,
        )
        self._templates.load(name, adapter.chat_templates)
        is_alone = self._registry.num_names(version) == 1
        for origin in self._known[version].add_origin(name, read.origin, is_alone=is_alone):
            self._reader.forget(origin)
        if old is not None and old.version != version:
            self._note_replaced(old)
        self._drop_unleased()
        self._unloaded.discard(name)
        seconds = time.monotonic() - load.began
        self._counters.loads += 1
        self._counters.sample("adapter_load_seconds", seconds)
        log_load(name, version, read, seconds)
        return LoadOutcome(name, path, version, seconds)

    def _place(self, version: int, adapter: HostAdapter, *, pinned: bool) -> None:
        """Hold a version in host memory and let it be admitted, unless another name has brought it already."""
        if version in self._residency and self._residency.tier(version) in IN_MEMORY:
            if pinned:
                self._residency.set_pinned(version, pinned=True)
            return
        self._residency.add(version, adapter.page_classes, pinned=pinned)
        self._moves.put(version, adapter)

    def _unpin_for(self, name: str, version: int) -> bool:
        """Take the pin away that ``name`` alone holds on ``version``; True if it did."""
        others = (n for n in self._registry.names_of(version) if n != name)
        if any(self._registry.find(other).pinned for other in others):
            return False
        self._residency.set_pinned(version, pinned=False)
        return True

    def _note_replaced(self, old: AdapterInfo) -> None:
        """A name means another content now. The old one is listed as long as requests run with it."""
        self._forget_origin(old.name, old.version)
        self._unloads.add(
            Unload(old.name, old.path, old.version, old.nbytes, time.monotonic(), counts=False)
        )

    def _unload_ended(self, name: str) -> None:
        self._news.name(name)

    def _forget_origin(self, name: str, version: int) -> None:
        """A name does not mean a version any more. Without any name, its last origin is needed until it is free."""
        if self._registry.num_names(version):
            self._reader.forget(self._known[version].origins.pop(name))

    def paths(self) -> dict[str, str]:
        """Name -> path of what is loaded."""
        return {name: info.path for name, info in self._registry.loaded().items()}

    def _drop_unleased(self) -> None:
        gone = self._registry.pop_unleased()
        for version in gone:
            known = self._known.pop(version)
            self._news.version(version)
            self._cold.pop(version, None)
            self._residency.remove(version)
            self._moves.drop(version)
            for origin in known.origins.values():
                self._reader.forget(origin)
        if gone:
            self._unloads.poll()
