"""A server among strangers: requests that would harm others, sent beside a neighbour who has to notice nothing.

:class:`HostileServer` is a real server, watched from outside: the memory of all its processes, what it logs, a neighbour
who asks for one token again and again, and a stream. :meth:`HostileServer.problems_of` sends the calls of a case and says
in words what did not hold. A server that a case has killed or frozen is started again for the next one.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import IO

import psutil

from lorikeet.utils import free_port, terminate_process, wait_for_server

NEIGHBOUR_SECONDS = 2.0
MEMORY_BYTES = 2**30
# A server that takes this much is killed, so that the machine lives.
KILL_BYTES = 6 * 2**30
# Kept between cases; what is above it would count for the next one.
RESTART_BYTES = 700 << 20
# How long others may be silent after a case before the server counts as frozen.
FROZEN_SECONDS = 10.0
MAX_MESSAGE = 2000
_PR_SET_PDEATHSIG = 1

# What a refusal must not say: where in whose source something failed.
_NO_REASON = re.compile(
    r"check failed|assert|\.(cc|cpp|h|py):\d+|traceback|object at 0x|std::|[\x00-\x08\x0b-\x1f\x7f]",
    re.IGNORECASE,
)
_LOG_LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (DEBUG|INFO|WARNING) [ -~\x85-\U0010ffff]*"
)

REFUSED = frozenset({400})
SERVED = frozenset({200})
EITHER = REFUSED | SERVED


@dataclass(frozen=True)
class Call:
    """One HTTP request.

    Attributes:
        body: ``$DIR`` in it is the directory of the adapters.
        adapters: name -> its files by name, put into that directory before the call.
    """

    path: str
    body: bytes = b""
    method: str = "POST"
    adapters: dict[str, dict[str, bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One line of a list.

    Attributes:
        name: of the test.
        call: makes the request, when the case's turn has come.
        says: what the reason of a refusal has in it (a regular expression).
        statuses: of right answers.
        seconds: in which an answer has to come.
        leaves: the client closes its connection after these seconds, and no answer is expected.
        at_once: as many clients send it at the same time.
        slow: it takes long also if all is well.
    """

    name: str
    call: Callable[[], Call]
    says: str = ""
    statuses: frozenset[int] = REFUSED
    _: KW_ONLY
    seconds: float = 30.0
    leaves: float | None = None
    at_once: int = 1
    slow: bool = False


_GRAMMAR = Call(
    "/generate", b'{"text":"Hi","sampling_params":{"regex":"[ab]+","max_new_tokens":1}}'
)


@dataclass(frozen=True)
class Reply:
    """What came back; status 0: the connection broke, -1: nothing came in time."""

    status: int
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")

    @property
    def reason(self) -> str:
        """The message of a refusal, in any of the forms that refusals have."""
        try:
            value = json.loads(self.body)
        except ValueError:
            return ""
        if not isinstance(value, dict):
            return ""
        error = value.get("error", value)
        return str(error.get("message") or error.get("error_message") or "")


