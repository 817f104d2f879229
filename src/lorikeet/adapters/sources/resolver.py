"""Adapters found by their name in one directory, when a request first uses the name (``--lora-resolver-dir``)."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from lorikeet.adapters.spec import CONFIG_FILE
from lorikeet.errors import AdapterError

# The longest name of a file on the usual file systems, in bytes.
_MAX_NAME_BYTES = 255


class Resolver:
    """Looks an adapter up as the subdirectory that has its name.

    Names come from requests, so what is not there is remembered for a while: a client that repeats a wrong name must
    not make the disk work for each request. Safe to use from several threads.

    Args:
        directory: holds one directory per adapter.
        roots: where links out of ``directory`` may lead besides ``directory`` itself.
        negative_seconds: how long a name that was not found, or whose load failed, is not looked up again.
        max_negative: names remembered at a time; the oldest is forgotten first.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        directory: Path,
        *,
        roots: tuple[Path, ...] = (),
        negative_seconds: float = 10.0,
        max_negative: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory.resolve()
        self._allowed = (self._directory, *(root.resolve() for root in roots))
        self._seconds = negative_seconds
        self._max_negative = max_negative
        self._clock = clock
        self._lock = threading.Lock()
        # name -> (time until which it is not looked up, why it cannot be served; None: it is not there).
        self._negative: OrderedDict[str, tuple[float, str | None]] = OrderedDict()

    def find(self, name: str) -> Path | None:
        """Directory of the adapter called ``name``, or None if there is none. May read the disk.

        Raises:
            AdapterError: a load of this name failed a moment ago (see :meth:`reject`); the reason is repeated.
        """
        if not is_name(name):
            return None
        with self._lock:
            until, reason = self._negative.get(name, (float("-inf"), None))
        if self._clock() < until:
            if reason is not None:
                raise AdapterError(reason)
            return None
        found = self._look_up(name)
        if found is None:
            self._remember(name, None)
        else:
            self.forget(name)
        return found

    def reject(self, name: str, reason: str) -> None:
        """The adapter was found but could not be loaded: repeat ``reason`` for a while instead of reading it again."""
        if is_name(name):
            self._remember(name, reason)

    def forget(self, name: str) -> None:
        """Look ``name`` up again on its next use."""
        with self._lock:
            self._negative.pop(name, None)

    def _remember(self, name: str, reason: str | None) -> None:
        with self._lock:
            self._negative[name] = (self._clock() + self._seconds, reason)
            self._negative.move_to_end(name)
            while len(self._negative) > self._max_negative:
                self._negative.popitem(last=False)

    def _look_up(self, name: str) -> Path | None:
        try:
            path = (self._directory / name).resolve()
            if not (path / CONFIG_FILE).is_file():
                return None
        except (OSError, RuntimeError, ValueError):  # no permission, a loop of links
            return None
        # A link must not make the whole disk loadable by name.
        return path if any(path.is_relative_to(root) for root in self._allowed) else None


def is_name(name: str) -> bool:
    """Whether ``name`` is looked up at all: one component of a path that can be shown. A hidden directory (``.git``) is
    no adapter."""
    # The length comes first: a name may be a megabyte.
    if not 0 < len(name) <= _MAX_NAME_BYTES or name.startswith(".") or not name.isprintable():
        return False
    return not any(char in name for char in "/\\") and len(name.encode()) <= _MAX_NAME_BYTES
