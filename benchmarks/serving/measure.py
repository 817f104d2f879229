"""Requests that arrive at a rate, and what became of them."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import uvloop

from benchmarks.common import Row, percentiles
from benchmarks.engine.traffic import Traffic
from benchmarks.serving.client import Client, Record

PERCENTS = (50, 90, 99)
_SHOWN_ERRORS = 5


@dataclass(frozen=True)
class Load:
    """Requests of one run.

    Attributes:
        adapters: the adapter of each request, in the order of arrival.
        rate: requests per second, as a Poisson process; infinite means all at once.
    """

    adapters: tuple[str | None, ...]
    input_len: int
    output_len: int
    rate: float


def arrivals(num: int, rate: float, source: random.Random) -> list[float]:
    """Seconds from the start at which each of ``num`` requests arrives."""
    if math.isinf(rate):
        return [0.0] * num
    now, times = 0.0, []
    for _ in range(num):
        now += source.expovariate(rate)
        times.append(now)
    return times


def run_load(client: Client, traffic: Traffic, load: Load) -> list[Record]:
    """:func:`send_load` in an event loop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(send_load(client, traffic, load))


async def send_load(client: Client, traffic: Traffic, load: Load) -> list[Record]:
    """Send every request when it is due and wait for the last reply."""
    prompts = [traffic.prompt(load.input_len) for _ in load.adapters]
    offsets = arrivals(len(prompts), load.rate, random.Random(1))

    async def one(began: float, number: int) -> Record:
        record = Record(load.adapters[number], began + offsets[number])
        await asyncio.sleep(record.arrival - time.perf_counter())
        await client.generate(record, prompts[number], load.output_len)
        return record

    # Time for the tasks to be made before the first request is due.
    began = time.perf_counter() + 0.1
    return list(await asyncio.gather(*(one(began, n) for n in range(len(prompts)))))


def summarize(records: Sequence[Record], load: Load) -> Row:
    """One row of the result file. Latencies are of requests that were answered in full."""
    whole = [record for record in records if record.error is None]
    errors = [record.error for record in records if record.error is not None]
    ends = [record.arrival + record.total_s for record in whole]
    duration = max(ends) - min(record.arrival for record in records) if whole else math.nan
    num_tokens = sum(record.num_tokens for record in whole)
    return {
        "rate": "inf" if math.isinf(load.rate) else load.rate,
        "requests": len(records),
        "completed": len(whole),
        "errors": len(errors),
        "error_examples": sorted(set(errors))[:_SHOWN_ERRORS],
        "duration_s": duration if whole else None,
        "requests_per_s": len(whole) / duration if whole else None,
        "output_tokens_per_s": num_tokens / duration if whole else None,
        "total_tokens_per_s": (num_tokens + len(whole) * load.input_len) / duration
        if whole
        else None,
        **latencies(whole),
        "client_lag": percentiles([record.sent - record.arrival for record in whole], PERCENTS),
        "by_adapter": _by_adapter(records),
    }


def latencies(records: Sequence[Record]) -> dict[str, Row]:
    """Percentiles in milliseconds."""
    tokens = [record.per_token_s for record in records]
    return {
        "first_token": percentiles([record.first_token_s for record in records], PERCENTS),
        "between_tokens": percentiles([gap for r in records for gap in r.gaps_s], PERCENTS),
        "per_token": percentiles([time for time in tokens if time is not None], PERCENTS),
        "end_to_end": percentiles([record.total_s for record in records], PERCENTS),
    }


def _by_adapter(records: Sequence[Record]) -> dict[str, Row]:
    """Requests and latencies of each adapter, the busiest first; the base model's name is empty."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.adapter or ""].append(record)
    rows: dict[str, Row] = {}
    for name, some in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        whole = [record for record in some if record.error is None]
        rows[name] = {"requests": len(some), "errors": len(some) - len(whole), **latencies(whole)}
    return rows
