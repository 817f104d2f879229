"""Where a decode step's time goes, read from a trace of torch's profiler.

On a GPU: the kernels by kind, and when the device had nothing to do. On a CPU the operators take the kernels' place.
"""

from __future__ import annotations

import gzip
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common import Row
from benchmarks.engine.measure import Timeline
from lorikeet.core.request import Request
from lorikeet.engine.core import EngineCore

# The first kind with a matching part decides: attention kernels of libraries may have "gemm" or "softmax" in their
# names, and a norm's may have "add".
KINDS: dict[str, str] = {
    "lora": "lora shrink _expand expand_kernel _resolve sgmv bgmv",
    "attention": "attention attn batchdecode batchprefill pagedkv mergestate flash fmha "
    "persistentvariablelength kernel_mha _attend",
    "norm": "rms_norm rmsnorm layer_norm layernorm norm_kernel _norm",
    "rope": "rope rotary kv_store store_kv",
    "silu-mul": "silu",
    "gemm": "gemm gemv nvjet cutlass cublas splitk wgmma matmul aten::mm aten::addmm aten::bmm "
    "aten::linear",
    "sampling": "draw_tokens sampl softmax argmax topk top_k top_p multinomial sort cumsum",
    "embedding": "embed gather index_select indexselect",
    "copies": "memcpy memset copy fill aten::cat catarray aten::zero",
}
# An idle time on the device shorter than this lies between kernels of one launch; a longer one waits for the host.
HOST_GAP_US = 5.0
_WINDOW = "lorikeet.measured_steps"
_WARMUPS = 4
_TOP = 20

Interval = tuple[float, float]


@dataclass(frozen=True)
class Work:
    """One kernel or operator; microseconds."""

    name: str
    begin: float
    end: float
    own: float


def kind_of(name: str) -> str:
    """The kind of a kernel or operator, by its name."""
    lower = name.lower()
    for kind, parts in KINDS.items():
        if any(part in lower for part in parts.split()):
            return kind
    return "other"


def profile_decode(
    core: EngineCore, requests: Sequence[Request], trace: Path, num_steps: int = 20
) -> Row:
    """Profile ``num_steps`` steps in which every request decodes; the rest of the requests is aborted.

    Args:
        requests: each for at least ``2 * num_steps + 10`` tokens more than the longest prefill takes steps.
        trace: where the trace is written, ``.json.gz``.

    Raises:
        RuntimeError: the requests ended too early.
    """
    timeline = Timeline(len(requests), 0.0)
    for request in requests:
        core.submit(request)
    try:
        while not timeline.all_decode:
            _step(core, timeline)
        for _ in range(_WARMUPS + num_steps):
            _step(core, timeline)
        plain_s = statistics.median(timeline.step_seconds()[-num_steps:])
        _record(core, timeline, trace, num_steps)
    finally:
        core.abort(None, "the profile is complete")
        while not core.is_idle:
            core.step()
    return {
        "concurrency": len(requests),
        "steps": num_steps,
        "unprofiled_step_ms": 1e3 * plain_s,
        "trace": trace.name,
        **read_trace(trace, num_steps),
    }


def _step(core: EngineCore, timeline: Timeline) -> None:
    """Step until tokens come."""
    while not timeline.note(core.step()):
        if core.is_idle:
            raise RuntimeError("the requests ended before the profile was complete: ask for longer")
        core.wait_for_threads()


def _record(core: EngineCore, timeline: Timeline, trace: Path, num_steps: int) -> None:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(_WARMUPS):
            _step(core, timeline)
        with record_function(_WINDOW):
            for _ in range(num_steps):
                _step(core, timeline)
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))


