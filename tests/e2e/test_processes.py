"""The processes of a real server: one that freezes, one that is killed, signals, and what they leave behind."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorikeet.demo import adapter_paths
from lorikeet.utils import free_port
from tests.support.live_server import wait_until

LONG = {"max_new_tokens": 1500, "ignore_eos": True, "temperature": 0}


class Server:
    """The demo as a process of its own, with a place of its own for temporary files."""

    def __init__(self, scratch: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.scratch = scratch
        self._log = tempfile.TemporaryFile()
        words = ["--model-path", "demo", "--lora-paths", "demo", "--port", str(self.port), *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lorikeet.launch_server", *words],
            stderr=self._log,
            env=os.environ | {"TMPDIR": str(scratch)},
            start_new_session=True,
        )

    def wait_ready(self) -> None:
        wait_until(lambda: "Server ready" in self.log or self.process.poll() is not None, 120)
        assert "Server ready" in self.log, self.log

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode()

    @property
    def engine(self) -> int:
        """Its process id."""
        pid = self.process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
        raise AssertionError("there is no engine")

    @property
    def left(self) -> list[str]:
        return [str(path.relative_to(self.scratch)) for path in self.scratch.rglob("lorikeet-*")]

    def upload(self) -> None:
        """Load an adapter whose bytes the server has to keep in a file."""
        path = adapter_paths()["json"]
        tensors = base64.b64encode((path / "adapter_model.safetensors").read_bytes()).decode()
        body = {
            "lora_name": "sent",
            "config_dict": json.loads((path / "adapter_config.json").read_text()),
            "tensors": tensors,
        }
        url = f"{self.url}/load_lora_adapter_from_tensors"
        reply = httpx.post(url, json=body, timeout=60)
        assert reply.status_code == 200, reply.text

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    scratch = Path(tempfile.mkdtemp(prefix="lk-", dir="/tmp"))
    made: list[Server] = []

    def make(*options: str) -> Server:
        made.append(Server(scratch, *options))
        return made[-1]

    yield make
    for server in made:
        server.stop()
    shutil.rmtree(scratch)


class Calls:
    """A stream and a whole reply that run at the same time."""

    def __init__(self, server: Server) -> None:
        self.events: list[str] = []
        self.whole: list[httpx.Response] = []
        self._url = server.url
        self._threads = [threading.Thread(target=run) for run in (self._stream, self._whole)]
        for thread in self._threads:
            thread.start()
        wait_until(lambda: bool(self.events) and self._num_running() == 2)

    def _num_running(self) -> int:
        info = httpx.get(f"{self._url}/server_info", timeout=60).json()
        return int(info["internal_states"][0]["num_running"])

    def _stream(self) -> None:
        body = {"text": "a", "sampling_params": LONG, "stream": True}
        with httpx.stream("POST", f"{self._url}/generate", json=body, timeout=120) as reply:
            for line in reply.iter_lines():
                self.events += [line] if line else []

    def _whole(self) -> None:
        body = {"text": "a", "sampling_params": LONG, "lora_path": "sql"}
        self.whole.append(httpx.post(f"{self._url}/generate", json=body, timeout=120))

    def join(self) -> tuple[dict[str, Any], httpx.Response]:
        """The error of the stream's last event but [DONE], and the whole reply."""
        for thread in self._threads:
            thread.join()
        assert self.events[-1] == "data: [DONE]"
        return json.loads(self.events[-2].removeprefix("data: "))["error"], self.whole[0]


def test_a_second_signal_tells_everybody_and_leaves_nothing(start: Callable[..., Server]) -> None:
    server = start("--shutdown-timeout", "100")
    server.wait_ready()
    server.upload()
    calls = Calls(server)
    for _ in range(2):
        os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does
        time.sleep(0.3)
    assert server.process.wait(60) == 0
    error, whole = calls.join()
    assert error["message"] == "the server is shutting down"
    assert whole.status_code == 503
    assert whole.json()["error"]["message"] == "the server is shutting down"
    for noise in ("Traceback", "CancelledError", "leaked"):
        assert noise not in server.log
    assert server.left == []


def test_a_frozen_engine_ends_the_server_with_an_error(start: Callable[..., Server]) -> None:
    server = start("--watchdog-timeout", "8")
    server.wait_ready()
    server.upload()
    calls = Calls(server)
    os.kill(server.engine, signal.SIGSTOP)
    wait_until(lambda: _health(server) != 200)
    assert _health(server) in (503, 0)
    error, whole = calls.join()
    assert "the engine has said nothing for 8 s" in error["message"]
    assert whole.status_code == 503
    assert server.process.wait(60) == 1
    assert "leaked" not in server.log
    assert server.left == []


def _health(server: Server) -> int:
    try:
        return httpx.get(f"{server.url}/health", timeout=60).status_code
    except httpx.TransportError:
        return 0  # it has ended


def test_an_engine_that_was_stopped_for_a_while_goes_on(start: Callable[..., Server]) -> None:
    server = start()
    server.wait_ready()
    os.kill(server.engine, signal.SIGSTOP)
    body = {"text": "a", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    replies: list[httpx.Response] = []
    call = threading.Thread(
        target=lambda: replies.append(httpx.post(f"{server.url}/generate", json=body, timeout=60))
    )
    call.start()
    time.sleep(2)
    assert _health(server) == 200
    os.kill(server.engine, signal.SIGCONT)
    call.join()
    assert replies[0].status_code == 200
    server.process.send_signal(signal.SIGHUP)
    assert server.process.wait(60) == 0
    assert server.left == []


def test_what_killed_processes_leave_goes_with_the_next_start(start: Callable[..., Server]) -> None:
    server = start()
    server.wait_ready()
    server.upload()
    os.kill(server.engine, signal.SIGKILL)
    assert server.process.wait(60) == 1
    assert server.left == [], "the server has cleared up behind its engine"
    server = start()
    server.wait_ready()
    server.upload()
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    abandoned = set(server.left)
    assert abandoned
    wait_until(lambda: _num_processes(server.process.pid) == 0)
    after = start()
    after.wait_ready()
    assert not abandoned & set(after.left)
    after.process.send_signal(signal.SIGQUIT)
    assert after.process.wait(60) == 0
    assert after.left == []


def _num_processes(group: int) -> int:
    found = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
            found += state != "Z" and int(pgrp) == group
    return found


def _minds_signals(pid: int) -> bool:
    """True as soon as the package has begun; before that the interpreter does what it does."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("delay", [0.0, 0.4, 1.5])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_time_of_the_start(
    start: Callable[..., Server], number: signal.Signals, delay: float
) -> None:
    server = start()
    wait_until(lambda: _minds_signals(server.process.pid))
    time.sleep(delay)
    os.killpg(server.process.pid, number)
    assert server.process.wait(60) in (0, 128 + number)
    assert "Traceback" not in server.log
    wait_until(lambda: _num_processes(server.process.pid) == 0)
    assert server.left == []
