"""The three measurements; each starts servers of its own and returns rows for the result file."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Row, percentiles
from benchmarks.lifecycle.client import Server, Timing, prompts, running_server
from benchmarks.lifecycle.fixtures import AdapterShape

TIERS = ("device", "host", "disk")


@dataclass(frozen=True)
class Bench:
    """What the measurements share: the base model, the adapters on disk, how long a run is."""

    model: Path
    adapters: Sequence[Path]
    shape: AdapterShape
    seconds: float
    prompt_tokens: int = 32
    new_tokens: int = 16

    def server(self, slots: int, **options: object) -> Any:
        return running_server(
            self.model,
            max_loras_per_batch=slots,
            max_lora_rank=self.shape.rank,
            lora_target_modules=self.shape.targets,
            **options,
        )

    def register(self, server: Server, num: int) -> tuple[list[str], list[float]]:
        """Names of ``num`` adapters that are now loaded, and the seconds that each took."""
        names = [f"a{number}" for number in range(num)]
        return names, [server.load(n, p) for n, p in zip(names, self.adapters[:num], strict=True)]


def cold_start(bench: Bench, *, slots: int, registered: int) -> Row:
    """Time to first token of one request at a time, by the tier in which its adapter was found.

    A third of the adapters fits in host memory (at least two more than the slots), so that all three tiers are met.
    """
    host = max(registered // 3, slots + 2)
    samples: dict[str, list[float]] = {tier: [] for tier in TIERS}
    source = random.Random(0)
    with bench.server(slots, max_loaded_loras=host) as server:
        names, loads = bench.register(server, registered)
        prompt = prompts(bench.prompt_tokens, seed=1)
        recent: list[str] = []
        server.stream(None, next(prompt), 4)
        ends = time.perf_counter() + bench.seconds
        while time.perf_counter() < ends:
            name = _next_name(source, names, recent, slots, host)
            tier = server.tier(name)
            first = server.stream(name, next(prompt), 2).first
            if tier in samples:
                samples[tier].append(first)
            recent = [name, *(other for other in recent if other != name)]
    return {
        "slots": slots,
        "registered": registered,
        "max_loaded_loras": host,
        "load": percentiles(loads),
        **{tier: percentiles(found) for tier, found in samples.items()},
    }


def _next_name(
    source: random.Random, names: list[str], recent: list[str], slots: int, host: int
) -> str:
    """One of those used last, one of those used somewhat earlier, or any: about as many of each tier."""
    choice = source.randrange(3)
    if choice == 0 and recent:
        return source.choice(recent[:slots])
    if choice == 1 and len(recent) > slots:
        return source.choice(recent[slots:host])
    return source.choice(names)


def live_adapters(bench: Bench, *, slots: int, live: int) -> Row:
    """Every one of ``live`` adapters has one client that asks again as soon as it is answered."""
    with bench.server(slots) as server:
        names, _ = bench.register(server, live)
        began = time.perf_counter()
        ends = began + bench.seconds

        def ask(number: int) -> list[Timing]:
            prompt = prompts(bench.prompt_tokens, seed=number)
            timings = []
            while time.perf_counter() < ends:
                timings.append(server.stream(names[number], next(prompt), bench.new_tokens))
            return timings

        with ThreadPoolExecutor(live) as clients:
            by_client = list(clients.map(ask, range(live)))
        elapsed = time.perf_counter() - began
    timings = [timing for some in by_client for timing in some]
    served = [len(some) for some in by_client]
    return {
        "slots": slots,
        "live": live,
        "tokens_per_second": len(timings) * bench.new_tokens / elapsed,
        "requests_of_a_client": {"least": min(served), "most": max(served)},
        "first_token": percentiles([timing.first for timing in timings]),
        "between_tokens": percentiles([gap for timing in timings for gap in timing.gaps]),
    }


def load_pause(bench: Bench, *, slots: int) -> Row:
    """The longest gap in a running stream: alone, beside other requests, and beside loads of which each is used.

    A loaded adapter is used once, because only that copies it to the device. The same requests without loads say how
    much of a gap is their prefill; the stream alone says how much is the machine. Ratios are to its median step.
    """
    with bench.server(slots) as server:
        names, _ = bench.register(server, 2)
        prompt = prompts(bench.prompt_tokens, seed=2)
        loads: list[float] = []
        for name in names:
            server.stream(name, next(prompt), 16)

        def ask(number: int) -> None:
            server.stream(names[1], next(asked), 1)

        def load(number: int) -> None:
            path = bench.adapters[2 + number % (len(bench.adapters) - 2)]
            loads.append(server.load(f"other{number}", path))
            server.stream(f"other{number}", next(asked), 1)
            server.unload(f"other{number}")

        asked = prompts(4, seed=3)
        alone = _gaps(server, names[0], prompt, bench.seconds)
        with _repeated(ask):
            beside_requests = _gaps(server, names[0], prompt, bench.seconds)
        with _repeated(load):
            beside_loads = _gaps(server, names[0], prompt, bench.seconds)
    step = statistics.median(alone)
    return {
        "slots": slots,
        "loads": len(loads),
        "load": percentiles(loads),
        "alone": percentiles(alone),
        "beside_requests": percentiles(beside_requests),
        "beside_loads": percentiles(beside_loads),
        "longest_gap_to_step": {
            "alone": max(alone) / step,
            "beside_requests": max(beside_requests) / step,
            "beside_loads": max(beside_loads) / step,
        },
    }


def _gaps(server: Server, name: str, prompt: Iterator[list[int]], seconds: float) -> list[float]:
    """Gaps between the tokens of one stream after the other."""
    gaps: list[float] = []
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        gaps += server.stream(name, next(prompt), 256).gaps
    return gaps


@contextmanager
def _repeated(work: Callable[[int], None]) -> Iterator[None]:
    """Call ``work`` with 0, 1, 2, ... on a thread, with a short rest between, while the body runs."""
    stop = threading.Event()

    def repeat() -> None:
        number = 0
        while not stop.is_set():
            work(number)
            number += 1
            stop.wait(0.02)

    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(repeat)
        try:
            yield
        finally:
            stop.set()
        # What went wrong there is this measurement's failure.
        done.result()
