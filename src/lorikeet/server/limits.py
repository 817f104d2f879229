"""What a connection may cost: the size of a body, and the time that a head and a body may take.

A client that sends slowly, endlessly or not at all holds a socket and some bytes, never a thread, so these bounds are wide.
"""

from __future__ import annotations

import asyncio
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, cast

import h11
import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from lorikeet.errors import RequestError
from lorikeet.server.errors import error_body

logger = logging.getLogger(__name__)

# Request line and headers. A head that comes in one piece may be larger.
MAX_HEAD = 64 * 1024
# With fewer free ones than this the log is told, and again after so many seconds.
SPARE_DESCRIPTORS = 16
WARN_AGAIN_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on what a client sends.

    Attributes:
        body_bytes: largest body; the weights of an adapter have a bound of their own, ``adapter_bytes``.
        body_seconds: how long a body may take, and one second more for each ``body_rate`` bytes that have come.
        head_seconds: how long a head may take from its first byte, and how long a connection may be idle.
    """

    body_bytes: int = 32 << 20
    adapter_bytes: int = 4 << 30
    body_seconds: float = 30.0
    body_rate: int = 1024
    head_seconds: int = 30


class BodyTooLargeError(RequestError):
    """A body that is larger than the limit, and not read to its end."""

    kind = "too_large"


class BodyTimeoutError(RequestError):
    """A body that came too slowly, and is not read to its end."""

    kind = "too_slow"


class BodyLimits:
    """Raises an error where a route reads a body that is too large or too slow, so that each endpoint answers in its own form.

    A length that is declared is refused before anything is read. What a client sends after a refusal is thrown away:
    if the connection were closed instead, many clients would see that and not the answer.

    Args:
        adapter_paths: where ``limits.adapter_bytes`` holds.
    """

    def __init__(self, app: ASGIApp, *, limits: Limits, adapter_paths: Collection[str]) -> None:
        self._app = app
        self._limits = limits
        self._adapter_paths = frozenset(adapter_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            is_large = scope["path"] in self._adapter_paths
            most = self._limits.adapter_bytes if is_large else self._limits.body_bytes
            receive = _BoundedBody(receive, scope, self._limits, most).receive
        await self._app(scope, receive, send)


class _BoundedBody:
    """The body of one request as it comes."""

    def __init__(self, receive: Receive, scope: Scope, limits: Limits, most: int) -> None:
        self._receive = receive
        self._limits = limits
        self._most = most
        self._begun = asyncio.get_running_loop().time()
        self._num_bytes = 0
        self._is_complete = False
        # h11 has checked that it is a number.
        self._declared = int(dict(scope["headers"]).get(b"content-length", 0))

    async def receive(self) -> Message:
        if self._is_complete:
            return await self._receive()
        self._check_size(self._declared)
        limits = self._limits
        deadline = self._begun + limits.body_seconds + self._num_bytes / limits.body_rate
        try:
            async with asyncio.timeout_at(deadline):
                message = await self._receive()
        except TimeoutError:
            raise BodyTimeoutError(
                f"the body came too slowly: {self._num_bytes} bytes so far; allowed: {limits.body_seconds:g} seconds, "
                f"and one more for each {limits.body_rate} bytes"
            ) from None
        self._num_bytes += len(message.get("body", b""))
        self._check_size(self._num_bytes)
        self._is_complete = not message.get("more_body", False)
        return message

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._most:
            raise BodyTooLargeError(
                f"the body has {num_bytes} bytes or more; allowed here: {self._most}"
            )


class _Transport:
    """A transport that is closed in another way."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._transport = transport
        self.close = close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Warned:
    """When the log was last told that descriptors run out."""

    at = -math.inf


def _warn_of_descriptors(transport: asyncio.Transport) -> None:
    """Say so when the process is about to have no more: the event loop closes further connections without a word."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    number: int = transport.get_extra_info("socket").fileno()  # the lowest that was free
    now = time.monotonic()
    if number >= most - SPARE_DESCRIPTORS and now - _Warned.at >= WARN_AGAIN_S:
        _Warned.at = now
        logger.warning(
            "file descriptors run out: %d of %d are open, so new connections may be reset; allow more (ulimit -n)",
            number,
            most,
        )


class Connection(H11Protocol):
    """uvicorn's HTTP with a bound on the time of a head, and with errors in this server's form.

    The bound is ``timeout_keep_alive``, which otherwise ends with the first byte of the next request. It also bounds how
    long the rest of a refused body is thrown away.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _is_lingering = False
    _raw: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._raw = transport
        super().connection_made(cast("asyncio.Transport", _Transport(transport, self.close)))
        self._start_head_timer()
        _warn_of_descriptors(transport)

    def close(self) -> None:
        """Close the connection; if the client still sends, first let it find the answer.

        The system would throw an answer away that the client has not read, if the connection were closed while there
        is something of the client's that nobody has read.
        """
        is_sending = self.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if self._is_lingering or not is_sending or self._raw.is_closing():
            self._raw.close()
            return
        self._is_lingering = True
        self._start_head_timer()
        self._raw.write_eof()
        self._raw.resume_reading()

    def shutdown(self) -> None:
        """The server ends: nobody is waited for who has had an answer."""
        cycle = self.cycle
        self._is_lingering = not cycle or cycle.response_complete
        super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_lingering:
            return  # it is thrown away, until the client ends or its time is over
        self._start_head_timer()
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        cycle = self.cycle
        if (
            cycle and not cycle.response_complete
        ):  # a request is being answered: its head was complete
            self._stop_head_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP and close the connection; called while the parser's error is handled."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # there was an answer already
            return
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if status == 431:
            msg = f"the request's head is too large; allowed: {MAX_HEAD} bytes"
        body = orjson.dumps(error_body(msg, status))
        headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
        response = h11.Response(status_code=status, headers=[*headers, ("connection", "close")])
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
