"""Work in processes that may die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import psutil
import pytest

from lorikeet.errors import AdapterNotFoundError, EngineFault, ModelError, RequestError
from lorikeet.sandbox import JobLimits, LimitError, Sandbox

LIMITS = JobLimits(wall_seconds=30, cpu_seconds=20, memory_bytes=256 * 2**20, answer_bytes=10_000)


def make(
    limits: JobLimits = LIMITS,
    *,
    greeting: str = "hi",
    jobs_per_worker: int = 1,
    num_spares: int = 0,
) -> Sandbox:
    return Sandbox(
        "tests.support.hostile_work:prepare",
        {"greeting": greeting},
        limits=limits,
        jobs_per_worker=jobs_per_worker,
        num_spares=num_spares,
    )


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = make()
    yield made
    made.close()


def ask(sandbox: Sandbox, kind: str, value: object = None) -> object:
    return sandbox.submit([kind, value]).future.result(timeout=60)


@pytest.mark.parametrize(
    "value", [None, 7, "text", b"\x00" * 5000, {"a": [1, 2.5, None]}, "x" * 9000]
)
def test_answers(sandbox, value):
    assert ask(sandbox, "echo", value) == value


def test_large_jobs(sandbox):
    job = sandbox.submit(["eat", 10, "x" * (8 * 2**20)])  # more than a socket's buffer
    assert job.future.result(timeout=60) == 10


def test_what_was_prepared_is_there(sandbox):
    assert ask(sandbox, "hello") == "hi"


def test_each_job_has_its_own_worker(sandbox):
    assert len({ask(sandbox, "pid") for _ in range(3)}) == 3


def test_workers_are_used_again():
    sandbox = make(jobs_per_worker=2)
    try:
        first, second, third = (ask(sandbox, "pid") for _ in range(3))
        assert first == second != third
    finally:
        sandbox.close()


def test_a_spare_worker_waits_for_the_next_job():
    sandbox = make(num_spares=1)
    try:
        assert ask(sandbox, "echo", 1) == 1
        deadline = time.monotonic() + 60
        while not sandbox._idle:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (spare,) = (worker.pid for worker in sandbox._idle)
        assert ask(sandbox, "pid") == spare
    finally:
        sandbox.close()


def test_a_job_may_have_less_time(sandbox):
    short = JobLimits(wall_seconds=30, cpu_seconds=0.1, memory_bytes=0)
    with pytest.raises(LimitError, match=r"more than 0\.1 s of processor time"):
        sandbox.submit(["spin", None], short).future.result(timeout=60)
    assert ask(sandbox, "echo", 1) == 1


@pytest.mark.parametrize(
    ("kind", "value", "limits", "limit", "text"),
    [
        ("sleep", 60, {"wall_seconds": 0.3}, "time", "it takes longer than 0.3 s"),
        ("spin", None, {"cpu_seconds": 0.2}, "cpu", "it takes more than 0.2 s of processor time"),
        ("eat", 2**29, {}, "memory", "it takes more than 256 MB of memory"),
        ("write", 20_000, {}, "answer", "its result is larger than 10,000 bytes"),
        ("crash", None, {}, "crash", "SIGSEGV"),
        ("exit", 3, {}, "crash", "its process ended without an answer"),
    ],
)
def test_limits(sandbox, kind, value, limits, limit, text):
    fields = ("wall_seconds", "cpu_seconds", "memory_bytes", "answer_bytes")
    own = JobLimits(**({name: getattr(LIMITS, name) for name in fields} | limits))
    limited = make(own) if limits else sandbox
    try:
        with pytest.raises(LimitError) as caught:
            ask(limited, kind, value)
        assert caught.value.limit == limit
        assert text in str(caught.value)
        assert ask(limited, "echo", 1) == 1  # the next job is not affected
    finally:
        if limits:
            limited.close()


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("request", RequestError),
        ("adapter", AdapterNotFoundError),
        ("custom", RequestError),
        ("model", ModelError),
    ],
)
def test_user_errors_cross(sandbox, kind, error):
    with pytest.raises(error, match="no good") as caught:
        ask(sandbox, "refuse", {"kind": kind, "message": "no good"})
    assert type(caught.value) is error
    assert caught.value.param == ("field" if issubclass(error, RequestError) else None)


@pytest.mark.parametrize("kind", ["raise", "surrogate", "unencodable"])
def test_other_exceptions_are_faults_of_that_job(sandbox, kind):
    with pytest.raises(EngineFault):
        ask(sandbox, kind, "a")
    assert ask(sandbox, "echo", 1) == 1


def test_a_slow_job_delays_no_other(sandbox):
    slow = sandbox.submit(["sleep", 30])
    assert ask(sandbox, "echo", 1) == 1
    assert not slow.future.done()
    slow.cancel()


def test_a_cancelled_job_ends(sandbox):
    jobs = [sandbox.submit(["sleep", 30]) for _ in range(3)]  # one of them waits
    for job in jobs:
        job.cancel()
    for job in jobs:
        with pytest.raises((EngineFault, CancelledError)):
            job.future.result(timeout=20)


def test_a_killed_fork_server_is_started_again():
    sandbox = make()
    try:
        assert ask(sandbox, "echo", 1) == 1
        assert sandbox._server._process is not None
        os.kill(sandbox._server._process.pid, signal.SIGKILL)
        sandbox._server._process.wait()
        with pytest.raises(EngineFault):
            ask(sandbox, "echo", 2)
        assert ask(sandbox, "echo", 3) == 3
    finally:
        sandbox.close()


def test_a_worker_of_a_killed_fork_server_is_not_looked_for_in_the_next_one():
    sandbox = make(jobs_per_worker=3)
    try:
        first = ask(sandbox, "pid")
        assert sandbox._server._process is not None
        os.kill(sandbox._server._process.pid, signal.SIGKILL)
        sandbox._server._process.wait()
        assert ask(sandbox, "pid") == first
        with pytest.raises(EngineFault):
            sandbox._server.fork()  # notices
        sandbox._server.end(sandbox._server.fork())
        assert ask(sandbox, "pid") == first  # its last job: the next server is told of its end
        assert ask(sandbox, "echo", 3) == 3
    finally:
        sandbox.close()


def test_a_failing_preparation_is_told_as_it_is():
    sandbox = make(greeting="refuse")
    try:
        with pytest.raises(ModelError, match="no such greeting"):
            ask(sandbox, "echo", 1)
    finally:
        sandbox.close()


def test_closing_leaves_no_process():
    me = psutil.Process()
    before = set(me.children(recursive=True))  # of other tests
    sandbox = make()
    job = sandbox.submit(["sleep", 60])

    def mine() -> set[psutil.Process]:
        return set(me.children(recursive=True)) - before

    deadline = time.monotonic() + 60
    while len(processes := mine()) < 2:  # the fork server and its worker
        assert time.monotonic() < deadline
        time.sleep(0.01)
    sandbox.close()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive
    with pytest.raises(LimitError):
        job.future.result(timeout=20)
    with pytest.raises(RuntimeError):
        sandbox.submit(["echo", 1])


def test_it_has_no_gpu(sandbox):
    assert ask(sandbox, "env", "CUDA_VISIBLE_DEVICES") == ""
