"""Server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

import orjson
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lorikeet.client.turns import give_way
from lorikeet.server.replies import until_disconnect

DONE = b"data: [DONE]\n\n"


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
