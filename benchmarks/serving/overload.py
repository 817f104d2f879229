"""Measure what neighbours see of calls that are large, many, or left: is anybody else kept waiting, does memory grow?

    python -m benchmarks.serving.overload                              # about five minutes on 2 cores
    python -m benchmarks.serving.overload --only long_prompts upload

Each measurement starts a server of its own. Beside the load a process asks for ``/health`` and for one token all the time.
Prints a table; writes a result file to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import uvloop
from safetensors.torch import load_file, save

from benchmarks import common
from benchmarks.common import Row
from benchmarks.engine.fixtures import write_adapters, write_model
from benchmarks.engine.traffic import Traffic, choose_adapters
from benchmarks.lifecycle.fixtures import ALL_LINEAR, LLAMA
from benchmarks.serving.client import Client, Record, generate_body
from benchmarks.serving.measure import Load, send_load, summarize
from benchmarks.serving.target import Target, started
from benchmarks.serving.watch import watched
from lorikeet import demo
from lorikeet.models.spec import read_model_spec

WHAT = "what neighbours see of calls that are large, many, or left"
PACKAGES = ("torch", "fastapi", "uvicorn", "uvloop", "h11", "pyzmq")
# Of anything that is waited for here.
TIMEOUT_S = 600.0
POLL_S = 0.02
WINDOW_S = 3.0
PIECE = 1 << 20
# Connections that are opened together. The system keeps some 2,000 until they are accepted; those beyond that try again
# after 1, 3, 7 and 15 seconds, neighbours' as well, and that would be all that is measured.
WAVE = 250
# Of the engine. Where its threads have to share cores with the server's HTTP process and the clients, all of them wait for
# the one that is not running, and a step takes many times as long.
THREADS = max(1, (os.cpu_count() or 1) - 1)

_LLAMA = LLAMA | {"vocab_size": 320}
# Small, so that a long prompt takes a minute and not an hour.
LONG_CONTEXT = _LLAMA | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
}
# An adapter of rank 238 on all its linear layers has 142 MB in float32, which is a body of 190 MB.
LARGE_ADAPTER = _LLAMA | {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class Scene:
    """One server and what is asked of it.

    Attributes:
        scale: 1 is the load as named; a test takes a smaller one.
    """

    target: Target
    client: Client
    traffic: Traffic
    scale: float

    def num(self, full: int) -> int:
        return max(1, round(full * self.scale))

    def bodies(self, num: int, output_len: int, *, stream: bool = False) -> list[bytes]:
        """Of ``num`` requests with prompts of 32 tokens."""
        return [
            generate_body(self.traffic.prompt(32), output_len, stream=stream) for _ in range(num)
        ]


# ---- measurements ----


async def many_streams(scene: Scene) -> Row:
    """1,000 clients stream 16 tokens at once, from 8 adapters."""
    names = choose_adapters(scene.target.adapters, scene.num(1000), "distinct", random.Random(0))
    load = Load(tuple(names), 32, 16, float("inf"))
    async with watched(scene.target) as seen:
        records = await send_load(scene.client, scene.traffic, load)
    row = summarize(records, load)
    del row["by_adapter"]
    return {**row, **seen}


async def unread_streams(scene: Scene) -> Row:
    """200 clients ask for a stream of 128 tokens and do not read it."""
    bodies = scene.bodies(scene.num(200), 128, stream=True)
    async with watched(scene.target) as seen:
        began = time.perf_counter()
        sockets = await asyncio.to_thread(_send_unread, scene, bodies)
        await _idle(scene.client)
        took = time.perf_counter() - began
    for unread in sockets:
        unread.close()
    return {"streams": len(bodies), "engine_done_s": took, **seen}


async def slow_senders(scene: Scene) -> Row:
    """300 heads and 300 bodies of which a byte comes each second, and 100 connections on which nothing comes."""
    async with watched(scene.target) as seen:
        row = await slow_connections(scene.client, scene.num(300), scene.num(100))
    return {**row, **seen}


async def long_prompts(scene: Scene) -> Row:
    """Two prompts of 50,000 tokens, sent together."""
    prompts = [scene.traffic.prompt(scene.num(50_000)) for _ in range(2)]
    async with watched(scene.target) as seen:
        records = [Record(None, time.perf_counter()) for _ in prompts]
        await asyncio.gather(
            *(scene.client.generate(r, p, 1) for r, p in zip(records, prompts, strict=True))
        )
    ends = sorted(record.total_s for record in records if record.error is None)
    return {"prompt_tokens": len(prompts[0]), "ends_s": ends, "errors": 2 - len(ends), **seen}


async def left_long_prompt(scene: Scene) -> Row:
    """A prompt of 50,000 tokens whose client leaves while it is computed."""
    prompt = scene.traffic.prompt(scene.num(50_000))
    async with watched(scene.target) as seen:
        request = asyncio.create_task(
            scene.client.generate(Record(None, time.perf_counter()), prompt, 1)
        )
        await asyncio.sleep(5 * scene.scale)
        was_done = request.done()
        await _leave([request])
        took = await _idle(scene.client)
    return {"done_before_leaving": was_done, "engine_free_s": took, **seen}


async def abort_queued(scene: Scene) -> Row:
    """5,000 requests are open, of which 48 run, when ``abort_request`` ends them all."""
    async with _queue(scene) as (seen, requests):
        began = time.perf_counter()
        status, _ = await scene.client.ask("POST", "/abort_request", b'{"abort_all": true}')
        reply = time.perf_counter() - began
        answers = await asyncio.gather(*requests)
        took = time.perf_counter() - began
        seen |= {"abort_status": status, "abort_reply_s": reply, "all_ended_s": took}
        seen["answers"] = Counter(_outcome(*answer) for answer in answers)
    return seen


async def left_queued(scene: Scene) -> Row:
    """5,000 requests are open, of which 48 run, when all their clients leave."""
    async with _queue(scene) as (seen, requests):
        seen["done_before_leaving"] = sum(request.done() for request in requests)
        began = time.perf_counter()
        await _leave(requests)
        seen["clients_gone_s"] = time.perf_counter() - began
        await _idle(scene.client)
        seen["engine_free_s"] = time.perf_counter() - began
    return seen


async def left_flushes(scene: Scene) -> Row:
    """500 clients wait for ``/flush_cache``, then leave, beside one stream that never ends."""
    records: list[Record] = []

    async def stream() -> None:
        while True:
            records.append(Record(None, time.perf_counter()))
            await scene.client.generate(records[-1], scene.traffic.prompt(32), 1024)

    async def rate() -> float:
        before = sum(len(record.events) for record in records)
        began = time.perf_counter()
        await asyncio.sleep(max(0.2, WINDOW_S * scene.scale))
        now = sum(len(record.events) for record in records)
        return (now - before) / (time.perf_counter() - began)

    async with watched(scene.target) as seen:
        streaming = asyncio.create_task(stream())
        row = {"events_per_s_alone": await rate()}
        path = "/flush_cache?timeout=600"
        flushes = [
            asyncio.create_task(scene.client.ask("POST", path)) for _ in range(scene.num(500))
        ]
        row["events_per_s_while_they_wait"] = await rate()
        await _leave(flushes)
        row["events_per_s_after_they_left"] = await rate()
        await _leave([streaming])
    return {"flushes": len(flushes), **row, **seen}


async def upload(scene: Scene) -> Row:
    """An adapter is uploaded with a body of 190 MB, asked for a token, and unloaded."""
    body = _adapter_body(scene.target)
    async with watched(scene.target) as seen:
        began = time.perf_counter()
        status, _ = await scene.client.ask("POST", "/load_lora_adapter_from_tensors", body)
        loaded = time.perf_counter() - began
        record = Record("uploaded", time.perf_counter())
        await scene.client.generate(record, scene.traffic.prompt(32), 1)
        await scene.client.ask("POST", "/unload_lora_adapter", b'{"lora_name": "uploaded"}')
    return {
        "body_mb": len(body) / 1e6,
        "status": status,
        "loaded_s": loaded,
        "error_of_its_request": record.error,
        **seen,
    }


async def bodies_without_key(scene: Scene) -> Row:
    """32 bodies of 33 MB without the key that the server asks for."""
    stranger = Client(scene.target.url)
    size = scene.num(33_000_000)
    async with watched(scene.target) as seen:
        began = time.perf_counter()
        found = await asyncio.gather(*(_refusal(stranger, size) for _ in range(32)))
        took = time.perf_counter() - began
    return {
        "body_mb": size / 1e6,
        "statuses": Counter(str(status) for status, _ in found),
        "refused_s": max(when for _, when in found) - began,
        "all_sent_s": took,
        **seen,
    }


# ---- their parts ----


@asynccontextmanager
async def _queue(scene: Scene) -> AsyncIterator[tuple[Row, list[asyncio.Task[tuple[int, bytes]]]]]:
    """5,000 open requests, and the row that has what others saw of them afterwards."""
    bodies = scene.bodies(scene.num(5000), 1024)
    row: Row = {"requests": len(bodies)}
    async with watched(scene.target) as seen:
        began = time.perf_counter()
        requests: list[asyncio.Task[tuple[int, bytes]]] = []
        for number, body in enumerate(bodies):
            requests.append(asyncio.create_task(scene.client.ask("POST", "/generate", body)))
            if number % WAVE == WAVE - 1:
                await asyncio.sleep(0.1)
        row["open_before"] = await _all_open(scene.client, requests)
        row["opened_s"] = time.perf_counter() - began
        yield row, requests
    row |= seen


async def _all_open(client: Client, requests: Sequence[asyncio.Task[object]]) -> int:
    """Requests that run or wait, as soon as the engine knows nearly all that are not answered yet."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            _, content = await client.ask("GET", "/get_server_info")
            state = orjson.loads(content)["internal_states"][0]
            num_open = int(state["num_running"] + state["num_waiting"])
            if num_open + sum(request.done() for request in requests) >= 0.95 * len(requests):
                return num_open
            await asyncio.sleep(POLL_S)