def read_trace(path: Path, num_steps: int) -> Row:
    """The table of a trace that :func:`profile_decode` has written; milliseconds for each step."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    window = next(
        event
        for event in events
        if event["name"] == _WINDOW and event.get("cat") == "user_annotation"
    )
    begin, end = window["ts"], window["ts"] + window["dur"]
    inside = [event for event in events if event["ts"] < end and event["ts"] + event["dur"] > begin]
    kernels = _device_work(inside)
    works = kernels or _operators(inside)
    busy = union((max(work.begin, begin), min(work.end, end)) for work in works)
    waits = [event for event in inside if _is_wait(event) and event["tid"] == window["tid"]]
    waited = sum(
        stop - start for start, stop in union((e["ts"], e["ts"] + e["dur"]) for e in waits)
    )
    idle = gaps(busy, begin, end)
    busy_us = sum(stop - start for start, stop in busy)
    per_step = 1e-3 / num_steps
    return {
        "of": "kernels" if kernels else "operators",
        "profiled_step_ms": (end - begin) * per_step,
        "busy_ms": busy_us * per_step,
        "idle_ms": sum(idle) * per_step,
        "host_gaps_ms": sum(gap for gap in idle if gap >= HOST_GAP_US) * per_step,
        "host_work_ms": (end - begin - waited) * per_step,
        "kinds": _by_kind(works, num_steps),
        "longest": _longest(works, num_steps),
    }


def _device_work(events: Iterable[dict[str, Any]]) -> list[Work]:
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return [
        Work(event["name"], event["ts"], event["ts"] + event["dur"], event["dur"])
        for event in events
        if event.get("cat") in kinds
    ]


def _operators(events: Iterable[dict[str, Any]]) -> list[Work]:
    """Operators with the time that is their own: without that of operators which they call."""
    by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            by_thread[event["tid"]].append(event)
    works: list[Work] = []
    for some in by_thread.values():
        own = [event["dur"] for event in some]
        order = sorted(range(len(some)), key=lambda i: (some[i]["ts"], -some[i]["dur"]))
        stack: list[int] = []
        for index in order:
            while stack and some[stack[-1]]["ts"] + some[stack[-1]]["dur"] <= some[index]["ts"]:
                stack.pop()
            if stack:
                own[stack[-1]] -= some[index]["dur"]
            stack.append(index)
        works += [
            Work(event["name"], event["ts"], event["ts"] + event["dur"], time)
            for event, time in zip(some, own, strict=True)
        ]
    return works


def _is_wait(event: dict[str, Any]) -> bool:
    """True for the calls in which the host waits for the device."""
    return event.get("cat") == "cuda_runtime" and "Synchronize" in event["name"]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in intervals that neither overlap nor touch, in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def gaps(busy: Sequence[Interval], begin: float, end: float) -> list[float]:
    """Lengths of what ``busy`` (disjoint, in order, inside) leaves of the range."""
    begins = [*(start for start, _ in busy), end]
    ends = [begin, *(stop for _, stop in busy)]
    return [later - earlier for earlier, later in zip(ends, begins, strict=True) if later > earlier]


def _by_kind(works: Iterable[Work], num_steps: int) -> dict[str, Row]:
    groups: dict[str, list[Work]] = defaultdict(list)
    for work in works:
        groups[kind_of(work.name)].append(work)
    rows = {
        kind: {
            "ms": 1e-3 * sum(work.own for work in some) / num_steps,
            "calls": len(some) / num_steps,
        }
        for kind, some in groups.items()
    }
    return dict(sorted(rows.items(), key=lambda item: -item[1]["ms"]))


def _longest(works: Iterable[Work], num_steps: int) -> list[Row]:
    """The names that take most time, with their kinds, so that a wrong kind is seen."""
    groups: dict[str, list[Work]] = defaultdict(list)
    for work in works:
        groups[work.name].append(work)
    rows = [
        {
            "name": name[:120],
            "kind": kind_of(name),
            "ms": 1e-3 * sum(work.own for work in some) / num_steps,
            "calls": len(some) / num_steps,
        }
        for name, some in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:_TOP]
