"""``benchmarks/serving``: its client against a server that misbehaves, its figures, and one whole run."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import random
import re
from pathlib import Path

import orjson
import pytest

from benchmarks.engine.fixtures import write_model
from benchmarks.serving.client import Client, Record
from benchmarks.serving.measure import Load, arrivals, summarize
from benchmarks.serving.run import main, tables
from benchmarks.serving.target import running, started
from tests.test_engine_bench import TINY


def test_arrivals():
    times = arrivals(4000, 8.0, random.Random(0))
    assert times == sorted(times)
    assert times[-1] == pytest.approx(500, rel=0.05)
    # Gaps of a Poisson process spread as much as they are long.
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert math.sqrt(sum((gap - 1 / 8) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(
        1 / 8, rel=0.1
    )
    assert arrivals(3, math.inf, random.Random(0)) == [0.0] * 3


def _whole(adapter: str | None, arrival: float, *times: float) -> Record:
    return Record(adapter, arrival, arrival + 0.001, [(time, 1) for time in times])


def test_summary_counts_from_the_arrival():
    records = [
        _whole("a", 1.0, 1.5, 1.6, 1.8),
        _whole("b", 2.0, 2.1, 2.2, 3.0),
        Record("b", 2.5, 2.5, [(2.6, 1)], error="EOFError: gone"),
    ]
    row = summarize(records, Load(("a", "b", "b"), 10, 3, 1.0))
    assert (row["requests"], row["completed"], row["errors"]) == (3, 2, 1)
    assert row["error_examples"] == ["EOFError: gone"]
    assert row["duration_s"] == pytest.approx(2.0)
    assert row["output_tokens_per_s"] == pytest.approx(3)
    assert row["total_tokens_per_s"] == pytest.approx(13)
    assert row["first_token"]["p50_ms"] == pytest.approx(300)
    assert row["between_tokens"]["max_ms"] == pytest.approx(800)
    assert row["per_token"]["p50_ms"] == pytest.approx(300)
    assert row["end_to_end"]["max_ms"] == pytest.approx(1000)
    assert row["client_lag"]["p99_ms"] == pytest.approx(1)
    assert {name: some["requests"] for name, some in row["by_adapter"].items()} == {"b": 2, "a": 1}
    shown = tables([{"distribution": "zipf", **row}])
    assert "errors: EOFError: gone" in shown
    assert "By adapter: zipf at 1.0" in shown


def test_summary_of_nothing_but_errors():
    row = summarize([Record("a", 0.0, error="no")], Load(("a",), 1, 1, math.inf))
    assert (row["rate"], row["output_tokens_per_s"], row["first_token"]) == ("inf", None, {"n": 0})
    json.dumps(row, allow_nan=False)
    assert "-" in tables([{"distribution": "none", **row}])


# ---- the client ----

OK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def _event(tokens: int) -> bytes:
    body = {"text": "w" * tokens, "meta_info": {"completion_tokens": tokens}}
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _ask(*pieces: bytes, num_tokens: int = 3) -> Record:
    """The record of one request to a server that answers with these bytes and hangs up."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        asked.append(orjson.loads(await reader.readexactly(length)))
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.002)
            writer.close()
            await writer.wait_closed()
        answered.set()

    async def talk() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            await Client(f"http://127.0.0.1:{port}").generate(record, [5, 6], num_tokens)
            await answered.wait()

    answered = asyncio.Event()
    asked: list[dict] = []
    record = Record("a", 0.0)
    asyncio.run(talk())
    assert asked[0]["lora_path"] == "a"
    assert asked[0]["input_ids"] == [5, 6]
    assert asked[0]["sampling_params"]["max_new_tokens"] == num_tokens
    return record


def test_client_puts_events_together_from_any_pieces():
    stream = _event(1) + _event(1) + _event(3) + b"data: [DONE]\n\n"
    chunks = b"".join(_chunk(stream[start : start + 7]) for start in range(0, len(stream), 7))
    record = _ask(OK, chunks[:50], chunks[50:], _chunk(b"")[:3])
    assert record.error is None
    assert [tokens for _, tokens in record.events] == [1, 2]
    assert len(record.gaps_s) == 1
    assert record.per_token_s == pytest.approx(record.gaps_s[0] / 2)


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ((b"HTTP/1.1 400 Bad Request\r\n\r\n", b"no such adapter"), "400.*no such adapter"),
        ((OK, _chunk(_event(1))), "ValueError|EOFError|IncompleteReadError"),
        ((OK, _chunk(_event(1)), b"0\r\n\r\n"), "ended before its last event"),
        ((OK, _chunk(b'data: {"error": {"message": "full"}}\n\n')), "full"),
        ((OK, _chunk(_event(2) + b"data: [DONE]\n\n")), "2 tokens came instead of 3"),
        ((b"",), "status"),
    ],
)
def test_client_records_what_went_wrong(pieces, error):
    record = _ask(*pieces)
    assert record.error is not None
    assert re.search(error, record.error), record.error


def test_client_records_that_nobody_listens():
    record = Record(None, 0.0)
    asyncio.run(Client("http://127.0.0.1:1").generate(record, [1], 1))
    assert "ConnectionRefusedError" in str(record.error)


# ---- a whole run ----


def test_whole_run_and_a_server_that_runs_already(tmp_path: Path, capfd):
    model = tmp_path / "tiny"
    write_model(model, TINY)
    file = tmp_path / "result.json"
    options = "--rate 50 inf --requests 8 --input-len 8 --output-len 4 --distribution distinct"
    options += f" --json {file} --lora-adapters 2"
    with started(str(model), 2, 4, {"device": "cpu"}) as server:
        assert server.adapters == ("adapter-0000", "adapter-0001")
        main([*options.split(), "--url", server.url])
        with pytest.raises(ValueError, match="fewer than 3"):
            running(server.url, 3)
    content = json.loads(file.read_text())
    assert [row["rate"] for row in content["rows"]] == [50.0, "inf"]
    for row in content["rows"]:
        assert (row["completed"], row["errors"]) == (8, 0)
        assert row["first_token"]["n"] == 8
        assert {name: some["requests"] for name, some in row["by_adapter"].items()} == {
            "adapter-0000": 4,
            "adapter-0001": 4,
        }
    assert content["server"]["lora_enabled"] is True
    assert "distinct" in capfd.readouterr().out
