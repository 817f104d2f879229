"""What happens to every request before and after its route: the access line, who may call from where, the API key, and
the refusal while the server shuts down.

All are plain ASGI, so that a client's disconnect still reaches the route.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorikeet.server.errors import RETRY_AFTER, error_response
from lorikeet.server.replies import JSONReply

logger = logging.getLogger("lorikeet.access")

SHUTTING_DOWN = "the server is shutting down"


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

    def refusal(self, scope: Scope) -> JSONReply | None:
        """The answer to a request without its key, which stands in ``Authorization: Bearer KEY``; or None."""
        key = self.key_of(scope["path"])
        has_key = key is None or hmac.compare_digest(_bearer(scope), key.encode())
        return None if has_key else _NO_KEY


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginRules:
    """From where the server may be called.

    A browser sends what any web page tells it to, from behind every firewall and with this machine's own address as
    its own. So what a page of another origin posts is refused, unless that origin is allowed; what changes the server
    has to be JSON, which a page of another origin cannot send unasked; and where the server listens to this machine
    alone, it has to be called by a name of this machine, since any page can let its own name point here.

    Attributes:
        origins: allowed ones, or ``*``.
        hosts: names of this server besides those of this machine; None where it listens to others, too.
        changing_paths: what changes the server.
    """

    origins: Collection[str]
    hosts: Collection[str] | None
    changing_paths: Collection[str]

    @classmethod
    def of(
        cls, host: str, origins: Collection[str], hosts: Collection[str], paths: Collection[str]
    ) -> OriginRules:
        """The rules of a server that listens at ``host``."""
        known = {host.lower(), *(name.lower() for name in hosts)}
        known |= {urlsplit(origin).hostname or "" for origin in origins} - {""}
        is_open = not _is_this_machine(host)
        return cls(
            origins=frozenset(origin.rstrip("/").lower() for origin in origins),
            hosts=None if is_open else frozenset(known),
            changing_paths=frozenset(paths),
        )

    def refusal(self, scope: Scope) -> JSONReply | None:
        """Why a request is not taken, or None."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None  # they change nothing
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        is_changing = scope["path"] in self.changing_paths
        if not self._allows_origin(origin, host, headers.get("sec-fetch-site")):
            return _OTHER_ORIGIN
        if (is_changing or origin is not None) and not self._allows_host(host, origin):
            return _OTHER_HOST
        if is_changing and _has_body(headers) and not _is_json(headers.get("content-type", "")):
            return _NO_JSON
        return None

    def _allows_origin(self, origin: str | None, host: str, site: str | None) -> bool:
        if "*" in self.origins or (origin is not None and origin.lower() in self.origins):
            return True
        if origin is None:
            # Not a browser, or one that says that the page is the server's own.
            return site in (None, "same-origin", "none")
        return origin.lower().partition("://")[2] == host.lower()

    def _allows_host(self, host: str, origin: str | None) -> bool:
        if self.hosts is None or (origin is not None and origin.lower() in self.origins):
            return True
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.hosts or _is_local_name(name) or _address(name) is not None


def _is_this_machine(host: str) -> bool:
    address = _address(host)
    return _is_local_name(host) if address is None else address.is_loopback


def _is_local_name(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")


def _address(name: str) -> IPv4Address | IPv6Address | None:
    """The address that a name is; one that is no name cannot be made to point elsewhere."""
    try:
        return ip_address(name)
    except ValueError:
        return None


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (
        kind.startswith("application/") and kind.endswith("+json")
    )


class Gate:
    """Plain ASGI around the routes that answers what is refused.

    Args:
        refusal: the answer to a request that is not taken, or None.
    """

    def __init__(self, app: ASGIApp, *, refusal: Callable[[Scope], JSONReply | None]) -> None:
        self._app = app
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)


_OTHER_ORIGIN = error_response(
    "a web page of another origin may not call this server; allowed: origins that --allowed-origins names",
    403,
)
_OTHER_HOST = error_response(
    "the Host header names another server; allowed: localhost, addresses, --host and names of --allowed-hosts",
    403,
)
_NO_JSON = error_response(
    "what changes the server has to say that it is JSON: send the header 'Content-Type: application/json'",
    415,
)


_NO_KEY = error_response(
    "a valid key is needed: send the header 'Authorization: Bearer KEY'",
    401,
    headers={"WWW-Authenticate": "Bearer"},
)


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
            await _DRAINING(scope, receive, send)
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
_DRAINING = error_response(SHUTTING_DOWN, 503, headers={**RETRY_AFTER, "Connection": "close"})


def _bearer(scope: Scope) -> bytes:
    kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.encode("latin-1").strip() if kind.lower() == "bearer" else b""


def _client(scope: Scope) -> str:
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else "-"


def _path(scope: Scope) -> str:
    # Still percent-encoded, and escaped if a server lets control characters through: a line break would forge a line.
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return raw.decode("latin-1").encode("unicode_escape").decode("ascii")
