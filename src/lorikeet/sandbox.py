"""Runs untrusted work in worker processes, with limits on time and memory.

A grammar, a template or a pattern of somebody else can take any time, any memory, and the process that runs it. So it
runs in a *worker* process with limits on both. A worker is forked from a *fork server*, which has imported what
the work needs and runs nothing of strangers itself, so that a new worker costs milliseconds and shares its memory with the
others::

    this process --control socket--> fork server --fork--> worker
         +------------------------one socket a worker-----------------+

This process (any thread of it) sends a job and waits for its answer; what takes too long is killed. A dead worker costs
its own job only. If this process ends, the fork server kills the workers and ends, too.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, cast

import msgspec

from lorikeet import envs, errors
from lorikeet.errors import EngineFault, LorikeetError, UserError

Handler = Callable[[Any], Any]
"""What a worker does: a job in, an answer out, both of what msgpack can hold."""

# The fork server imports libraries: seconds on a busy machine.
_START_SECONDS = 120.0
# It ends when its control socket is closed, after it has killed its workers.
_END_SECONDS = 2.0
# How often a waiting thread looks whether its job was cancelled.
_POLL_SECONDS = 0.05
# Workers are for work that can wait: whoever only wants a token goes first.
_NICENESS = 10
_FORK, _WAIT = b"F", b"W"
_SIZE = struct.Struct("!Q")
_STATUS = struct.Struct("!q")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLimits:
    """What one job may take.

    Attributes:
        wall_seconds: from the moment a worker has it.
        cpu_seconds: of all threads of its worker together.
        memory_bytes: address space beyond what the fork server has.
        answer_bytes: of its answer.
    """

    wall_seconds: float
    cpu_seconds: float
    memory_bytes: int
    answer_bytes: int = 64 * 2**20


class LimitError(LorikeetError):
    """A job reached one of its limits, or took its worker down.

    Attributes:
        limit: ``time``, ``cpu``, ``memory``, ``answer``, or ``crash``.
    """

    def __init__(self, limit: str, message: str) -> None:
        super().__init__(message)
        self.limit = limit


class Job:
    """One piece of work; ``future`` has its answer.

    The future's exception is the ``UserError`` that the handler raised, a :class:`LimitError`, or an
    ``EngineFault`` if the handler failed otherwise or there is no fork server.
    """

    def __init__(self) -> None:
        self.future: Future[Any]
        self.is_cancelled = threading.Event()

    def cancel(self) -> None:
        """Nobody waits for it any more: it does not begin, or its worker is killed."""
        self.is_cancelled.set()
        self.future.cancel()


class Sandbox:
    """Workers for one kind of work.

    Args:
        setup: ``module:function``, called once in the fork server with ``args``; returns the :data:`Handler`.
        args: JSON values.
        limits: of each job.
        num_workers: jobs that run at the same time; others wait.
        jobs_per_worker: after so many its worker is replaced; 1 leaves nothing of a job to the next.
        num_spares: workers that are forked after a job, for the next ones, which then begin at once.
        name: of the threads.
    """

    def __init__(
        self,
        setup: str,
        args: dict[str, Any],
        *,
        limits: JobLimits,
        num_workers: int = 2,
        jobs_per_worker: int = 1,
        num_spares: int = 0,
        name: str = "sandbox",
    ) -> None:
        self.limits = limits
        self._jobs_per_worker = jobs_per_worker
        self._num_spares = num_spares
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix=name)
        self._server = _ForkServer(setup, args, limits)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._is_closed = False

    def submit(self, work: object, limits: JobLimits | None = None) -> Job:
        """Have a worker do ``work``, which is what msgpack can hold; from any thread. The first call starts the processes.

        Args:
            limits: of this job's time and answer; memory is that of all jobs.
        """
        job = Job()
        job.future = self._threads.submit(self._run, job, work, limits or self.limits)
        return job

    def close(self) -> None:
        """End every process; jobs that run fail."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in idle:
            worker.sock.close()
        self._server.close()

    def _run(self, job: Job, work: object, limits: JobLimits) -> Any:
        data = msgspec.msgpack.encode((limits.cpu_seconds, limits.answer_bytes, work))
        worker = self._take()
        try:
            answer = worker.ask(data, limits, job.is_cancelled)
        except BaseException:
            self._server.end(worker)
            self._prepare_spare()
            raise
        worker.num_jobs += 1
        kind, value = answer
        with self._lock:
            keep = kind == "answer" and worker.num_jobs < self._jobs_per_worker
            if keep := keep and not self._is_closed:
                self._idle.append(worker)
        if not keep:
            self._server.end(worker)
        self._prepare_spare()
        if kind == "answer":
            return value
        raise _exception(kind, value, limits)

    def _prepare_spare(self) -> None:
        with self._lock:
            if not self._is_closed and len(self._idle) < self._num_spares:
                self._threads.submit(self._add_spare)

    def _add_spare(self) -> None:
        worker = self._server.fork()
        with self._lock:
            if keep := not self._is_closed:
                self._idle.append(worker)
        if not keep:
            self._server.end(worker)

    def _take(self) -> _Worker:
        with self._lock:
            if self._is_closed:
                raise EngineFault("the sandbox is closed")
            if self._idle:
                return self._idle.pop()
        return self._server.fork()


