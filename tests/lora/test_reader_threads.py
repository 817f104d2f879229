"""Jobs on threads: how many at a time, in which order, and that none is waited for at the end."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import wait

import pytest

from lorikeet.lora.reader import ReaderThreads

PATIENCE_S = 20


class Gate:
    """A job that waits until it is opened, and counts how many wait at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_inside = self.most_inside = 0
        self.began = threading.Semaphore(0)
        self.open = threading.Event()

    def __call__(self) -> str:
        with self.lock:
            self.num_inside += 1
            self.most_inside = max(self.most_inside, self.num_inside)
        self.began.release()
        assert self.open.wait(PATIENCE_S)
        with self.lock:
            self.num_inside -= 1
        return "done"


def test_results_and_errors() -> None:
    threads = ReaderThreads("t", 2)
    assert threads.submit(lambda: 3).result(PATIENCE_S) == 3
    with pytest.raises(ZeroDivisionError):
        threads.submit(lambda: 1 // 0).result(PATIENCE_S)


def test_so_many_at_a_time() -> None:
    gate, threads = Gate(), ReaderThreads("t", 2)
    futures = [threads.submit(gate) for _ in range(6)]
    for _ in range(2):
        assert gate.began.acquire(timeout=PATIENCE_S)
    gate.open.set()
    assert not wait(futures, PATIENCE_S).not_done
    assert gate.most_inside == 2


def test_one_key_leaves_places_for_the_others() -> None:
    silent, threads = Gate(), ReaderThreads("t", 4, 2)
    stuck = [threads.submit(silent, "silent") for _ in range(8)]
    assert threads.submit(lambda: 3, "other").result(PATIENCE_S) == 3
    silent.open.set()
    assert not wait(stuck, PATIENCE_S).not_done
    assert silent.most_inside == 2


def test_what_has_not_begun_can_be_taken_back() -> None:
    gate, threads = Gate(), ReaderThreads("t", 1)
    first, second, third = (threads.submit(gate) for _ in range(3))
    assert second.cancel()
    threads.close()
    assert third.cancelled()
    assert threads.submit(gate).cancelled()
    gate.open.set()
    assert first.result(PATIENCE_S) == "done"


def test_the_interpreter_does_not_wait_for_a_job() -> None:
    code = (
        "import threading\n"
        "from lorikeet.lora.reader import ReaderThreads\n"
        "began = threading.Event()\n"
        "ReaderThreads('t', 1).submit(lambda: (began.set(), threading.Event().wait()))\n"
        "began.wait()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
