"""Threads that read adapters. Each job has a thread of its own, which the interpreter does not wait for at its end."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class ReaderThreads:
    """Runs jobs, the oldest first.

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