async def _idle(client: Client) -> float:
    """Seconds until nothing runs or waits: the cache is flushed only then."""
    began = time.perf_counter()
    async with asyncio.timeout(TIMEOUT_S):
        while (await client.ask("POST", "/flush_cache"))[0] != 200:
            await asyncio.sleep(POLL_S)
    return time.perf_counter() - began


async def _leave(requests: Sequence[asyncio.Task[object]]) -> None:
    """Close the connections of these requests."""
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)


def _outcome(status: int, content: bytes) -> str:
    """Like ``200 abort``."""
    if status != 200:
        return str(status)
    return f"200 {orjson.loads(content)['meta_info']['finish_reason']['type']}"


def _send_unread(scene: Scene, bodies: Sequence[bytes]) -> list[socket.socket]:
    address = scene.client.address
    sockets: list[socket.socket] = []
    for body in bodies:
        unread = socket.socket()
        # Less than a stream: the system must not read it for the client.
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unread.connect(address)
        unread.sendall(scene.client.head("POST", "/generate", len(body)) + body)
        sockets.append(unread)
    return sockets


async def slow_connections(client: Client, num_slow: int, num_silent: int) -> Row:
    """When the server closes connections on which bytes come slowly or not at all, and what it says before."""
    head = client.head("POST", "/generate", 1000)
    kinds = {
        "heads": [(head[:20], b"x")] * num_slow,
        "bodies": [(head, b" ")] * num_slow,
        "silent": [(b"", b"")] * num_silent,
    }
    sent = [pieces for some in kinds.values() for pieces in some]
    ends = iter(await asyncio.gather(*(_slow_connection(client, *pieces) for pieces in sent)))
    row: Row = {}
    for kind, some in kinds.items():
        found = list(itertools.islice(ends, len(some)))
        times = [closed for _, closed in found]
        row[kind] = {
            "n": len(found),
            "answers": Counter(answer for answer, _ in found),
            "first_closed_s": min(times),
            "last_closed_s": max(times),
        }
    return row


