"""A tensor-parallel group of threads: real collectives without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

ResultT = TypeVar("ResultT")


class ThreadRank:
    """One member of a group made by :func:`run_ranks`."""

    def __init__(self, rank: int, slots: list[object], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.size = len(slots)
        self._slots = slots
        self._barrier = barrier

    def _exchange(self, value: object) -> list[object]:
        self._slots[self.rank] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()  # nobody overwrites a slot that another has yet to read
        return values

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([t for t in self._exchange(tensor) if isinstance(t, torch.Tensor)]).sum(
            0
        )

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([t for t in self._exchange(tensor) if isinstance(t, torch.Tensor)], dim)


def run_ranks(size: int, work: Callable[[ThreadRank], ResultT]) -> list[ResultT]:
    """Call ``work`` once for each rank, at the same time; the results in rank order."""
    slots: list[object] = [None] * size
    barrier = threading.Barrier(size, timeout=30)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, [ThreadRank(rank, slots, barrier) for rank in range(size)]))
