"""What the scheduler reports about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Gauges of this moment, and counters (``total_*``) since the start.

    Attributes:
        num_running_adapters: distinct adapters among the running sequences.
        num_waiting_adapters: distinct adapters among the waiting ones.
        num_used_pages: pages that running sequences hold.
        num_cached_pages: pages that only the prefix cache holds.
        total_prompt_tokens: of admitted sequences; ``total_cached_tokens`` of them came from the cache.
        total_preemptions: times a sequence lost its pages.
        total_finished: sequences that ended, however they did.
    """

    num_running: int
    num_waiting: int
    num_running_adapters: int
    num_waiting_adapters: int
    num_pages: int
    num_used_pages: int
    num_cached_pages: int
    total_prompt_tokens: int
    total_cached_tokens: int
    total_output_tokens: int
    total_preemptions: int
    total_finished: int

    @property
    def token_usage(self) -> float:
        """Share of the pool that running sequences hold, 0 to 1."""
        return self.num_used_pages / self.num_pages


@dataclass(slots=True)
class Counters:
    """What ``SchedulerStats.total_*`` is read from."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
