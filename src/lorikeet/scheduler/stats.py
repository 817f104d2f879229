"""What the scheduler reports about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Gauges of this moment, and counters (``total_*``) since the start.

    Attributes:
        num_running_adapters: distinct adapters among the running sequences.
        num_waiting_adapters: distinct adapters among the waiting ones.
        running_versions, waiting_versions: which these are; a version may be in both.
        num_waiting_for_adapter: waiting sequences whose adapter is not on the device.
        num_used_pages: pages that running sequences hold.
        num_cached_pages: pages that only the prefix cache holds.
        total_prompt_tokens: of admitted sequences; ``total_cached_tokens`` of them came from the cache.
        total_preemptions: times a sequence lost its pages.
        total_finished: sequences that ended, however they did.
        total_adapter_device_evictions: adapters that had to leave the device for others.
    """

    num_running: int
    num_waiting: int
    num_running_adapters: int
    num_waiting_adapters: int
    running_versions: tuple[int, ...]
    waiting_versions: tuple[int, ...]
    num_waiting_for_adapter: int
    num_pages: int
    num_used_pages: int
    num_cached_pages: int
    total_prompt_tokens: int
    total_cached_tokens: int
    total_output_tokens: int
    total_preemptions: int
    total_finished: int
    total_adapter_device_evictions: int

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
