"""The server as a process: start, drain, death of the engine, signals. Nothing may be left behind."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorikeet.client.transport import EngineAddress
from lorikeet.config import ServerConfig, Settings, resolve
from lorikeet.errors import ConfigError, ModelError
from lorikeet.server.app import serve
from lorikeet.server.lifecycle import bind, listen
from tests.support.live_server import wait_until


def free_port() -> int:
    with bind("127.0.0.1", 0) as listener:
        return listener.getsockname()[1]


class Program:
    """``tests.support.serve_fake`` as a child process."""

    def __init__(
        self, model_dir: Path, scratch: Path, port: int | None = None, **knobs: Any
    ) -> None:
        self.port = port or free_port()
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

    def engine(self) -> int:
        """Process id of the engine, which is a child like multiprocessing's resource tracker."""
        (found,) = [
            pid
            for pid in self.children
            if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        ]
        return found

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
def program(model_dir: Path) -> Iterator[MakeProgram]:
    made: list[Program] = []

    def make(scratch: Path | None = None, **knobs: Any) -> Program:
        scratch = scratch or Path(tempfile.mkdtemp(prefix="lk-", dir="/tmp"))
        made.append(Program(model_dir, scratch, **knobs))
        return made[-1]

    yield make
    for item in made:
        item.stop()
        shutil.rmtree(item.scratch, ignore_errors=True)


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
    with _unread_stream(server, n=8):  # 12 MB: more than the system keeps
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    assert server.says("0 requests were cut off after 1 s"), "it had been computed"
    assert not server.says("Traceback")


@contextlib.contextmanager
def _unread_stream(server: Program, n: int) -> Iterator[None]:
    """A stream of ``n`` completions with many log-probabilities, all computed, of which the client reads nothing."""
    body = {"text": "a", "sampling_params": {"max_new_tokens": 400, "n": n}, "stream": True}
    body |= {"return_logprob": True, "top_logprobs_num": 20}
    data = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: t\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head.encode() + data)
        wait_until(lambda: _num_running(server) == n)
        wait_until(lambda: _num_running(server) == 0)
        yield


def _num_running(server: Program) -> int:
    info = httpx.get(f"{server.url}/server_info", timeout=60).json()
    # Nothing is known before the first step.
    return info["internal_states"][0].get("num_running", 0)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_every_signal_to_stop_lets_running_requests_finish(
    program: MakeProgram, number: signal.Signals
) -> None:
    server = program(step_s=0.02)
    server.wait_ready()
    call = Call(server, 50)
    for pid in (*server.children, server.process.pid):  # as a terminal does
        os.kill(pid, number)
    wait_until(lambda: server.says(f"{number.name}: finishing"))
    call.join()
    assert call.is_whole
    assert call.events[-1]["text"] == "a" * 50
    assert server.wait() == 0
    assert not server.says("resource_tracker"), server.lines


def test_a_second_signal_ends_it_at_once(program: MakeProgram) -> None:
    server = program(step_s=0.2, shutdown_timeout=100)
    server.wait_ready()
    call = Call(server, 400)
    body = {"model": "base", "prompt": "a", "max_tokens": 400}
    whole: list[httpx.Response] = []
    url = f"{server.url}/v1/completions"
    thread = threading.Thread(target=lambda: whole.append(httpx.post(url, json=body, timeout=60)))
    thread.start()
    wait_until(lambda: _num_running(server) == 2)
    server.process.send_signal(signal.SIGINT)
    wait_until(lambda: server.says("SIGINT: finishing"))
    server.process.send_signal(signal.SIGINT)
    assert server.wait() == 0
    call.join()
    thread.join()
    assert len(call.events) < 400, "80 seconds of tokens were not waited for"
    assert server.says("SIGINT: stopping at once")
    assert call.is_whole
    assert call.events[-1]["error"]["message"] == "the server is shutting down"
    assert whole[0].status_code == 503
    assert whole[0].json()["error"]["message"] == "the server is shutting down"
    for noise in ("Traceback", "CancelledError", "leaked"):
        assert not server.says(noise), server.lines


def test_a_second_signal_does_not_wait_for_a_client_that_does_not_read(
    program: MakeProgram,
) -> None:
    server = program(step_s=0.001, shutdown_timeout=100)
    server.wait_ready()
    with _unread_stream(server, n=1):  # megabytes
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.says("SIGTERM"))
            time.sleep(0.1)  # two of a kind that come together are one
        assert server.wait() == 0
    assert not server.says("Traceback")


def test_sighup_that_nohup_has_switched_off_stays_off(program: MakeProgram) -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        server = program()
    finally:
        signal.signal(signal.SIGHUP, old)
    server.wait_ready()
    server.process.send_signal(signal.SIGHUP)
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert not server.says("SIGHUP")
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0


def test_other_signals_end_nothing(program: MakeProgram) -> None:
    server = program()
    server.wait_ready()
    for pid in (server.process.pid, *server.children):
        if "resource_tracker" in Path(f"/proc/{pid}/cmdline").read_text():
            continue
        os.kill(pid, signal.SIGUSR2)
        num_shown = sum("Current thread" in line for line in server.lines)
        os.kill(pid, signal.SIGUSR1)
        wait_until(lambda n=num_shown: sum("Current thread" in x for x in server.lines) > n)
    assert httpx.get(f"{server.url}/health").status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0