def send(port: int, call: Call, seconds: float) -> Reply:
    """Send a call and wait for the whole answer; after ``seconds`` the connection is closed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    closing = threading.Timer(seconds, lambda: _shut(connection))
    closing.start()
    began = time.monotonic()
    try:
        connection.request(call.method, call.path, call.body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return Reply(response.status, response.read())
    except (OSError, http.client.HTTPException) as error:
        is_late = time.monotonic() - began > seconds - 0.1
        return Reply(-1 if is_late else 0, repr(error).encode())
    finally:
        closing.cancel()
        connection.close()


def _shut(connection: http.client.HTTPConnection) -> None:
    with suppress(OSError):
        if connection.sock is not None:
            connection.sock.shutdown(2)


class _Asker(threading.Thread):
    """Does the same thing again and again until it is told to stop, and remembers how long each took."""

    what = ""

    def __init__(self, port: int) -> None:
        super().__init__(name=self.what, daemon=True)
        self._port = port
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._begun: float | None = None  # what is waited for now
        self._last = time.monotonic()
        self._slowest = 0.0
        self._failures: list[str] = []

    def run(self) -> None:
        while not self._is_over.is_set():
            try:
                self._ask()
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self._fail(repr(error))
            finally:
                with self._lock:
                    self._begun = None
            self._is_over.wait(0.02)

    def _ask(self) -> None:
        raise NotImplementedError

    def _wait(self) -> None:
        with self._lock:
            self._begun = time.monotonic()

    def _arrived(self) -> None:
        with self._lock:
            assert self._begun is not None
            now = time.monotonic()
            self._slowest = max(self._slowest, now - self._begun)
            self._begun, self._last = None, now

    def _fail(self, reason: str) -> None:
        with self._lock:
            if not self._is_over.is_set():
                self._failures.append(reason[:200])
        self._is_over.wait(0.2)

    def forget(self) -> None:
        """What was until now belongs to no case."""
        with self._lock:
            self._slowest, self._failures = 0.0, []

    def has_answer_since(self, when: float) -> bool:
        """Whether something came after ``when``."""
        with self._lock:
            return self._last > when

    def problems(self) -> list[str]:
        with self._lock:
            running = 0.0 if self._begun is None else time.monotonic() - self._begun
            slowest = max(self._slowest, running)
            found = [f"{self.what} failed: {self._failures[0]}"] if self._failures else []
        if slowest > NEIGHBOUR_SECONDS:
            found.append(f"{self.what} waited for {slowest:.1f} s")
        return found

    def stop(self) -> None:
        self._is_over.set()


class Neighbour(_Asker):
    """Asks the base model for one token; it is the same each time."""

    what = "the neighbour"
    _expected: object = None

    def _ask(self) -> None:
        body = {"text": "Hi", "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            while not self._is_over.is_set():
                self._wait()
                connection.request("POST", "/generate", json.dumps(body))
                reply = json.loads(connection.getresponse().read())
                self._arrived()
                self._expected = self._expected or reply["output_ids"]
                if reply["output_ids"] != self._expected:
                    self._fail(f"got {reply['output_ids']} for {self._expected}")
                self._is_over.wait(0.02)
        finally:
            connection.close()


class Stream(_Asker):
    """Reads streams; what it measures is the time between two pieces."""

    what = "the stream"

    def _ask(self) -> None:
        body = {"model": "demo", "prompt": "Hi", "stream": True, "max_tokens": 300, "seed": 7}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            self._wait()
            connection.request("POST", "/v1/completions", json.dumps(body | {"ignore_eos": True}))
            self._read(connection.getresponse())
        finally:
            connection.close()

    def _read(self, response: http.client.HTTPResponse) -> None:
        finish = None
        while line := response.readline():
            if not line.startswith(b"data: "):
                continue
            self._arrived()
            if line.strip() == b"data: [DONE]" or self._is_over.is_set():
                break
            finish = json.loads(line[6:])["choices"][0]["finish_reason"]
            self._wait()
        if finish != "length":
            self._fail("it was cut off")


class HostileServer:
    """A server that takes calls of cases.

    Args:
        directory: for its log and the adapters that cases bring.
        options: more of ``lorikeet serve``.
    """

    port: int

    def __init__(self, directory: Path, options: str = "") -> None:
        self.adapters = directory / "adapters"
        self.adapters.mkdir()
        self._log_file = directory / "server.log"
        self._options = options.split()
        self._process: subprocess.Popen[str] | None = None
        self._others: tuple[_Asker, ...] = ()
        self._peak = 0
        self._killed_at = 0
        self._is_spoilt = False  # work of a case goes on, and would be blamed on the next one
        self._is_over = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> HostileServer:
        self._watchdog.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._watchdog.join()
        self._end()

    def problems_of(self, case: Case) -> list[str]:
        """Send a case's calls; empty if everybody else was served and the answers are right."""
        calls = [case.call() for _ in range(case.at_once)]
        for call in calls:
            self._put_adapters(call)
        calls = [
            Call(call.path, call.body.replace(b"$DIR", os.fsencode(self.adapters)), call.method)
            for call in calls
        ]
        seconds = case.seconds if case.leaves is None else case.leaves
        found: list[str] = []
        with self.watched(found), ThreadPoolExecutor(case.at_once) as pool:
            replies = list(pool.map(lambda call: send(self.port, call, seconds), calls))
            if case.leaves is not None:
                found += self._is_worked_on()
        for reply in replies if case.leaves is None else []:
            found += _reply_problems(reply, case)
        return list(dict.fromkeys(found))

    def _is_worked_on(self) -> list[str]:
        """Whether what a client has left behind is in the way of another grammar."""
        reply = send(self.port, _GRAMMAR, FROZEN_SECONDS)
        if reply.status == 200:
            return []
        self._is_spoilt = True
        return [f"a grammar after it got {reply.status}: {reply.text[:200]}"]

    @contextmanager
    def watched(self, found: list[str]) -> Iterator[None]:
        """Whatever happens inside, happens beside others; what they notice is added to ``found``."""
        self._start()
        assert self._process is not None
        log_start = self._log_file.stat().st_size
        self._peak = 0
        for other in self._others:
            other.forget()
        yield
        is_frozen = not self._wait_for_others(time.monotonic())
        noticed = [problem for other in self._others for problem in other.problems()]
        found += noticed
        if self._process.poll() is not None:
            found.append(f"the server has ended with {self._process.returncode}")
        elif is_frozen:
            found.append(f"the server is frozen: nothing for {FROZEN_SECONDS:g} s")
        if self._killed_at:
            found.append(f"the server was killed at {self._killed_at / 1e9:.1f} GB")
        elif self._peak > MEMORY_BYTES:
            found.append(f"the server took {self._peak / 1e9:.1f} GB")
        found += self._log_problems(log_start)
        self._is_spoilt |= bool(noticed) or self._proportional() > RESTART_BYTES
        if self._is_spoilt or self._process.poll() is not None:
            self._end()

    def _start(self) -> None:
        if self._process is not None:
            return
        self.port = free_port()
        command = [sys.executable, "-m", "lorikeet.launch_server", "--model-path", "demo"]
        command += ["--port", str(self.port), "--lora-paths", "demo", *self._options]
        # What K/V fills is no request's fault, and would count as memory.
        command += ["--max-total-tokens", "32768", "--lora-resolver-dir", str(self.adapters)]
        self._killed_at = 0
        with self._log_file.open("w") as log:
            self._process = self._popen(command, log)
        wait_for_server(f"http://127.0.0.1:{self.port}", timeout=120, process=self._process)
        # The first grammar of a server makes its compiler.
        assert send(self.port, _GRAMMAR, 120).status == 200
        self._others = (Neighbour(self.port), Stream(self.port))
        for other in self._others:
            other.start()
        assert self._wait_for_others(time.monotonic())

    def _popen(self, command: list[str], log: IO[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # If the tests are killed, nobody watches its memory.
            preexec_fn=lambda: ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )

    def _end(self) -> None:
        for other in self._others:
            other.stop()
        if self._process is not None:
            processes = self._tree()
            terminate_process(self._process, timeout=5)
            _kill(processes)  # what outlives its parent
        for other in self._others:
            other.join()
        self._process, self._others, self._is_spoilt = None, (), False

    def _put_adapters(self, call: Call) -> None:
        for name, files in call.adapters.items():
            directory = self.adapters / name
            directory.mkdir(exist_ok=True)
            for file, data in files.items():
                (directory / file).write_bytes(data)

    def _wait_for_others(self, since: float) -> bool:
        """Whether all others get something after ``since``."""
        deadline = time.monotonic() + FROZEN_SECONDS
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                return True
            if all(other.has_answer_since(since) for other in self._others):
                return True
            time.sleep(0.01)
        return False

    def _log_problems(self, start: int) -> list[str]:
        data = self._log_file.read_bytes()
        # From the beginning of the line that was being written.
        text = data[data.rfind(b"\n", 0, start) + 1 :].decode(errors="backslashreplace")
        found = ["the log has the secret"] if "S3CRET" in text else []
        strange = [line for line in text.split("\n") if line and not _LOG_LINE.fullmatch(line)]
        return found + [f"the log has {line[:200]!r}" for line in strange[-3:]]

    def _tree(self) -> list[psutil.Process]:
        try:
            parent = psutil.Process(self._process.pid) if self._process is not None else None
            return [parent, *parent.children(recursive=True)] if parent is not None else []
        except psutil.NoSuchProcess:
            return []

    def _measure(self) -> int:
        """Bytes that the server's processes have together."""
        processes = self._tree()
        size = sum(_size(process, "rss") for process in processes)
        if size <= MEMORY_BYTES:
            return size
        return self._proportional()

    def _proportional(self) -> int:
        """The same without counting what several of them have mapped more than once; it takes longer to find out."""
        return sum(_size(process, "pss") for process in self._tree())

    def _watch(self) -> None:
        while not self._is_over.wait(0.05):
            size = self._measure()
            self._peak = max(self._peak, size)
            if size > KILL_BYTES:
                self._killed_at = size
                _kill(self._tree())


def _size(process: psutil.Process, kind: str) -> int:
    try:
        memory = process.memory_info() if kind == "rss" else process.memory_full_info()
        return int(getattr(memory, kind))
    except psutil.Error:
        return 0


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def _reply_problems(reply: Reply, case: Case) -> list[str]:
    if reply.status == -1:
        return [f"no answer within {case.seconds:g} s"]
    if reply.status == 0:
        return [f"no answer: {reply.text}"]
    found = ["the answer has the secret"] if "S3CRET" in reply.text else []
    if reply.status not in case.statuses:
        found.append(f"got {reply.status}, not {sorted(case.statuses)}: {reply.text[:300]}")
    if reply.status < 400:
        return found
    reason = reply.reason.strip()
    if not reason or reason.endswith(":") or _NO_REASON.search(reason):
        found.append(f"a refusal without a reason: {reply.text[:300]}")
    if len(reason) > MAX_MESSAGE:
        found.append(f"a reason of {len(reason)} characters: {reason[:200]}")
    if reply.status in case.statuses and not re.search(case.says, reason, re.IGNORECASE):
        found.append(f"the reason does not say {case.says!r}: {reason[:300]}")
    return found
