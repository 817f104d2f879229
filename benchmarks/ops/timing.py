"""Timing of kernels as a captured step runs them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

_REPLAYS = 10
_ROUNDS = 5


def graph_us(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds that a CUDA graph of all calls, in turn, takes: the median over rounds of replays.

    Each call is made once beforehand, which compiles what it needs.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / _REPLAYS)
    return statistics.median(times)
