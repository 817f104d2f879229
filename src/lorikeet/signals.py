"""How a process reacts to signals before it has an event loop, and how the engine process does."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals that ask for the end."""


def is_wanted(number: signal.Signals) -> bool:
    """True if this process reacts to a signal: not to a SIGHUP that its starter (nohup) has switched off."""
    return number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN


def exit_on_stop() -> None:
    """Until something else is installed, a signal to stop unwinds the process: exit code 128 and the signal's number.

    SIGINT stays a KeyboardInterrupt (but see :func:`exit_on_interrupt`). SIGUSR1 writes to stderr where every thread is,
    even if one of them holds the interpreter's lock for ever; SIGUSR2 does nothing.
    """
    for number in STOPS:
        if number != signal.SIGINT and is_wanted(number):
            signal.signal(number, _exit)
    _show_threads()


@contextlib.contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """While the context lasts, a SIGINT exits with code 130, too; meant for imports.

    CPython remembers a KeyboardInterrupt that has passed through ``exec``, as dataclasses use it, and kills itself with the
    signal at the end, whoever has caught it.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler:  # switched off, or somebody else's
        yield
        return
    signal.signal(signal.SIGINT, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def leave_stops_to_parent() -> None:
    """Ignore signals to stop in a child: a terminal or a supervisor may signal every process, and the parent decides."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    _show_threads()


@contextlib.contextmanager
def interrupt_later() -> Iterator[None]:
    """Hold a SIGINT back until the end of the block, where its handler is called; a second one is not held back.

    For what must not be left half done. Only the main thread gets signals, so that elsewhere this does nothing.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[FrameType | None] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(frame)
        if len(held) > 1:
            handler(number, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        handler(signal.SIGINT, held[0])


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _show_threads() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if sys.stderr is not None:
        faulthandler.register(signal.SIGUSR1, all_threads=True)
