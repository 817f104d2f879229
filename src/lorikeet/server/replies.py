"""Replies: JSON, or server-sent events as they come; and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lorikeet.client.turns import give_way

_T = TypeVar("_T")

# Log-probabilities of a reply or a frame that take some milliseconds to write out.
LARGE_REPLY = 2_000
_large_replies = ThreadPoolExecutor(1, thread_name_prefix="large-reply")
# Items of a list that are written at a time: less than a millisecond.
_PIECE = 256

DONE = b"data: [DONE]\n\n"


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


def frame(content: object) -> bytes:
    """Encode one event, on a single line."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


class EventStream(Response):
    """Sends the frames of a generator as they come.

    The next frame is asked for only when the last one is on its way, so a client that reads slowly slows its own
    generator and nothing else. When the client goes away, the generator is cancelled at once, also while it waits.

    Args:
        on_end: called when the stream has ended, whatever the reason, also if it never began.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None], *, on_end: Callable[[], None]) -> None:
        # Without Content-Length the server sends chunks; caches and proxies must not hold them back.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._frames = frames
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._pump(send))
        except ClientDisconnect:
            pass  # nobody is left to be told
        finally:
            self._on_end()
            await self._frames.aclose()

    async def _pump(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        await give_way()
        async for data in self._frames:
            await send({"type": "http.response.body", "body": data, "more_body": True})
            await give_way()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
