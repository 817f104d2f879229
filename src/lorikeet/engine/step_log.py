"""The ``Prefill batch`` and ``Decode batch`` lines of the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from lorikeet.core.plan import StepPlan
from lorikeet.scheduler.stats import SchedulerStats

# A decode line per step would be most of the log; every 40 steps shows the trend.
DECODE_INTERVAL = 40


class StepLog:
    """Counts steps and writes a line for each prefill and for every 40th decode.

    Args:
        stats: the scheduler's; asked only for a line, because it walks over all adapters that wait.
    """

    def __init__(self, logger: logging.Logger, stats: Callable[[], SchedulerStats]) -> None:
        self._logger = logger
        self._stats = stats
        self._num_decodes = 0
        self._num_generated = 0
        self._since = time.monotonic()

    def step(self, plan: StepPlan) -> None:
        """Note one plan that was executed and committed."""
        self._num_generated += len(plan.rows) + sum(chunk.sample for chunk in plan.chunks)
        if plan.chunks:
            self._prefill(plan)
        elif plan.rows:
            self._num_decodes += 1
            if self._num_decodes % DECODE_INTERVAL == 0:
                self._decode(plan)

    def _prefill(self, plan: StepPlan) -> None:
        self._logger.info(
            "Prefill batch, #new-seq: %d, #new-token: %d, #cached-token: %d, %s",
            len(plan.starts),
            sum(chunk.end - chunk.start for chunk in plan.chunks),
            sum(start.num_cached for start in plan.starts),
            _state(self._stats()),
        )

    def _decode(self, plan: StepPlan) -> None:
        now = time.monotonic()
        rate = self._num_generated / max(now - self._since, 1e-9)
        self._num_generated, self._since = 0, now
        self._logger.info(
            "Decode batch, #row: %d, %s, gen throughput (token/s): %.2f",
            len(plan.rows),
            _state(self._stats()),
            rate,
        )


def _state(stats: SchedulerStats) -> str:
    return (
        f"token usage: {stats.token_usage:.2f}, #running-req: {stats.num_running}, "
        f"#queue-req: {stats.num_waiting}, #adapters: {stats.num_running_adapters}"
    )
