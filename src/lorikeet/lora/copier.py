"""Adapters on their way to the device: copies run on a thread beside the computation.

The loop's thread reserves the place, and describes it once the copy is complete; in between the thread writes bytes
that nothing reads. So nothing here needs a lock: the two meet in a list of futures.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from lorikeet.core.plan import PageCopy
from lorikeet.errors import EngineFault
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.device_pool import DevicePool
from lorikeet.lora.host_memory import HostMemory

logger = logging.getLogger(__name__)

# Errors of a copy that are no bugs: no memory, a busy device.
_FAILURES = (RuntimeError, MemoryError, OSError)


@dataclass(slots=True, eq=False)
class _Copy:
    order: PageCopy
    adapter: HostAdapter
    began: float
    written: Future[None]


class Copier:
    """Performs page copies.

    Args:
        pool: its slots and page tables are touched on the caller's thread only.
        host: where it copies from.
    """

    def __init__(self, pool: DevicePool, host: HostMemory) -> None:
        self.host = host
        self._pool = pool
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-copy")
        self._copies: list[_Copy] = []
        self._resident: dict[int, _Copy] = {}

    @property
    def is_busy(self) -> bool:
        """True if a copy is on its way or not collected."""
        return bool(self._copies)

    def start(self, order: PageCopy) -> None:
        """Begin a copy.

        Raises:
            EngineFault: the plan names pages or a slot that something else uses.
        """
        adapter = self.host.get(order.version)
        self._pool.reserve(adapter, order)
        written = self._thread.submit(self._pool.write, adapter, order)
        self._copies.append(_Copy(order, adapter, time.monotonic(), written))

    def free(self, slot: int) -> None:
        """Empty a slot that was evicted, or whose copy has failed: it has rank 0 from now on."""
        copy = self._resident.pop(slot, None)
        self._pool.clear_slot(slot)
        if copy is not None:
            logger.info(
                "Adapter %s left the device: version %d, %.2f MB",
                copy.adapter.name,
                copy.order.version,
                copy.adapter.nbytes / 1e6,
            )

    def wait(self, seconds: float) -> None:
        """Wait until a copy is complete, but not longer than that."""
        wait([copy.written for copy in self._copies], seconds, return_when=FIRST_COMPLETED)

    def collect(self) -> tuple[list[int], dict[int, str]]:
        """Describe what has arrived. Returns versions that can be used, and why others cannot.

        Raises:
            EngineFault: a copy failed in a way that nobody foresaw.
        """
        copied: list[int] = []
        failed: dict[int, str] = {}
        for copy in [copy for copy in self._copies if copy.written.done()]:
            self._copies.remove(copy)
            version, error = copy.order.version, copy.written.exception()
            if error is None:
                self._pool.describe(copy.adapter, copy.order)
                self._resident[copy.order.slot] = copy
                copied.append(version)
                self._log(copy)
            elif isinstance(error, _FAILURES):
                logger.error("copying adapter version %d failed", version, exc_info=error)
                self._pool.clear_slot(copy.order.slot)
                failed[version] = str(error) or type(error).__name__
            else:
                raise EngineFault(f"copying adapter version {version} failed") from error
        return copied, failed

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _log(self, copy: _Copy) -> None:
        logger.info(
            "Adapter %s arrived on the device: version %d, %.2f MB, %.0f ms",
            copy.adapter.name,
            copy.order.version,
            copy.adapter.nbytes / 1e6,
            (time.monotonic() - copy.began) * 1e3,
        )
