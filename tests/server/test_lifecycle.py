"""The server as a process: start, drain, death of the engine, signals. Nothing may be left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorikeet.config import ServerConfig
from lorikeet.engine.transport import EngineAddress
from lorikeet.errors import ConfigError, ModelError
from lorikeet.server.app import serve
from lorikeet.server.lifecycle import bind
from tests.support.live_server import wait_until


def free_port() -> int:
    with bind("127.0.0.1", 0) as listener:
        return listener.getsockname()[1]


class Program:
    """``tests.support.serve_fake`` as a child process."""

    def __init__(self, model_dir: Path, scratch: Path, **knobs: Any) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.scratch = scratch
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.support.serve_fake"),
                *(str(model_dir), str(self.port), json.dumps(knobs)),
            ],
            stderr=subprocess.PIPE,
            text=True,
            # Where the sockets between the two processes are made.
            env=os.environ | {"TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.children: list[int] = []

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def says(self, text: str) -> bool:
        return any(text in line for line in list(self.lines))

    def wait_ready(self) -> None:
        wait_until(lambda: self.says("Server ready") or self.process.poll() is not None, 120)
        assert self.says("Server ready"), self.lines
        self.note_children()

    def note_children(self) -> None:
        pid = self.process.pid
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        self.children = [int(item) for item in text.split()]
        assert self.children

    def wait(self) -> int:
        """Exit code, after checking that no process and no socket is left."""
        code = self.process.wait(60)
        self._reader.join()
        wait_until(lambda: not any(_is_running(pid) for pid in self.children))
        assert list(self.scratch.glob("lorikeet-*")) == []
        return code

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


MakeProgram = Callable[..., Program]


@pytest.fixture
def program(model_dir: Path, tmp_path: Path) -> Iterator[MakeProgram]:
    made: list[Program] = []

    def make(**knobs: Any) -> Program:
        scratch = Path(f"/tmp/lk-{os.getpid()}-{len(made)}")
        scratch.mkdir()
        made.append(Program(model_dir, scratch, **knobs))
        return made[-1]

    yield make
    for item in made:
        item.stop()
        for rest in sorted(item.scratch.rglob("*"), reverse=True):
            rest.rmdir() if rest.is_dir() else rest.unlink()
        item.scratch.rmdir()


class Call:
    """A streamed /generate in a thread; it is running when the constructor returns."""

    def __init__(self, program: Program, num_tokens: int) -> None:
        self._url = program.url + "/generate"
        sampling = {"max_new_tokens": num_tokens}
        self._body = {"text": "a", "sampling_params": sampling, "stream": True}
        self.events: list[dict[str, Any]] = []
        self.is_whole = False
        self._thread = threading.Thread(target=self._main)
        self._thread.start()
        wait_until(lambda: bool(self.events))

    def _main(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=60) as reply:
                for line in reply.iter_lines():
                    if line == "data: [DONE]":
                        self.is_whole = True
                    elif line:
                        self.events.append(json.loads(line.removeprefix("data: ")))
        except httpx.RemoteProtocolError:
            pass  # cut off

    def join(self) -> None:
        self._thread.join()


def test_sigterm_lets_running_requests_finish(program: MakeProgram) -> None:
    server = program(step_s=0.05)
    server.wait_ready()
    assert server.says("loading nothing"), "the engine's progress is shown"
    assert server.says(f"Server ready at {server.url}: base with 2 adapters (json, sql)")
    call = Call(server, 100)
    with httpx.Client(base_url=server.url, timeout=60) as kept_alive:
        assert kept_alive.get("/health").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.says("SIGTERM: finishing"))
        for client in (kept_alive, httpx):  # on a connection that was there, and on new ones
            for path in (f"{server.url}/health", f"{server.url}/v1/models"):
                reply = client.get(path)
                assert reply.status_code == 503
                assert reply.headers["retry-after"] == "1"
                assert reply.headers["connection"] == "close"
    assert server.process.poll() is None, "it waits for the request"
    assert not call.is_whole
    call.join()
    assert call.is_whole
    assert call.events[-1]["text"] == "a" * 100
    assert server.wait() == 0
    assert server.says("POST /generate 200"), "the access line"


def test_nothing_to_wait_for(program: MakeProgram) -> None:
    server = program(shutdown_timeout=1000)
    server.wait_ready()
    with httpx.Client(base_url=server.url, timeout=60) as idle:  # a connection is no request
        assert idle.get("/health").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def test_what_does_not_finish_in_time_is_cut_off(program: MakeProgram) -> None:
    server = program(step_s=0.2, shutdown_timeout=1)
    server.wait_ready()
    call = Call(server, 400)
    body = {"model": "base", "prompt": "a", "max_tokens": 400}
    whole: list[httpx.Response] = []
    url = f"{server.url}/v1/completions"
    thread = threading.Thread(target=lambda: whole.append(httpx.post(url, json=body, timeout=60)))
    thread.start()
    wait_until(lambda: _num_running(server) == 2)
    server.process.send_signal(signal.SIGINT)
    assert server.wait() == 0, "80 seconds of tokens were not waited for"
    call.join()
    thread.join()
    assert server.says("2 requests were cut off after 1 s")
    assert call.is_whole
    assert call.events[-1]["error"]["message"] == "the server is shutting down"
    assert whole[0].status_code == 503
    assert whole[0].json()["error"]["message"] == "the server is shutting down"


def test_a_client_that_does_not_read_holds_nobody_up(program: MakeProgram) -> None:
    server = program(step_s=0.005, shutdown_timeout=1)
    server.wait_ready()
    body = {"text": "a", "sampling_params": {"max_new_tokens": 400}, "stream": True}
    body |= {"return_logprob": True, "top_logprobs_num": 20}  # megabytes
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        data = json.dumps(body).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: t\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        wait_until(lambda: _num_running(server) == 1)
        wait_until(lambda: _num_running(server) == 0)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert server.says("0 requests were cut off after 1 s"), "it had been computed"
    assert not server.says("Traceback")


def _num_running(server: Program) -> int:
    info = httpx.get(f"{server.url}/server_info", timeout=60).json()
    return info["internal_states"][0]["num_running"]


def test_a_second_signal_ends_it_at_once(program: MakeProgram) -> None:
    server = program(step_s=0.2, shutdown_timeout=100)
    server.wait_ready()
    call = Call(server, 400)
    server.process.send_signal(signal.SIGINT)
    wait_until(lambda: server.says("SIGINT: finishing"))
    server.process.send_signal(signal.SIGINT)
    server.wait()
    call.join()
    assert len(call.events) < 400, "80 seconds of tokens were not waited for"
    assert server.says("SIGINT: stopping at once")


def test_the_death_of_the_engine_ends_the_server(program: MakeProgram) -> None:
    server = program(step_s=0.05, die_after=10)
    server.wait_ready()
    call = Call(server, 400)
    call.join()
    assert call.is_whole
    error = call.events[-1]["error"]
    assert "the engine process has ended (exit code 3)" in error["message"]
    assert server.wait() == 1
    assert server.says("error: the engine process has ended")


@pytest.mark.parametrize(("is_user_error", "code"), [(True, 2), (False, 1)])
def test_an_engine_that_cannot_start(program: MakeProgram, is_user_error: bool, code: int) -> None:
    server = program(start_error="no weights here", start_user_error=is_user_error)
    assert server.wait() == code
    assert server.says("error: no weights here")
    assert not server.says("Traceback")


def test_a_signal_while_it_starts(program: MakeProgram) -> None:
    server = program(start_s=60)
    wait_until(lambda: server.says("loading nothing"), 120)
    server.note_children()
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0


def _no_engine(config: ServerConfig, address: EngineAddress) -> BaseProcess:
    raise AssertionError("no engine may be started")


def test_a_port_in_use_is_told_before_the_engine_starts(model_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        config = ServerConfig(model_path=str(model_dir), served_model_name="base", port=port)
        with pytest.raises(ConfigError, match=f"--port {port} on 127.0.0.1 is in use"):
            serve(config, spawn=_no_engine)


def test_a_port_that_another_starting_server_has_reserved_is_in_use() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}"):
            bind("127.0.0.1", port)
    bind("127.0.0.1", port).close()


def test_a_port_with_lingering_connections_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = server.accept()
            accepted.close()  # the side that closes first keeps the address in TIME_WAIT
    bind("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_a_host_that_is_not_here(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--host {host}"):
        bind(host, 30000)


def test_a_model_without_a_tokenizer_is_told_before_the_engine_starts(tmp_path: Path) -> None:
    config = ServerConfig(model_path=str(tmp_path), served_model_name="base", port=free_port())
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        serve(config, spawn=_no_engine)