@dataclass(slots=True)
class _Worker:
    """A worker, as this process sees it."""

    pid: int
    sock: socket.socket
    server: _ForkServer
    num_jobs: int = 0

    def ask(self, data: bytes, limits: JobLimits, is_cancelled: threading.Event) -> tuple[str, Any]:
        """Send a job and wait for the answer.

        Raises:
            LimitError: it took too long, or the worker has died.
            EngineFault: the job was cancelled.
        """
        deadline = time.monotonic() + limits.wall_seconds
        self.sock.settimeout(_POLL_SECONDS)
        pending = memoryview(_frame(data))
        received = bytearray()
        while not _is_whole(received):
            if is_cancelled.is_set():
                raise EngineFault("cancelled")
            if time.monotonic() >= deadline:
                raise LimitError("time", f"it takes longer than {limits.wall_seconds:g} s")
            try:
                if pending:
                    pending = pending[self.sock.send(pending) :]
                    continue
                chunk = self.sock.recv(2**20)
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                chunk = b""
            if not chunk:
                raise self.server.death(self, limits)
            received += chunk
        return cast("tuple[str, Any]", msgspec.msgpack.decode(received[_SIZE.size :]))


def _is_whole(received: bytearray) -> bool:
    size = _SIZE.size
    return len(received) >= size and len(received) >= size + _SIZE.unpack_from(received)[0]


