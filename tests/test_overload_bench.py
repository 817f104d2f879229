"""``benchmarks/serving/overload``: every measurement once, in small, and its slow senders against short limits."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from benchmarks.engine.fixtures import write_model
from benchmarks.serving import overload, watch
from benchmarks.serving.client import Client
from benchmarks.serving.target import started
from lorikeet.config import ServerConfig
from lorikeet.server.limits import Limits
from lorikeet.text.tokenizer import Tokenizer
from tests.support.fake_engine import Knobs
from tests.support.live_server import LiveServer
from tests.test_engine_bench import TINY

# The server's limits on them are 30 seconds.
QUICK = tuple(name for name in overload.MEASUREMENTS if name != "slow_senders")


def test_every_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(watch, "SETTLE_S", 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(overload, "WINDOW_S", 0)
    model, file = tmp_path / "tiny", tmp_path / "result.json"
    write_model(model, TINY | {"max_position_embeddings": 2048})
    options = overload.DEFAULTS | {"api_key": "secret"}
    with started(str(model), 2, 4, options) as server:
        monkeypatch.setattr(
            overload, "run_alone", lambda name, scale: overload.measure(name, server, scale)
        )
        overload.main(["--scale", "0.002", "--json", str(file), "--only", *QUICK])
    content = json.loads(file.read_text())
    rows = {row["measurement"]: row for row in content["rows"]}
    assert tuple(rows) == QUICK
    for row in rows.values():
        assert row["health"]["n"] > 0
        assert row["health"]["failed"] == 0
        assert row["memory_mb"]["engine"]["peak"] >= row["memory_mb"]["engine"]["before"] > 1
        assert row["memory_mb"]["http"]["peak"] >= row["memory_mb"]["http"]["before"] > 1
    # One that had to wait for the abortion is aborted with the others.
    assert not any(r["one_token"]["failed"] for n, r in rows.items() if n != "abort_queued")
    assert (rows["many_streams"]["completed"], rows["many_streams"]["errors"]) == (2, 0)
    assert (len(rows["long_prompts"]["ends_s"]), rows["long_prompts"]["errors"]) == (2, 0)
    assert sum(rows["abort_queued"]["answers"].values()) == 10
    assert set(rows["abort_queued"]["answers"]) <= {"200 abort", "200 length"}
    assert rows["upload"]["status"] == 200
    assert rows["upload"]["error_of_its_request"] is None
    assert rows["bodies_without_key"]["statuses"] == {"401": 32}
    shown = capsys.readouterr().out
    assert all(f"{name}: " in shown for name in QUICK)


def test_slow_connections(tmp_path: Path):
    write_model(tmp_path / "tiny", TINY)
    config = ServerConfig(model_path=str(tmp_path / "tiny"))
    limits = Limits(head_seconds=1, body_seconds=0.5)
    with LiveServer(config, Tokenizer.load(tmp_path / "tiny"), Knobs(), limits) as server:
        row = asyncio.run(overload.slow_connections(Client(server.url), 2, 1))
    assert {kind: some["n"] for kind, some in row.items()} == {"heads": 2, "bodies": 2, "silent": 1}
    assert {kind: some["answers"] for kind, some in row.items()} == {
        "heads": {"none": 2},
        "bodies": {"408": 2},
        "silent": {"none": 1},
    }
