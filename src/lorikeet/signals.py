"""What signals do to a process before it has a loop, and to the engine's."""

from __future__ import annotations

import faulthandler
import signal
import sys
from types import FrameType
from typing import NoReturn

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals that ask for the end."""


def is_wanted(number: signal.Signals) -> bool:
    """False for a SIGHUP that whoever started this process (nohup) has switched off."""
    return number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN


def exit_on_stop() -> None:
    """Until something else is installed, a signal to stop unwinds the process: exit code 128 and the signal's number.

    SIGINT stays a KeyboardInterrupt. SIGUSR1 writes to stderr where every thread is, also where one of them holds
    the interpreter's lock for ever; SIGUSR2 does nothing.
    """
    for number in STOPS:
        if number != signal.SIGINT and is_wanted(number):
            signal.signal(number, _exit)
    _show_threads()


def leave_stops_to_parent() -> None:
    """For a child: a terminal and a supervisor may signal every process of a group, and the parent decides."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    _show_threads()


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _show_threads() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if sys.stderr is not None:
        faulthandler.register(signal.SIGUSR1, all_threads=True)
