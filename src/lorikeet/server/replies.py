"""JSON replies, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive

_T = TypeVar("_T")

# Log-probabilities of a reply or a frame that take some milliseconds to write out.
LARGE_REPLY = 2_000
_large_replies = ThreadPoolExecutor(1, thread_name_prefix="large-reply")
# Items of a list that are written at a time: less than a millisecond.
_PIECE = 256


class JSONReply(Response):
    """A JSON body, of a Struct or of plain values (NaN and infinity become null)."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return orjson.dumps(content, default=msgspec.to_builtins)


async def list_body(items: Sequence[_T], show: Callable[[_T], object]) -> bytes:
    """The JSON ``{"object": "list", "data": [...]}``, made in pieces, so that thousands of items hold nobody up.

    Args:
        show: from an item to what its JSON holds.
    """
    pieces: list[bytes] = []
    for start in range(0, len(items), _PIECE):
        if start:
            await asyncio.sleep(0)
        piece = [show(item) for item in items[start : start + _PIECE]]
        pieces.append(msgspec.json.encode(piece)[1:-1])
    return b'{"object":"list","data":[' + b",".join(pieces) + b"]}"


async def build_reply(num_logprobs: int, build: Callable[[], _T]) -> _T:
    """``build()``, which writes out so many log-probabilities; on a thread if others would notice.

    That thread is one for all of them: each more would take a turn of the interpreter's lock from the loop.
    """
    if num_logprobs <= LARGE_REPLY:
        return build()
    return await asyncio.get_running_loop().run_in_executor(_large_replies, build)


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
