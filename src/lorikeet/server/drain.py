"""Shutting down as clients see it: requests that run may finish, and new ones are refused with 503.

The socket stays open meanwhile, so that a client or a load balancer gets an answer that says what to do, and no reset.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from lorikeet.server.errors import RETRY_AFTER, error_response

MESSAGE = "the server is shutting down"


class Drain:
    """Counts the requests that run, and knows when no more are taken. For one asyncio loop.

    Args:
        timeout: seconds that running requests may take to finish.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.has_begun = False
        self.num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        """Take no more requests."""
        self.has_begun = True

    async def idle(self) -> None:
        """Wait until nothing runs."""
        await self._idle.wait()

    def enter(self) -> None:
        self.num_running += 1
        self._idle.clear()

    def leave(self) -> None:
        self.num_running -= 1
        if not self.num_running:
            self._idle.set()


class DrainGate:
    """Plain ASGI around the routes: 503 for what comes after ``drain`` has begun, on whatever connection.

    Args:
        open_paths: what may still be asked then.
    """

    def __init__(self, app: ASGIApp, *, drain: Drain, open_paths: Collection[str]) -> None:
        self._app = app
        self._drain = drain
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._drain.has_begun and scope["path"] not in self._open_paths:
            await _REFUSAL(scope, receive, send)
            return
        self._drain.enter()
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            # The loop ends, and whoever still waits there has been told and hung up; there is nobody left to tell.
            if not self._drain.has_begun:
                raise
        finally:
            self._drain.leave()


# The connection's next request would be refused as well: close it, so that the client looks for another server.
_REFUSAL = error_response(MESSAGE, 503, headers={**RETRY_AFTER, "Connection": "close"})
