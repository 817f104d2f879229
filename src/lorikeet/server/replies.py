"""JSON replies, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive

_T = TypeVar("_T")

# Log-probabilities of a reply or a frame that take some milliseconds to write out.
LARGE_REPLY = 2_000


class JSONReply(Response):
    """A JSON body, encoded by orjson (NaN and infinity become null)."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return orjson.dumps(content)


async def build_reply(num_logprobs: int, build: Callable[[], _T]) -> _T:
    """``build()``, which writes out so many log-probabilities; on a thread if others would notice."""
    return await asyncio.to_thread(build) if num_logprobs > LARGE_REPLY else build()


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of ``work``, which is cancelled if the client goes away first. The body must have been read.

    Raises:
        ClientDisconnect: it went away.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for other in (task, watcher):
            other.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