class _ForkServer:
    """The fork server, as this process sees it; started when first needed, again if it has died."""

    def __init__(self, setup: str, args: dict[str, Any], limits: JobLimits) -> None:
        self._config = json.dumps({"setup": setup, "args": args, "limits": asdict(limits)})
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._is_closed = False

    def fork(self) -> _Worker:
        """Start a worker.

        Raises:
            UserError, EngineFault: the fork server could not prepare the work.
        """
        with self._lock:
            control = self._started()
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    socket.send_fds(control, [_FORK], [theirs.fileno()])
                    pid = _STATUS.unpack(_read_exactly(control, _STATUS.size))[0]
                except OSError as error:
                    ours.close()
                    self._drop()
                    raise EngineFault(f"no worker could be started: {error}") from error
        if pid < 0:
            ours.close()
            raise EngineFault(f"no worker could be started: {os.strerror(-pid)}")
        return _Worker(pid, ours, self)

    def end(self, worker: _Worker) -> int:
        """Kill a worker if it still lives.

        Returns:
            how it ended, as ``os.waitpid`` says; 0 if that is not known.
        """
        worker.sock.close()
        with self._lock:
            if self._control is None or worker.pid == 0:
                return 0
            pid, worker.pid = worker.pid, 0
            try:
                # The fork server has not waited for it yet, so the number is still that worker's.
                self._control.sendall(_WAIT + _STATUS.pack(pid))
                return _STATUS.unpack(_read_exactly(self._control, _STATUS.size))[0]
            except OSError:
                self._drop()
                return 0

    def death(self, worker: _Worker, limits: JobLimits) -> LimitError:
        """Why a worker has hung up, with a job of these limits."""
        status = self.end(worker)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGPROF:
                seconds = limits.cpu_seconds
                return LimitError("cpu", f"it takes more than {seconds:g} s of processor time")
            if number == signal.SIGKILL:
                return _out_of_memory(limits)
            return LimitError(
                "crash",
                f"it is nested too deeply, or too large (its process ended with {signal.Signals(number).name})",
            )
        return LimitError("crash", "its process ended without an answer")

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._drop()

    def _drop(self) -> None:
        """Let go of the process: it ends when its control socket is closed."""
        process, self._process = self._process, None
        if self._control is not None:
            self._control.close()
            self._control = None
        if process is not None:
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _started(self) -> socket.socket:
        if self._is_closed:
            raise EngineFault("the sandbox is closed")
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair()
        with theirs:
            # -P: no module of the current directory takes the place of one of Python's.
            self._process = subprocess.Popen(
                [
                    sys.executable, "-P", "-c", "from lorikeet.sandbox import main; main()",
                    str(theirs.fileno()), self._config,
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # the signals of a terminal are for this process
                env=_environment(),
            )  # fmt: skip
        self._control = ours
        ours.settimeout(_START_SECONDS)
        try:
            size = _SIZE.unpack(_read_exactly(ours, _SIZE.size))[0]
            kind, value = msgspec.msgpack.decode(_read_exactly(ours, size))
        except OSError as error:
            self._drop()
            raise EngineFault(f"the process for such work does not start: {error}") from error
        if kind != "answer":
            self._drop()
            raise _exception(kind, value, self._limits)
        return ours


def _environment() -> dict[str, str]:
    return envs.for_child(
        PYTHONPATH=os.pathsep.join(filter(None, sys.path)),
        CUDA_VISIBLE_DEVICES="",
        TOKENIZERS_PARALLELISM="false",
        # Each arena of each thread would reserve 64 MB of the address space.
        MALLOC_ARENA_MAX="2",
        OMP_NUM_THREADS="1",
    )


def _megabytes(limits: JobLimits) -> str:
    return f"{limits.memory_bytes / 2**20:,.0f} MB"


def _out_of_memory(limits: JobLimits) -> LimitError:
    return LimitError("memory", f"it takes more than {_megabytes(limits)} of memory")


def _exception(kind: str, value: Any, limits: JobLimits) -> LorikeetError:
    """The exception that an answer of another kind stands for."""
    match kind:
        case "memory":
            return _out_of_memory(limits)
        case "answer too large":
            return LimitError("answer", f"its result is larger than {limits.answer_bytes:,} bytes")
        case "user error":
            name, words, param = value
            made = getattr(errors, name)
            return made(words, param) if issubclass(made, errors.RequestError) else made(*words)
        case _:
            return EngineFault(str(value))


def _read_exactly(sock: socket.socket, size: int) -> bytes:
    """Receive exactly ``size`` bytes; raises ConnectionError if the other side has hung up."""
    data = bytearray()
    while len(data) < size:
        chunk = sock.recv(min(size - len(data), 2**20))
        if not chunk:
            raise ConnectionError("it has ended")
        data += chunk
    return bytes(data)


# --------------------------------------------------------------------------------------------------------------------
# The other side: the fork server and its workers.


def main() -> NoReturn:
    """Body of the fork server: prepare, then fork workers until the control socket is closed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    config = json.loads(sys.argv[2])
    limits = JobLimits(**config["limits"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module, _, function = config["setup"].partition(":")
    made: list[Handler] = []

    def prepare(args: dict[str, Any]) -> None:
        made.append(getattr(importlib.import_module(module), function)(**args))

    control.sendall(_frame(_answer(prepare, config["args"], limits.answer_bytes)))
    if made:
        _serve(control, made[0], limits)
    os._exit(0)


def _serve(control: socket.socket, handler: Handler, limits: JobLimits) -> None:
    pids: set[int] = set()
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1 + _STATUS.size, 1)
        if not data:
            break
        if data == _FORK:
            pid = _fork(control, socket.socket(fileno=fds[0]), handler, limits)
            if pid > 0:
                pids.add(pid)
            control.sendall(_STATUS.pack(pid))
        else:
            while len(data) < 1 + _STATUS.size:
                data += control.recv(1 + _STATUS.size - len(data))
            pid = _STATUS.unpack(data[1:])[0]
            status = 0
            if pid in pids:  # not one of a fork server before this one
                os.kill(pid, signal.SIGKILL)  # changes nothing if it is dead
                pids.discard(pid)
                status = os.waitpid(pid, 0)[1]
            control.sendall(_STATUS.pack(status))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _fork(control: socket.socket, sock: socket.socket, handler: Handler, limits: JobLimits) -> int:
    """The worker's number, or an error's as a negative one."""
    try:
        pid = os.fork()
    except OSError as error:
        sock.close()
        return -(error.errno or errno.EAGAIN)
    if pid:
        sock.close()
        return pid
    try:
        os.nice(_NICENESS)
        control.close()
        # Libraries print what they think of a job; the answer says what matters.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _work(sock, handler, limits)
    finally:
        os._exit(1)


def _work(sock: socket.socket, handler: Handler, limits: JobLimits) -> NoReturn:
    """Body of a worker: jobs in, answers out, until this side of its socket is closed."""
    used = _address_space()
    if used is not None:
        most = used + limits.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    while True:
        try:
            size = _SIZE.unpack(_read_exactly(sock, _SIZE.size))[0]
            seconds, answer_bytes, job = msgspec.msgpack.decode(_read_exactly(sock, size))
        except ConnectionError:
            os._exit(0)
        # Counts the time of all threads; when it is over, SIGPROF ends the process.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = _answer(handler, job, answer_bytes)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sock.sendall(_frame(answer))


def _address_space() -> int | None:
    """Bytes that this process has mapped; None where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except FileNotFoundError:
        return None


def _answer(handler: Handler, job: Any, most_bytes: int) -> bytes:
    """What ``handler`` makes of ``job``, encoded; whatever it raises, too."""
    try:
        encoded = msgspec.msgpack.encode(("answer", handler(job)))
        if len(encoded) <= most_bytes:
            return encoded
        value: tuple[str, Any] = ("answer too large", None)
    except MemoryError:
        value = ("memory", None)
    except UserError as error:
        known = next(kind for kind in type(error).__mro__ if kind.__name__ in errors.__all__)
        param = getattr(error, "param", None)
        words = error.words if isinstance(error, errors.RequestError) else (str(error),)
        value = ("user error", [known.__name__, _plain(words), _plain(param)])
    except Exception as error:  # noqa: BLE001  # whatever it is, the answer is that job's
        value = ("fault", _plain(f"{type(error).__name__}: {error}"[:1000]))
    return msgspec.msgpack.encode(value)


def _plain(value: Any) -> Any:
    """A text, or the texts in a tuple, without lone surrogates, which no encoding has."""
    if isinstance(value, tuple):
        return tuple(map(_plain, cast("tuple[Any, ...]", value)))
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def _frame(data: bytes) -> bytes:
    return _SIZE.pack(len(data)) + data
