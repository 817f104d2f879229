"""The life of the server process: reserve the port, wait for the engine, serve, drain, leave no process behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import signal
import socket
from collections.abc import Callable, Coroutine, Generator
from multiprocessing.process import BaseProcess
from typing import Any

import uvicorn
from fastapi import FastAPI

from lorikeet import signals
from lorikeet.client.client import EngineClient
from lorikeet.errors import ConfigError, UnavailableError
from lorikeet.server.limits import MAX_HEAD, Connection, Limits
from lorikeet.server.middleware import SHUTTING_DOWN, Drain

logger = logging.getLogger(__name__)

# How long the engine process may take to end after it was told to, before it is killed.
ENGINE_EXIT_S = 5.0
# How often it is looked at.
EXIT_POLL_S = 0.01
# What a second signal leaves for answers that say so, and then for their handlers to see that nobody reads them.
LAST_REPLIES_S = 1.0
# Connections that wait to be accepted.
BACKLOG = 2048
# No server needs more open files than this.
MAX_DESCRIPTORS = 1 << 16
# How long the last words of requests that were cut off may take to reach clients that read slowly.
FLUSH_S = 5


def bind(host: str, port: int) -> socket.socket:
    """Reserve the address before any work. Nobody can connect yet: that begins when uvicorn listens.

    Raises:
        ConfigError: the port is in use or not permitted, or the host is no address of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from None
    # A name like localhost has addresses of both kinds; IPv4 is what clients of this API write.
    family, kind, protocol, _, where = min(found, key=lambda item: item[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        # Reuse was for lingering connections of a former server. If it stayed on, another starting server could
        # bind the same port as long as neither of the two listens; :func:`listen` turns it on again.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            message = f"--port {port} on {host} is in use; stop what uses it or give another port"
        else:
            message = f"--host {host} --port {port} cannot be used: {error.strerror}"
        raise ConfigError(message) from None
    return listener


def listen(listener: socket.socket) -> None:
    """Let clients connect to a socket of :func:`bind`.

    It may share its address with lingering connections from now on, or the system would refuse to listen; its own
    connections inherit that, so that they keep no later server from the port. Another server cannot have it: it could
    not while this one was only bound, and cannot listen beside it.

    Raises:
        ConfigError: somebody was faster.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise ConfigError(f"--port {port} on {host} cannot be used: {error.strerror}") from None


def raise_descriptor_limit() -> None:
    """Allow as many open files and connections as this user may have; the usual soft limit, 1,024, is old."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class HTTPServer(uvicorn.Server):
    """uvicorn on a socket that is already bound, logging the line that says it is ready.

    Args:
        drain: that of the application.
        limits: on connections.
    """

    def __init__(self, app: FastAPI, *, drain: Drain, ready_line: str, limits: Limits) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                http=Connection,
                h11_max_incomplete_event_size=MAX_HEAD,
                backlog=BACKLOG,
                timeout_keep_alive=limits.head_seconds,
                timeout_graceful_shutdown=FLUSH_S,
            )
        )
        self.drain = drain
        self._ready_line = ready_line

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals to :class:`StopSignals`; uvicorn would raise them again at its end."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in sockets or ():
            listen(listener)
        await super().startup(sockets)
        logger.info("%s", self._ready_line)

    def hang_up(self) -> None:
        """Drop every connection, and what its client has not read."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class StopSignals:
    """Signals to stop: the first one asks for the end, the second one forces it.

    Attributes:
        on_asked: called with the first signal, before the log says what happens now.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.forced = asyncio.Event()
        self.on_asked: Callable[[], None] = lambda: None

    def install(self) -> None:
        """Listen to the signals in the running loop (of the main thread)."""
        loop = asyncio.get_running_loop()
        for number in signals.STOPS:
            if signals.is_wanted(number):
                loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self.asked.is_set():
            self.asked.set()
            self.on_asked()
            logger.info("%s: finishing what runs; send it again to stop at once", name)
        else:
            logger.warning("%s: stopping at once", name)
            self.forced.set()


async def run_server(
    client: EngineClient,
    process: BaseProcess,
    listener: socket.socket,
    make_server: Callable[[], HTTPServer],
    stop: StopSignals,
) -> None:
    """Wait for the engine, serve until a signal or the engine's death, drain, and hang up.

    Args:
        make_server: called when the engine is ready.

    Raises:
        UserError, EngineDeadError: the engine could not start; or it died while it served, after the open requests
            were answered with that error.
    """
    try:
        starting = asyncio.ensure_future(client.start())
        await _first(starting, stop.asked.wait())
        # Also where the start is over: the same signal may have ended an engine that had hardly begun.
        if stop.asked.is_set():
            process.kill()  # an engine that loads does not read messages
            await _cancelled(starting)
            return
        starting.result()
        await _serve(make_server(), client, process, listener, stop)
    finally:
        await client.close()


async def _serve(
    server: HTTPServer,
    client: EngineClient,
    process: BaseProcess,
    listener: socket.socket,
    stop: StopSignals,
) -> None:
    stop.on_asked = server.drain.begin
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    death = asyncio.ensure_future(client.died())
    forced = asyncio.ensure_future(stop.forced.wait())
    await _first(serving, death, stop.asked.wait())
    if stop.asked.is_set():
        await _drain(server, client, serving, death, forced)
    server.should_exit = True
    await _first(serving, forced)
    if forced.done():
        await _cut_off(server, client)
        process.kill()
    await serving
    await _cancelled(forced)
    if death.done() and not stop.forced.is_set():
        raise death.result()
    await _cancelled(death)


async def _cut_off(server: HTTPServer, client: EngineClient) -> None:
    """End everything now: whoever waits is told, as far as it takes no time."""
    server.drain.begin()
    client.cut_off(UnavailableError(SHUTTING_DOWN))
    for _ in range(2):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_REPLIES_S):
                await server.drain.idle()
        server.hang_up()


async def _drain(
    server: HTTPServer, client: EngineClient, *ends: asyncio.Future[Any] | Coroutine[Any, Any, Any]
) -> None:
    """Wait until nothing runs any more, or one of ``ends`` is done; cut off what takes too long."""
    drain = server.drain
    waiting = asyncio.ensure_future(_first(drain.idle(), *ends))
    _, too_long = await asyncio.wait((waiting,), timeout=drain.timeout)
    if too_long:
        num_cut = client.cut_off(UnavailableError(SHUTTING_DOWN))
        logger.warning("%d requests were cut off after %g s", num_cut, drain.timeout)
        _, unread = await asyncio.wait((waiting,), timeout=FLUSH_S)
        if unread:
            server.hang_up()
    await _cancelled(waiting)


async def _first(*work: asyncio.Future[Any] | Coroutine[Any, Any, Any]) -> None:
    """Wait until one is done; coroutines that are not are cancelled, futures go on."""
    futures = [asyncio.ensure_future(item) for item in work]
    try:
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for item, future in zip(work, futures, strict=True):
            if item is not future:
                await _cancelled(future)


async def _cancelled(future: asyncio.Future[Any]) -> None:
    future.cancel()
    await asyncio.gather(future, return_exceptions=True)


async def end_process(process: BaseProcess, stop: StopSignals) -> None:
    """Wait for the engine process, by force if it must be."""
    deadline = asyncio.get_running_loop().time() + ENGINE_EXIT_S
    while process.exitcode is None and not stop.forced.is_set():
        if asyncio.get_running_loop().time() >= deadline:
            logger.warning("the engine process has not ended after %.0f s; killed", ENGINE_EXIT_S)
            break
        await asyncio.sleep(EXIT_POLL_S)
    process.kill()
    process.join()
