"""The second phase of unloading: names that are hidden and whose requests still run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping

from lorikeet.adapters.registry import AdapterRegistry
from lorikeet.core.commands import LoadOutcome
from lorikeet.engine.adapter_records import AdapterCounters, Known, Unload
from lorikeet.errors import AdapterError

logger = logging.getLogger(__name__)

# Names unloaded on purpose that are remembered; a resolver may find older ones again.
_MAX_UNLOADED = 4096


class UnloadedNames:
    """The newest names that were unloaded on purpose."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> None:
        self._names[name] = None
        while len(self._names) > _MAX_UNLOADED:
            del self._names[next(iter(self._names))]

    def discard(self, name: str) -> None:
        self._names.pop(name, None)


class Unloads:
    """Answers unloads when their versions are free, or when their time is over.

    Args:
        known: versions and the requests that hold them; shared with the store.
        ended: told the name of each that is over.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        known: Mapping[int, Known],
        counters: AdapterCounters,
        ended: Callable[[str], None],
    ) -> None:
        self._registry = registry
        self._known = known
        self._counters = counters
        self._ended = ended
        self._waiting: list[Unload] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Unload]:
        return iter(self._waiting)

    def add(self, unload: Unload) -> None:
        self._waiting.append(unload)

    def poll(self) -> None:
        """Answer those whose version is free or has a name again, and those that have waited long enough."""
        if not self._waiting:
            return
        now = time.monotonic()
        ended = [u for u in self._waiting if not self._registry.is_hidden(u.version)]
        if ended:
            self._waiting = [u for u in self._waiting if self._registry.is_hidden(u.version)]
        for unload in ended:
            self._ended(unload.name)
            self._end(unload, now - unload.began)
        for unload in self._waiting:
            if unload.deadline is not None and now >= unload.deadline:
                unload.deadline = None
                if not unload.reply.cancelled():
                    unload.reply.set_exception(self._too_slow(unload, now - unload.began))

    def _end(self, unload: Unload, seconds: float) -> None:
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
        num_running = len(self._known[unload.version].holders)
        return AdapterError(
            f"adapter {unload.name!r} takes no new requests, but after {seconds:.1f} s {num_running} still run with "
            f"it; its memory is freed when they end"
        )
