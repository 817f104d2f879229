"""The second phase of unloading: names that are hidden and whose requests still run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from lorikeet.adapters.records import StoreState, Unload
from lorikeet.core.commands import LoadOutcome
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
        ended: told the name of each that is over.
    """

    def __init__(self, state: StoreState, ended: Callable[[str], None]) -> None:
        self._state = state
        self._ended = ended

    def poll(self) -> None:
        """Answer those whose version is free or has a name again, and those that have waited long enough."""
        if not self._state.unloads:
            return
        now, is_hidden = time.monotonic(), self._state.registry.is_hidden
        waiting = [unload for unload in self._state.unloads if is_hidden(unload.version)]
        ended = [unload for unload in self._state.unloads if not is_hidden(unload.version)]
        self._state.unloads[:] = waiting
        for unload in ended:
            self._ended(unload.name)
            self._end(unload, now - unload.began)
        for unload in waiting:
            if unload.deadline is not None and now >= unload.deadline:
                unload.deadline = None
                if not unload.reply.cancelled():
                    unload.reply.set_exception(self._too_slow(unload, now - unload.began))

    def _end(self, unload: Unload, seconds: float) -> None:
        self._state.counters.unloads += unload.counts
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
        num_running = len(self._state.records[unload.version].holders)
        return AdapterError(
            f"adapter {unload.name!r} takes no new requests, but after {seconds:.1f} s {num_running} still run with "
            f"it; its memory is freed when they end"
        )
