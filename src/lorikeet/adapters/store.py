"""Adapters as the engine sees them: loaded by name, leased by requests, dropped when nobody holds them.

Names, versions and leases are the registry's decisions, tiers the residency's; the bytes lie in the host memories behind
``HostBytes``. What the store adds is their order, and the commands that are under way. Everything here runs on the
engine's loop and nothing blocks: what takes long is a read, and :meth:`AdapterStore.poll` sees what came of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import msgspec

from lorikeet.adapters.moves import IN_MEMORY, HostMoves, ReadResult
from lorikeet.adapters.news import AdapterNews
from lorikeet.adapters.records import (
    BASE_VERSION,
    AdapterRecord,
    Load,
    StoreState,
    Unload,
    as_fault,
)
from lorikeet.adapters.registry import AdapterInfo, AdapterRegistry
from lorikeet.adapters.residency import Residency
from lorikeet.adapters.sources.resolver import is_name
from lorikeet.adapters.sources.source import public_path
from lorikeet.adapters.templates import Templates
from lorikeet.adapters.tiers import Tier
from lorikeet.config import LoRAPath
from lorikeet.core.adapters import (
    TENSORS_PATH,
    AdapterFacts,
    HostBytes,
    Origin,
    ReadOrder,
    SentTensors,
    format_report,
)
from lorikeet.core.commands import LoadOutcome
from lorikeet.core.messages import AdaptersChanged
from lorikeet.core.views import AdapterDetail
from lorikeet.errors import (
    ALREADY_LOADED,
    AdapterError,
    AdapterNotFoundError,
    LoRADisabledError,
    RequestError,
)

logger = logging.getLogger(__name__)

# Names of adapters that a report lists at most; ``metrics.py`` shows so many.
MAX_NAMES = 100
# Names unloaded on purpose that are remembered; a resolver may find older ones again.
MAX_UNLOADED = 4096


class AdapterStore:
    """All adapters of an engine: loads and unloads them, and gives requests their versions.

    Args:
        host: where the bytes lie, in as many host memories as there are ranks; None without LoRA: the base model is
            all there is.
        can_find: a name that is not loaded may be asked of the resolver.
    """

    def __init__(
        self, residency: Residency, host: HostBytes | None, *, can_find: bool = False
    ) -> None:
        self.residency = residency
        self._state = StoreState(AdapterRegistry(), residency)
        self._registry = self._state.registry
        self._records = self._state.records
        self._loads = self._state.loads
        self._counters = self._state.counters
        self._has_lora = host is not None
        self._can_find = can_find
        # Names that were unloaded on purpose: the resolver must not bring them back behind the user's back.
        self._unloaded: dict[str, None] = {}
        # Names that came since the last report, with their templates, and those that went, with None.
        self._templates: dict[str, Templates | None] = {}
        self._news = AdapterNews(self._state)
        self._moves = HostMoves(self._state, host)
        self._unloads = self._state.unloads

    # -- commands ------------------------------------------------------------------------------------------------

    def load(self, source: LoRAPath) -> int:
        """Load an adapter at the start and wait until it is in host memory. Its path is the operator's own choice.

        Raises:
            AdapterError: it cannot be served exactly, or the name is taken.
        """
        self._check_name(source.name, replace=False)
        order = ReadOrder(name=source.name, origins=(Origin(source.path, trust="operator"),))
        load = self._begin(source, order, replace=False)
        while not load.reply.done():
            wait(self._moves.pending())
            self.poll()
        return load.reply.result().version

    def start_load(self, source: LoRAPath, *, replace: bool = False) -> Future[LoadOutcome]:
        """Begin to load an adapter. The future is resolved by a later ``poll``; cancel it to drop the load.

        Args:
            replace: a loaded name may mean the new content from then on. Requests keep the one they began with.

        Raises:
            AdapterError: the name is loaded (unless it is to be replaced) or being loaded.
        """
        self._check_name(source.name, replace=replace)
        order = ReadOrder(name=source.name, origins=(Origin(source.path),))
        return self._begin(source, order, replace=replace).reply

    def load_tensors(
        self, name: str, config: Mapping[str, object], weights: Path, *, pinned: bool = False
    ) -> Future[LoadOutcome]:
        """Begin to load an adapter that is given as its configuration and a safetensors file, alone in its directory.

        The directory is removed when the adapter is refused or unloaded.

        Raises:
            AdapterError: as ``start_load``.
        """
        origin = Origin(TENSORS_PATH, trust="operator", spool=str(weights.parent))
        try:
            self._check_name(name, replace=False)
        except AdapterError:
            self._moves.forget(origin)
            raise
        order = ReadOrder(name=name, origins=(origin,), sent=SentTensors(config, str(weights)))
        source = LoRAPath(name, TENSORS_PATH, pinned=pinned)
        return self._begin(source, order, replace=False).reply

    def find(self, name: str | None) -> Future[None] | None:
        """Look for a name that is not loaded; None if there is nowhere to look.

        The future is the caller's own: it ends when the search does, with its error, and may be cancelled at any time.
        """
        if name is None or not self._can_find or name in self._unloaded:
            return None
        if not is_name(name) or self._registry.get(name) is not None:
            return None
        load = self._loads.get(name)
        if load is None:
            load = self._begin(LoRAPath(name, name), ReadOrder(name=name), replace=False)
            load.found = True
        # Each caller has a future of its own: cancelling it must not end the search for others.
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
        self._check_enabled(name, "unloaded")
        info = self._registry.find(name)
        if info.pinned:
            self._unpin_for(name, info.version)
        self._registry.unload(name)
        self._templates[name] = None
        self._news.name(name)
        self._forget_origin(name, info.version)
        self._unloaded[name] = None
        if len(self._unloaded) > MAX_UNLOADED:
            del self._unloaded[next(iter(self._unloaded))]
        now = time.monotonic()
        deadline = None if timeout is None else now + timeout
        unload = Unload(name, info.path, info.version, info.nbytes, now, deadline)
        self._unloads.append(unload)
        self._drop_unleased()
        self._poll_unloads()  # another name may mean the version: then there is nothing to wait for
        return unload.reply

    # -- requests ------------------------------------------------------------------------------------------------

    def lease(self, name: str | None, number: int) -> int:
        """Version that the completion ``number`` of ``name`` runs with; held until :meth:`release`. None is the base.

        Raises:
            AdapterNotFoundError: the name is not loaded.
            RequestError: its adapter could not be read again, or LoRA is off.
        """
        if name is None:
            return BASE_VERSION
        self._check_enabled(name, "used", "lora_path")
        version = self._registry.lease(name)
        record = self._records[version]
        reason = self.residency.failure(version)
        if reason is not None and not self._moves.retry(record):
            self._registry.release(version)
            raise RequestError(f"adapter {name!r} cannot be served: {reason}", "lora_path")
        record.holders[number] = None
        record.last_use = time.time()
        self._news.version(version)
        if record.cold_since is None and self.residency.tier(version) is not Tier.DEVICE:
            record.cold_since = time.monotonic()
        return version

    def release(self, version: int, number: int) -> None:
        """The completion ``number`` has ended."""
        if version == BASE_VERSION:
            return
        record = self._records[version]
        del record.holders[number]
        record.last_use = time.time()
        self._news.version(version)
        self._registry.release(version)
        if not record.holders:
            record.cold_since = None
        self._drop_unleased()

    def note_copied(self, versions: Iterable[int]) -> None:
        """These versions have arrived on the device."""
        for version in versions:
            record = self._records.get(version)
            if record is not None and record.cold_since is not None:
                seconds = time.monotonic() - record.cold_since
                self._counters.sample("adapter_cold_start_seconds", seconds)
                record.cold_since = None

    # -- the loop ------------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Take in what has been read, and order what there is to read and to drop."""
        for load in [load for load in self._loads.values() if load.is_abandoned]:
            self._give_up(load)
        for load, result in self._moves.collect():
            self._finish_load(load, result)
        self._moves.poll()
        self._poll_unloads()

    def pending(self) -> list[Future[Any]]:
        """What to wait for, if there is nothing else to do: done when ``poll`` will find something."""
        return self._moves.pending()

    @property
    def is_waiting(self) -> bool:
        """True if ``poll`` may find something without any step in between."""
        return self._moves.is_reading or bool(self._loads or self._unloads)

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
        """Names that mean these versions, sorted; as many as a report lists."""
        found: set[str] = set()
        for version in versions:
            found.update(self._registry.names_of(version)[:MAX_NAMES])
            if len(found) >= MAX_NAMES:
                break
        return sorted(found)[:MAX_NAMES]

    def stats(self) -> dict[str, float]:
        """Gauges and counters by name; none without LoRA."""
        if not self._has_lora:
            return {}
        values = {
            f"num_adapters_{tier.value}": float(self.residency.ledger.num_in[tier]) for tier in Tier
        }
        names = float(len(self._registry))
        return (
            values
            | self._counters.values()
            | {"num_adapters": names, "adapter_host_bytes": float(self._moves.nbytes)}
        )

    def take_samples(self) -> dict[str, list[float]]:
        """Durations in seconds, by name, measured since the last call."""
        return self._counters.take_samples()

    def take_changes(self) -> AdaptersChanged | None:
        """What has changed about the adapters since the last call; None if nothing has."""
        return self._news.take()

    def take_templates(self) -> dict[str, Templates | None]:
        """Names that came since the last call, with their chat templates, and those that went, with None."""
        changed, self._templates = self._templates, {}
        return changed

    def check_integrity(self, leases: Mapping[int, int]) -> None:
        """Compare registry, residency, host memory and the completions that are open (id -> version)."""
        self.residency.check_integrity()
        self._registry.check_integrity()
        held = {(number, version) for number, version in leases.items() if version}
        ours = {(number, v) for v, record in self._records.items() for number in record.holders}
        assert ours == held, f"leases of {ours}, requests {held}"
        for version, record in self._records.items():
            assert self._registry.num_leases(version) == len(record.holders)
            assert version in self.residency, f"version {version} is unknown to the residency"
        self._moves.check_integrity()
        names = {info.version for info in self._registry.loaded().values()}
        hidden = {unload.version for unload in self._unloads}
        assert names <= self._records.keys()
        assert self._records.keys() >= hidden

    # -- loading -------------------------------------------------------------------------------------------------

    def _check_name(self, name: str, *, replace: bool) -> None:
        """Refuse a name that is taken; one whose files are gone may be loaded anew."""
        self._check_enabled(name, "loaded")
        load = self._loads.get(name)
        if load is not None:
            raise AdapterError(
                f"adapter {name!r} is already loaded or about to be, from {load.path!r}; wait for it, or choose "
                "another name",
                code=ALREADY_LOADED,
            )
        info = self._registry.get(name)
        if info is None or replace or self.residency.failure(info.version) is not None:
            return
        raise AdapterError(
            f"adapter {name!r} is already loaded from {info.path!r}; unload it first or choose another name",
            code=ALREADY_LOADED,
        )

    def _check_enabled(self, name: str, verb: str, field: str = "lora_name") -> None:
        if not self._has_lora:
            raise LoRADisabledError(
                f"LoRA is not enabled, so adapter {name!r} cannot be {verb}; start the server with --enable-lora",
                field,
            )

    def _begin(self, source: LoRAPath, order: ReadOrder, *, replace: bool) -> Load:
        load = Load(
            name=source.name,
            path=public_path(source.path),
            pinned=source.pinned,
            replace=replace,
            began=time.monotonic(),
        )
        self._loads[source.name] = load
        self._news.name(source.name)
        self._moves.read(load, order)
        return load

    def _give_up(self, load: Load) -> None:
        """Nobody waits for a load any more."""
        del self._loads[load.name]
        self._news.name(load.name)
        self._moves.cancel(load)
        logger.info("Adapter %s: loading was cancelled", load.name)

    def _finish_load(self, load: Load, result: ReadResult) -> None:
        del self._loads[load.name]
        self._news.name(load.name)
        if isinstance(result, AdapterFacts):
            try:
                load.succeed(self._register(load, result))
                return
            except AdapterError as refusal:
                self._moves.cancel(load)
                result = refusal
        if not load.found:
            self._counters.load_failures += 1
        if not isinstance(result, AdapterNotFoundError):
            logger.warning("Adapter %s not loaded: %s", load.name, result)
        load.fail(as_fault(result, load.name))

    def _register(self, load: Load, facts: AdapterFacts) -> LoadOutcome:
        """Place what was read and let the name mean it; nothing has changed if that is refused."""
        name = load.name
        old = self._registry.get(name)
        version = self._registry.version_of(facts.digest)
        repin = old is not None and old.pinned and self._unpin_for(name, old.version)
        try:
            self._place(version, facts, pinned=load.pinned)
        except AdapterError:
            if repin and old is not None:
                self.residency.set_pinned(old.version, pinned=True)
            raise
        record = self._records.get(version)
        if record is None:
            # Templates are a name's, and others remember them.
            kept = msgspec.structs.replace(facts, chat_templates={})
            record = self._records[version] = AdapterRecord(version, kept)
        self._moves.put(record, load)
        path = public_path(facts.origin.path)
        name_it = self._registry.register if old is None else self._registry.replace
        name_it(
            name,
            path=path,
            digest=facts.digest,
            rank=facts.rank,
            targets=facts.targets,
            nbytes=facts.nbytes,
            pinned=load.pinned,
        )
        self._templates[name] = dict(facts.chat_templates)
        is_alone = self._registry.num_names(version) == 1
        for origin in record.add_origin(name, facts.origin, is_alone=is_alone):
            self._moves.forget(origin)
        if old is not None and old.version != version:
            self._note_replaced(old)
        self._drop_unleased()
        self._unloaded.pop(name, None)
        seconds = time.monotonic() - load.began
        self._counters.loads += 1
        self._counters.sample("adapter_load_seconds", seconds)
        logger.info(
            "Adapter %s loaded: version %d, %.2f MB, %.0f ms, %s",
            name,
            version,
            facts.nbytes / 1e6,
            seconds * 1e3,
            format_report(facts.report) if facts.report else f"rank {facts.rank}",
        )
        return LoadOutcome(name, path, version, seconds)

    def _place(self, version: int, facts: AdapterFacts, *, pinned: bool) -> None:
        """Let a version be admitted, unless another name has brought it already."""
        if version in self.residency and self.residency.tier(version) in IN_MEMORY:
            if pinned:
                self.residency.set_pinned(version, pinned=True)
        else:
            self.residency.add(version, facts.page_classes, pinned=pinned)

    def _unpin_for(self, name: str, version: int) -> bool:
        """Take the pin away that ``name`` alone holds on ``version``; True if it did."""
        others = (n for n in self._registry.names_of(version) if n != name)
        if any(self._registry.find(other).pinned for other in others):
            return False
        self.residency.set_pinned(version, pinned=False)
        return True

    def _note_replaced(self, old: AdapterInfo) -> None:
        """A name means another content now. The old one is listed as long as requests run with it."""
        self._forget_origin(old.name, old.version)
        self._unloads.append(
            Unload(old.name, old.path, old.version, old.nbytes, time.monotonic(), counts=False)
        )

    def _forget_origin(self, name: str, version: int) -> None:
        """A name does not mean a version any more. Without any name, its last origin is needed until it is free."""
        if self._registry.num_names(version):
            self._moves.forget(self._records[version].origins.pop(name))

    def paths(self) -> dict[str, str]:
        """Name -> path of what is loaded."""
        return {name: info.path for name, info in self._registry.loaded().items()}

    def _drop_unleased(self) -> None:
        gone = self._registry.pop_unleased()
        for version in gone:
            record = self._records.pop(version)
            self._news.version(version)
            self.residency.remove(version)
            self._moves.drop(record)
            for origin in record.origins.values():
                self._moves.forget(origin)
        if gone:
            self._poll_unloads()

    # -- unloading -----------------------------------------------------------------------------------------------

    def _poll_unloads(self) -> None:
        """Answer those whose version is free or has a name again, and those that have waited long enough."""
        if not self._unloads:
            return
        now, is_hidden = time.monotonic(), self._registry.is_hidden
        ended = [unload for unload in self._unloads if not is_hidden(unload.version)]
        # In place: others look into this list, too.
        self._unloads[:] = [unload for unload in self._unloads if is_hidden(unload.version)]
        for unload in ended:
            self._news.name(unload.name)
            self._end_unload(unload, now - unload.began)
        for unload in self._unloads:
            if unload.deadline is not None and now >= unload.deadline:
                unload.deadline = None
                if not unload.reply.cancelled():
                    unload.reply.set_exception(self._too_slow(unload, now - unload.began))

    def _end_unload(self, unload: Unload, seconds: float) -> None:
        self._counters.unloads += unload.counts
        logger.info(
            "Adapter %s %s: version %d, %.2f MB, %.0f ms",
            unload.name,
            "unloaded" if unload.counts else "replaced",
            unload.version,
            unload.nbytes / 1e6,
            seconds * 1e3,
        )
        if not unload.reply.done():
            unload.reply.set_result(LoadOutcome(unload.name, unload.path, unload.version, seconds))

    def _too_slow(self, unload: Unload, seconds: float) -> AdapterError:
        num_running = len(self._records[unload.version].holders)
        return AdapterError(
            f"adapter {unload.name!r} takes no new requests, but after {seconds:.1f} s {num_running} still run with "
            f"it; its memory is freed when they end"
        )
