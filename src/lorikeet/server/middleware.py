"""What happens to every request before and after its route: the access line and the API key.

Both are plain ASGI, so that a client's disconnect still reaches the route.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorikeet.server.errors import error_response

logger = logging.getLogger("lorikeet.access")


class AccessLog:
    """One line per request: client, method, path, status, seconds. Neither query, headers nor body are logged."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        status = 500  # what the outermost layer answers if the route raises
        is_complete = has_left = False

        async def watched_receive() -> Message:
            nonlocal has_left
            message = await receive()
            if message["type"] == "http.disconnect" and not is_complete:
                has_left = True
            return message

        async def watched_send(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                is_complete = True
            await send(message)

        try:
            await self._app(scope, watched_receive, watched_send)
        finally:
            logger.info(
                "%s %s %s %d %.3fs%s",
                _client(scope),
                scope["method"],
                _path(scope),
                status,
                time.perf_counter() - begun,
                " (client left)" if has_left else "",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRules:
    """Which key a path needs.

    ``admin_paths`` need the admin key, or the ordinary one if there is no admin key. Other paths need the ordinary key
    (not the admin key), or nothing if there is none. ``open_paths`` never need one: they are for probes.
    """

    api_key: str | None = field(repr=False)
    admin_api_key: str | None = field(repr=False)
    admin_paths: Collection[str]
    open_paths: Collection[str]

    def key_of(self, path: str) -> str | None:
        """The key, or None if anybody may ask."""
        if path in self.open_paths:
            return None
        if path in self.admin_paths and self.admin_api_key is not None:
            return self.admin_api_key
        return self.api_key


class ApiKeys:
    """Asks for ``Authorization: Bearer KEY``, by ``rules``."""

    def __init__(self, app: ASGIApp, *, rules: KeyRules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app if scope["type"] != "http" or self._allows(scope) else _REFUSAL
        await app(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        key = self._rules.key_of(scope["path"])
        return key is None or hmac.compare_digest(_bearer(scope), key.encode())


_REFUSAL = error_response(
    "a valid key is needed: send the header 'Authorization: Bearer KEY'",
    401,
    headers={"WWW-Authenticate": "Bearer"},
)


def _bearer(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, key = value.partition(b" ")
            return key.strip() if kind.lower() == b"bearer" else b""
    return b""


def _client(scope: Scope) -> str:
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else "-"


def _path(scope: Scope) -> str:
    # Still percent-encoded, and escaped if a server lets control characters through: a line break would forge a line.
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return raw.decode("latin-1").encode("unicode_escape").decode("ascii")