def test_a_frozen_engine_is_noticed(program: MakeProgram) -> None:
    server = program(step_s=0.05, watchdog_timeout=7)
    server.wait_ready()
    call = Call(server, 400)
    engine = server.engine()
    os.kill(engine, signal.SIGSTOP)
    statuses: list[int] = []
    with contextlib.suppress(httpx.TransportError):
        while server.process.poll() is None:
            statuses.append(httpx.get(f"{server.url}/health", timeout=60).status_code)
            time.sleep(0.01)
    assert (statuses[0], statuses[-1]) == (200, 503)
    call.join()
    assert call.is_whole
    assert "has said nothing for 7 s" in call.events[-1]["error"]["message"]
    assert server.wait() == 1
    assert server.says("error: the engine has said nothing for 7 s")


def test_a_server_that_was_suspended_goes_on(program: MakeProgram) -> None:
    server = program(step_s=0.02, watchdog_timeout=2)
    server.wait_ready()
    call = Call(server, 60)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in (server.process.pid, server.engine()):
            os.kill(pid, number)
        time.sleep(3 if number == signal.SIGSTOP else 0)
    call.join()
    assert call.events[-1]["text"] == "a" * 60
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0


def test_the_log_tells_that_descriptors_run_out(program: MakeProgram) -> None:
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard > 64
    server = program(most_files=64)
    server.wait_ready()
    with contextlib.ExitStack() as stack:
        for _ in range(80):
            connection = socket.create_connection(("127.0.0.1", server.port))
            stack.enter_context(contextlib.closing(connection))
        wait_until(lambda: server.says("file descriptors run out"))
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
    wait_until(lambda: _is_answering(server))
    assert sum("file descriptors run out" in line for line in server.lines) == 1
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0


def _is_answering(server: Program) -> bool:
    try:
        return httpx.get(f"{server.url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_a_port_is_free_as_soon_as_its_server_has_ended(program: MakeProgram) -> None:
    server = program()
    server.wait_ready()
    with httpx.Client(base_url=server.url) as idle:  # kept alive, and closed by the server
        assert idle.get("/health").status_code == 200
        assert httpx.get(f"{server.url}/health", headers={"Connection": "close"}).is_success
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        again = program(port=server.port)
        again.wait_ready()
    again.process.send_signal(signal.SIGTERM)
    assert again.wait() == 0


@pytest.mark.parametrize("which", ["server", "both"])
def test_what_a_killed_server_leaves_goes_with_the_next_start(
    program: MakeProgram, which: str
) -> None:
    other = program()  # lives beside them, in the same place
    other.wait_ready()
    (kept,) = other.scratch.glob("lorikeet-*")
    stranger = other.scratch / "lorikeet-notes"
    stranger.mkdir()
    killed = program(scratch=other.scratch)
    killed.wait_ready()
    if which == "both":
        os.kill(killed.engine(), signal.SIGKILL)
    killed.process.kill()
    killed.process.wait()
    assert len(list(other.scratch.glob("lorikeet-*"))) == 3
    wait_until(lambda: not any(_is_running(pid) for pid in killed.children))
    after = program(scratch=other.scratch)
    after.wait_ready()
    found = set(other.scratch.glob("lorikeet-*"))
    assert found > {kept, stranger}
    assert len(found) == 3, "that of the new one has come, that of the killed one has gone"
    assert httpx.get(f"{other.url}/health_generate").status_code == 200
    stranger.rmdir()
    for server in (after, other):
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    assert list(other.scratch.iterdir()) == []


def test_a_signal_before_there_is_a_loop_is_no_traceback(tmp_path: Path) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        # The signal comes in the middle of the import that takes longest.
        program = (
            "import os, sys\n"
            "class Finder:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name == 'lorikeet.config': os.kill(os.getpid(), {int(number)})\n"
            "sys.meta_path.insert(0, Finder())\n"
            "from lorikeet.__main__ import main\n"
            "sys.exit(main(['serve', '--model-path', 'demo']))\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
        )
        assert (result.returncode, result.stderr) == (code, "")


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


def _no_engine(settings: Settings, address: EngineAddress) -> BaseProcess:
    raise AssertionError("no engine may be started")


def test_a_port_in_use_is_told_before_the_engine_starts(model_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        config = ServerConfig(model_path=str(model_dir), served_model_name="base", port=port)
        with pytest.raises(ConfigError, match=f"--port {port} on 127.0.0.1 is in use"):
            serve(resolve(config), spawn=_no_engine)


def test_a_port_that_another_starting_server_has_reserved_is_in_use() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}"):
            bind("127.0.0.1", port)
    bind("127.0.0.1", port).close()


def test_a_port_with_lingering_connections_is_free() -> None:
    listener = bind("127.0.0.1", 0)
    with listener:
        listen(listener)
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match="in use"):
            bind("127.0.0.1", port)  # it listens
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = listener.accept()
            accepted.close()  # the side that closes first keeps the address in TIME_WAIT
    bind("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_a_host_that_is_not_here(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--host {host}"):
        bind(host, free_port())


def test_a_model_without_a_tokenizer_is_told_before_the_engine_starts(tmp_path: Path) -> None:
    config = ServerConfig(model_path=str(tmp_path), served_model_name="base", port=free_port())
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        serve(resolve(config), spawn=_no_engine)
