"""Much work on an event loop, done in short turns: nobody who asks for little waits for all of it.

A loop runs everything that is ready before it looks at its sockets again. With a thousand streams to write, or a
thousand outputs of one step, that takes a second; so whoever does one of many such things gives way first::

    for thing in many:
        await give_way()
        work_on(thing)
"""

from __future__ import annotations

import asyncio
import time

TURN_S = 0.02
"""About how long a loop works before it looks at its sockets."""


class _Turn:
    """What the running loop has worked since it looked at its sockets."""

    loop: asyncio.AbstractEventLoop | None = None
    began: float = 0.0


_turn = _Turn()


async def give_way() -> None:
    """Let the loop look at its sockets if it has worked for ``TURN_S``; who came first goes on first."""
    loop = asyncio.get_running_loop()
    while _turn.loop is loop and time.perf_counter() - _turn.began > TURN_S:
        await asyncio.sleep(0)
    if _turn.loop is not loop:
        _turn.loop, _turn.began = loop, time.perf_counter()
        loop.call_soon(_end)


def _end() -> None:
    _turn.loop = None
