"""What workers of a sandbox are told to do in its tests."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from lorikeet.errors import AdapterNotFoundError, ModelError, RequestError


class CustomError(RequestError):
    """A class that the other side does not know."""


def _spin(_: object) -> None:
    while True:
        pass


def _stack(_: object) -> None:
    # The C stack, not Python's: what a recursive C++ parser does.
    os.kill(os.getpid(), signal.SIGSEGV)


def _refuse(job: dict[str, str]) -> None:
    kinds = {
        "request": RequestError,
        "adapter": AdapterNotFoundError,
        "custom": CustomError,
    }
    if job["kind"] == "model":
        raise ModelError(job["message"])
    raise kinds[job["kind"]](job["message"], "field")


_DO: dict[str, Callable[[Any], Any]] = {
    "echo": lambda value: value,
    "pid": lambda _: os.getpid(),
    "spin": _spin,
    "sleep": time.sleep,
    "eat": lambda size: len(bytearray(size)),
    "write": lambda size: "x" * size,
    "crash": _stack,
    "exit": os._exit,
    "refuse": _refuse,
    "raise": lambda text: int(text),
    "surrogate": lambda _: int("\ud800"),
    "unencodable": lambda _: "\ud800",
    "env": os.environ.get,
}


def prepare(greeting: str) -> Callable[[Any], Any]:
    """The handler; ``greeting`` is what the job ``hello`` answers."""
    if greeting == "refuse":
        raise ModelError("there is no such greeting")
    return lambda job: greeting if job[0] == "hello" else _DO[job[0]](job[1])
