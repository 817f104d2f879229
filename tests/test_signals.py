"""What signals do to a process that has no loop."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from lorikeet.signals import interrupt_later


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with interrupt_later():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("the rest")
        done.append("behind it")
    assert done == ["the rest"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), interrupt_later():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_block_comes_first() -> None:
    with pytest.raises(ValueError, match="its own"), interrupt_later():
        raise ValueError("its own")


def test_other_threads_are_left_alone() -> None:
    def block() -> None:
        with interrupt_later():
            seen.append(signal.getsignal(signal.SIGINT))

    seen: list[object] = []
    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
