"""Bounds on reading an adapter: how far it may go (local disk, caches, network), for how long, and a way to cancel it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from enum import IntEnum
from typing import Any, TypeVar

from lorikeet.errors import AdapterError

T = TypeVar("T")


class Reach(IntEnum):
    """Where an adapter may be read from; each includes those before it."""

    LOCAL = 0
    #: What was downloaded earlier. The source is not asked whether it still has the same.
    CACHE = 1
    NETWORK = 2


class NeedsNetworkError(AdapterError):
    """The adapter cannot be read within this reach.

    Args:
        host: who would have to be asked, so that a slow host holds up only its own adapters.
    """

    def __init__(self, message: str, host: str) -> None:
        super().__init__(message)
        self.host = host


class TransferEndedError(AdapterError):
    """The time is over, or nobody wants the adapter any more."""


class Transfer:
    """One reading of an adapter. It may be ended from another thread, which ends what it waits for.

    Args:
        seconds: that it may take in total, from now on; None: any time.
    """

    def __init__(self, reach: Reach = Reach.NETWORK, seconds: float | None = None) -> None:
        self.reach = reach
        self._seconds = seconds
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._is_cancelled = threading.Event()
        # Ends what is waited for now.
        self._stop: Callable[[], object] | None = None

    def cancel(self) -> None:
        """End it: nobody wants the adapter any more."""
        self._is_cancelled.set()
        stop = self._stop
        if stop is not None:
            stop()

    def check(self) -> None:
        """Raise TransferEndedError if it is over."""
        if self._is_cancelled.is_set():
            raise TransferEndedError("its loading was cancelled")
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise TransferEndedError(
                f"its download took more than {self._seconds:g} s (--lora-download-timeout); another load goes on where "
                "this one stopped"
            )

    def sleep(self, seconds: float) -> None:
        """Wait, but not beyond the end.

        Raises:
            TransferEndedError: it is over.
        """
        self._is_cancelled.wait(min(seconds, self._remaining(seconds)))
        self.check()

    def wait(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of ``coroutine``, which runs on another thread's ``loop``. At the end it is cancelled, which closes
        its connections.

        Raises:
            TransferEndedError: it is over.
        """
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        self._stop = future.cancel
        try:
            # Between the two lines above it may have been cancelled.
            self.check()
            return future.result(None if self._deadline is None else self._remaining(0.0))
        except CancelledError:
            self.check()
            raise ConnectionError("the request was cancelled") from None
        except TimeoutError:
            # Also what the request itself may raise.
            self.check()
            raise
        finally:
            self._stop = None
            future.cancel()

    def run(self, job: Callable[[], T]) -> T:
        """The result of ``job``, which may block where nothing can stop it: then it is left behind, on a daemon thread.

        Raises:
            TransferEndedError: it is over.
        """
        if self._deadline is None and self.reach < Reach.NETWORK:
            return job()
        future: Future[T] = Future()

        def body() -> None:
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 - the waiting thread raises it
                future.set_exception(error)

        is_over = threading.Event()
        future.add_done_callback(lambda _: is_over.set())
        self._stop = is_over.set
        self.check()
        threading.Thread(target=body, name="adapter-hub", daemon=True).start()
        is_over.wait(None if self._deadline is None else self._remaining(0.0))
        self._stop = None
        if not future.done():
            self.check()
        return future.result()

    def _remaining(self, default: float) -> float:
        if self._deadline is None:
            return default
        return max(0.0, self._deadline - time.monotonic())
