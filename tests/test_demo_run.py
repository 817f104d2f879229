"""The demo's client: one call for all adapters, a table, and a server that ends."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from urllib.error import URLError

import pytest

from lorikeet import demo, demo_run
from lorikeet.errors import EngineDeadError, EngineFault


class FakeProcess:
    """Runs until Ctrl-C, or ends by itself with ``code``."""

    def __init__(self) -> None:
        self.waited = False
        self.code: int | None = None

    def wait(self) -> int:
        self.waited = True
        if self.code is None:
            raise KeyboardInterrupt
        return self.code


@pytest.fixture
def world(monkeypatch):
    """The demo without a server: what it would start, ask and end."""
    process = FakeProcess()
    events: list[object] = []
    monkeypatch.setattr(demo, "adapter_paths", lambda: {"json": Path("j"), "sql": Path("s")})

    def launch(command):
        events.append(command)
        return process, 0

    def post(url, body, **keywords):
        events.append((url, body))
        return [{"text": f" answer of {name} "} for name in body["lora_path"]]

    monkeypatch.setattr(demo_run, "launch_server_cmd", launch)
    monkeypatch.setattr(demo_run, "wait_for_server", lambda url, process: events.append(url))
    monkeypatch.setattr(demo_run, "terminate_process", lambda process: events.append("ended"))
    monkeypatch.setattr(demo_run.ask, "__defaults__", (post,))
    return process, events


def test_once_asks_everyone_in_one_call_and_ends(world, capsys):
    process, events = world
    demo_run.run(once=True, port=1234)
    url = "http://127.0.0.1:1234"
    command, waited, (asked, body), ended = events
    assert "--model-path demo --lora-paths demo" in command
    assert "--port 1234" in command
    assert (waited, asked, ended) == (url, f"{url}/generate", "ended")
    assert body["lora_path"] == [None, "json", "sql"]
    assert body["text"] == [demo.QUESTION] * 3
    assert not process.waited
    out = capsys.readouterr().out
    for cell in ("(base)", "answer of None", "| json", "answer of sql", "[1/3]", "[2/3]", "[3/3]"):
        assert cell in out


def test_it_serves_until_interrupted(world, capsys):
    process, events = world
    with pytest.raises(KeyboardInterrupt):
        demo_run.run(once=False, port=1234)
    assert process.waited
    assert events[-1] == "ended"
    assert "until Ctrl-C" in capsys.readouterr().out


def test_the_server_ends_when_the_question_fails(world, monkeypatch):
    _, events = world

    def fail(url, body, **keywords):
        raise URLError("refused")

    monkeypatch.setattr(demo_run.ask, "__defaults__", (fail,))
    with pytest.raises(EngineFault, match=r"did not answer: .*refused"):
        demo_run.run(once=True, port=1234)
    assert events[-1] == "ended"


def test_a_server_that_ends_by_itself_is_a_failure(world):
    process, _ = world
    process.code = 1
    with pytest.raises(EngineDeadError, match="exit code 1"):
        demo_run.run(once=False, port=1234)


def test_the_key_is_sent(monkeypatch):
    keys = []

    def post(url, body, *, api_key):
        keys.append(api_key)
        return [{"text": "x"}]

    monkeypatch.setenv("LORIKEET_API_KEY", "k")
    demo_run.ask("http://x", "p", [None], post)
    assert keys == ["k"]


def test_the_example_is_a_command_that_works(world):
    words = shlex.split(demo_run.example("http://x:1"))
    assert words[0] == "curl"
    body = json.loads(words[words.index("-d") + 1])
    assert body["lora_path"] == "json"
    assert body["text"] == demo.QUESTION