async def _slow_connection(client: Client, first: bytes, later: bytes) -> tuple[str, float]:
    """What is answered, and seconds until the connection is closed; ``later`` is sent each second."""
    reader, writer = await client.open()
    began = time.perf_counter()
    writer.write(first)
    answer = b""
    with suppress(OSError):
        async with asyncio.timeout(TIMEOUT_S) as limit:
            while True:
                try:
                    piece = await asyncio.wait_for(reader.read(4096), 1.0)
                except TimeoutError:
                    if limit.expired():
                        raise
                    writer.write(later)
                    continue
                if not piece:
                    break
                answer += piece
    took = time.perf_counter() - began
    writer.close()
    return answer[9:12].decode() or "none", took


def _adapter_body(target: Target) -> bytes:
    """Body of an upload: an adapter of the largest rank that the server takes, in float32."""
    spec, rank = read_model_spec(Path(target.info["model_path"])), target.info["max_lora_rank"]
    with tempfile.TemporaryDirectory(prefix="lorikeet-overload-") as temporary:
        (path,) = write_adapters(Path(temporary), 1, spec, rank)
        tensors = load_file(path / "adapter_model.safetensors")
        config = orjson.loads((path / "adapter_config.json").read_bytes())
    data = save({name: tensor.float() for name, tensor in tensors.items()})
    text = base64.b64encode(data).decode()
    return orjson.dumps({"lora_name": "uploaded", "config_dict": config, "tensors": text})


async def _refusal(client: Client, size: int) -> tuple[int, float]:
    """Send a body to its end; the status that came meanwhile, and when."""
    reader, writer = await client.open()

    async def send() -> None:
        for begin in range(0, size, PIECE):
            writer.write(bytes(min(PIECE, size - begin)))
            await writer.drain()

    writer.write(client.head("POST", "/generate", size))
    sending = asyncio.create_task(send())
    status = int((await reader.readline()).split()[1])
    when = time.perf_counter()
    await asyncio.gather(sending, return_exceptions=True)  # the server may have hung up
    writer.close()
    return status, when


