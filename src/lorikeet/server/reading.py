"""Where bodies and texts are read: what is small at once, what is not on threads, and what nobody should send not at all.

While one thread parses JSON no other runs, so a body may have so many values and no more. Tokenizing lets others run.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lorikeet.client.turns import give_way
from lorikeet.errors import RequestError

_Read = TypeVar("_Read")

# Bytes of a body, or characters of a text, whose reading other requests would notice. Twice as many take up to 40 ms.
LARGE = 8 * 1024
# What is larger than this has a thread apart, so that it delays nothing of a usual size. There is one, because texts take
# up to 150 times their length of memory while they are tokenized.
HUGE = 256 * 1024

_LARGE_LANE = ThreadPoolExecutor(2, thread_name_prefix="reading")
_HUGE_LANE = ThreadPoolExecutor(1, thread_name_prefix="reading-huge")

MAX_VALUES = 1_000_000
"""Values of a body: to parse so many takes about 0.1 seconds. A token id is a value, a text is one, too."""
MAX_CONTAINERS = 100_000
"""Lists and objects among them, which take longer."""

_SLICE = 2**20
# A part of a string without its quotes. Short matches, because no other thread runs during one.
_INSIDE_STRING = re.compile(rb'(?:[^"\\]{1,4096}+|\\.){0,1000}+', re.DOTALL)


async def run_sized(size: int, work: Callable[[], _Read]) -> _Read:
    """``work()``, which reads ``size`` bytes or characters: here if they are few, otherwise on a thread.

    If the caller is cancelled before a thread has begun, nothing happens.
    """
    if size <= LARGE:
        await give_way()
        return work()
    lane = _LARGE_LANE if size <= HUGE else _HUGE_LANE
    return await asyncio.get_running_loop().run_in_executor(lane, work)


def check_values(data: bytes, name: str = "the body has", param: str | None = None) -> None:
    """Refuse JSON of more than ``MAX_VALUES`` values or ``MAX_CONTAINERS`` lists and objects, before it is parsed.

    Args:
        name: what it is, for the message: "the body has".

    Raises:
        RequestError: says which.
    """
    if len(data) <= MAX_CONTAINERS:
        return
    # What is inside of strings counts only where it decides.
    if _count(data, (b",", b"{", b"[")) <= MAX_CONTAINERS:
        return
    num_values, num_containers = _outside_strings(data)
    for most, num, what in (
        (MAX_VALUES, num_values, "values"),
        (MAX_CONTAINERS, num_containers, "lists and objects"),
    ):
        if num > most:
            raise RequestError(f"{name} more than {most:,} {what}; allowed: {most:,}", param)


def _count(data: bytes, marks: tuple[bytes, ...]) -> int:
    """How often the marks occur; slice by slice, because no other thread runs during one."""
    starts = range(0, len(data), _SLICE)
    return sum(data.count(mark, start, start + _SLICE) for start in starts for mark in marks)


def _outside_strings(data: bytes) -> tuple[int, int]:
    """Values, but for the last of each list, and lists and objects; no more is counted once there are too many."""
    num_values = num_containers = 0
    pos = 0
    while pos < len(data) and num_values <= MAX_VALUES and num_containers <= MAX_CONTAINERS:
        end = data.find(b'"', pos, pos + _SLICE)
        stop = min(pos + _SLICE, len(data)) if end < 0 else end
        num_values += data.count(b",", pos, stop)
        num_containers += data.count(b"{", pos, stop) + data.count(b"[", pos, stop)
        pos = stop if end < 0 else _end_of_string(data, end + 1)
    return num_values, num_containers


def _end_of_string(data: bytes, pos: int) -> int:
    """Where a string ends that has begun before ``pos``, its quote included."""
    while match := _INSIDE_STRING.match(data, pos):
        if match.end() == pos:
            return pos + 1
        pos = match.end()
    return len(data)
