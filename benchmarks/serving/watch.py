"""What others see of a server meanwhile: answers of ``/health``, requests for one token, the memory of its processes.

Others ask from a process of their own (``python -m benchmarks.serving.watch``), or the load's client would delay them.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import uvloop

from benchmarks.common import ROOT, Row, percentiles
from benchmarks.engine.traffic import Traffic
from benchmarks.serving.client import Client, Record, ReplyError

if TYPE_CHECKING:
    from benchmarks.serving.target import Target

HEALTH_PAUSE_S = 0.01
# The engine is idle in between, so that its end of everything else can be seen.
TOKEN_PAUSE_S = 0.1
PROMPT_TOKENS = 16
# Until memory that is given back late has been given back.
SETTLE_S = 2.0


@asynccontextmanager
async def watched(target: Target) -> AsyncIterator[Row]:
    """Watch a server that was started here; the row has the figures afterwards."""
    seen: Row = {}
    setting = {"url": target.url, "key": target.api_key, "vocab_size": target.vocab_size}
    pipe = asyncio.subprocess.PIPE
    words = (sys.executable, "-m", "benchmarks.serving.watch")
    process = await asyncio.create_subprocess_exec(*words, cwd=ROOT, stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(orjson.dumps(setting) + b"\n")
        await process.stdout.readline()
        processes = _processes(target)
        before = {name: _forget_peak(pid) for name, pid in processes.items()}
        yield seen
    finally:
        process.stdin.close()
        found = await process.stdout.read()
        await process.wait()
    seen |= orjson.loads(found)
    peaks = {name: _memory_mb(pid, "VmHWM") for name, pid in processes.items()}
    await asyncio.sleep(SETTLE_S)
    seen["memory_mb"] = {
        name: {"before": before[name], "peak": peaks[name], "after": _memory_mb(pid, "VmRSS")}
        for name, pid in processes.items()
    }


def _processes(target: Target) -> dict[str, int]:
    """The HTTP process, and its largest child, which is the engine."""
    children = Path(f"/proc/{target.pid}/task/{target.pid}/children").read_text().split()
    engine = max(map(int, children), key=lambda pid: _memory_mb(pid, "VmRSS"))
    assert target.pid is not None
    return {"http": target.pid, "engine": engine}


def _forget_peak(pid: int) -> float:
    """Let the peak begin anew; returns what the process has now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _memory_mb(pid, "VmRSS")


def _memory_mb(pid: int, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0  # a process that is about to end has none


async def _watch(setting: dict[str, Any]) -> Row:
    """Ask until the standard input ends. A request that is under way then is waited for."""
    client = Client(setting["url"], setting["key"])
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.buffer.read))
    # A seed of its own: no prompt of the load's begins alike.
    traffic = Traffic(setting["vocab_size"], random.Random(1))
    health, tokens = await asyncio.gather(
        _ask_health(client, ended), _ask_tokens(client, traffic, ended)
    )
    return {"health": health, "one_token": tokens}


async def _ask_health(client: Client, ended: asyncio.Task[bytes]) -> Row:
    times: list[float] = []
    num_failed = 0
    while not ended.done():
        began = time.perf_counter()
        try:
            status, _ = await client.ask("GET", "/health")
        except (OSError, ReplyError):
            status = 0
        if status == 200:
            times.append(time.perf_counter() - began)
        else:
            num_failed += 1
        await asyncio.sleep(HEALTH_PAUSE_S)
    return {**percentiles(times), "failed": num_failed}


async def _ask_tokens(client: Client, traffic: Traffic, ended: asyncio.Task[bytes]) -> Row:
    records: list[Record] = []
    while not ended.done():
        records.append(Record(None, time.perf_counter()))
        await client.generate(records[-1], traffic.prompt(PROMPT_TOKENS), 1)
        await asyncio.sleep(TOKEN_PAUSE_S)
    errors = [record.error for record in records if record.error is not None]
    return {
        **percentiles([record.total_s for record in records if record.error is None]),
        "failed": len(errors),
        "error_examples": sorted(set(errors))[:3],
    }


def main() -> None:
    """Read the setting as a line of JSON, ask until the input ends, and write the figures as JSON."""
    setting = orjson.loads(sys.stdin.buffer.readline())
    print("watching", flush=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.stdout.buffer.write(orjson.dumps(runner.run(_watch(setting))))


if __name__ == "__main__":
    main()