# ---- all of them ----


@dataclass(frozen=True)
class Setup:
    """The server of a measurement.

    Attributes:
        model: its configuration; None is the demo model.
    """

    model: dict[str, object] | None = None
    adapters: int = 0
    options: dict[str, object] = field(default_factory=dict)


_LONG = Setup(LONG_CONTEXT, options={"context_length": 110_000, "max_total_tokens": 220_000})
_LARGE = Setup(
    LARGE_ADAPTER,
    options={
        "enable_lora": True,
        "max_lora_rank": 238,
        "max_loras_per_batch": 1,
        "lora_target_modules": ALL_LINEAR,
    },
)
MEASUREMENTS: dict[str, tuple[Callable[[Scene], Awaitable[Row]], Setup]] = {
    "many_streams": (many_streams, Setup(adapters=8)),
    "unread_streams": (unread_streams, Setup()),
    "slow_senders": (slow_senders, Setup()),
    "long_prompts": (long_prompts, _LONG),
    "left_long_prompt": (left_long_prompt, _LONG),
    "abort_queued": (abort_queued, Setup()),
    "left_queued": (left_queued, Setup()),
    "left_flushes": (left_flushes, Setup()),
    "upload": (upload, _LARGE),
    "bodies_without_key": (bodies_without_key, Setup(options={"api_key": "overload"})),
}
# What a server takes on a CPU; the benchmarks' own value is for a GPU.
DEFAULTS: dict[str, object] = {"device": "cpu", "max_running_requests": 48}


def measure(name: str, target: Target, scale: float) -> Row:
    """The row of one measurement: its figures, and what the others saw."""
    scene = Scene(target, Client(target.url, target.api_key), Traffic(target.vocab_size), scale)

    async def run() -> Row:
        warm = Load(target.adapters or (None,) * 4, 16, 8, float("inf"))
        await send_load(scene.client, scene.traffic, warm)
        return await MEASUREMENTS[name][0](scene)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return {"measurement": name, **runner.run(run())}


def run_alone(name: str, scale: float) -> Row:
    """One measurement on a server of its own."""
    setup = MEASUREMENTS[name][1]
    with tempfile.TemporaryDirectory(prefix="lorikeet-overload-") as temporary:
        model = demo.NAME
        if setup.model is not None:
            model = str(Path(temporary) / "model")
            write_model(Path(model), setup.model)
        with started(model, setup.adapters, 16, DEFAULTS | setup.options) as target:
            return measure(name, target, scale)


def tables(rows: Sequence[Row]) -> str:
    """The results for a person."""
    header = ("measurement", "/health", "one token", "failed", "HTTP process", "engine")
    lines = [
        [
            row["measurement"],
            _times(row["health"]),
            _times(row["one_token"]),
            f"{row['health']['failed']} / {row['one_token']['failed']}",
            *(_memory(row["memory_mb"][name]) for name in ("http", "engine")),
        ]
        for row in rows
    ]
    others = {"measurement", "health", "one_token", "memory_mb"}
    figures = [
        f"{row['measurement']}: {orjson.dumps({k: v for k, v in row.items() if k not in others}).decode()}"
        for row in rows
    ]
    return "\n".join(
        [
            "What others saw. Times: median / 99th percentile / longest in ms; memory: before / peak / after in MB.",
            common.table(header, lines),
            *figures,
        ]
    )


def _times(row: Row) -> str:
    if not row["n"]:
        return "-"
    return f"{row['p50_ms']:.1f} / {row['p99_ms']:.1f} / {row['max_ms']:.1f}"


def _memory(row: Row) -> str:
    return f"{row['before']:.0f} / {row['peak']:.0f} / {row['after']:.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the measurements and write the results."""
    args = _parser().parse_args(argv)
    content = common.about(WHAT, "benchmarks.serving.overload", PACKAGES)
    rows: list[Row] = []
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
    content |= {"scale": args.scale, "threads": os.environ["OMP_NUM_THREADS"], "rows": rows}
    try:
        for name in args.only:
            print(f"-- {name}: {MEASUREMENTS[name][0].__doc__}", file=sys.stderr, flush=True)
            rows.append(run_alone(name, args.scale))
    finally:
        # What was measured before a failure is kept.
        path = common.write_result(content, "overload", args.json)
        print(f"\n{tables(rows)}\n\nwritten: {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--only", choices=tuple(MEASUREMENTS), nargs="+", default=list(MEASUREMENTS))
    add("--scale", type=float, default=1.0, help="of clients and sizes; times stay")
    add("--json", type=Path, metavar="FILE", help="default: a new file in benchmarks/results")
    return parser


if __name__ == "__main__":
    main()
