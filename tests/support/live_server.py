"""The real server on a free port, in a thread, over an engine double."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import uvloop
from prometheus_client import CollectorRegistry

from lorikeet.client.client import EngineClient
from lorikeet.client.transport import ClientTransport
from lorikeet.config import ServerConfig, resolve
from lorikeet.server.app import LIMITS, make_app
from lorikeet.server.lifecycle import HTTPServer, bind
from lorikeet.server.limits import Limits
from lorikeet.server.middleware import Drain
from lorikeet.text.tokenizer import Tokenizer
from tests.support.fake_engine import FakeEngine, Knobs, ThreadEngine


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Fail unless ``condition`` becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


class LiveServer:
    """``with LiveServer(config, tokenizer, knobs) as server``: requests go to ``server.url``."""

    client: EngineClient
    port: int

    def __init__(
        self,
        config: ServerConfig,
        tokenizer: Tokenizer,
        knobs: Knobs,
        limits: Limits = LIMITS,
        *,
        send_buffer: int = 0,
    ) -> None:
        self._send_buffer = send_buffer
        self._settings = resolve(config)
        self._limits = limits
        self._tokenizer = tokenizer
        self.thread = ThreadEngine(knobs)
        self.knobs = knobs
        self._server: HTTPServer | None = None
        self._thread = threading.Thread(target=self._main, name="live-server")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> FakeEngine:
        return self.thread.engine

    def _main(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._run())

    def num_buffered_bytes(self) -> list[int]:
        """What each connection still has to write."""
        assert self._server is not None
        connections = list(self._server.server_state.connections)
        return [connection.transport.get_write_buffer_size() for connection in connections]

    async def _run(self) -> None:
        registry = CollectorRegistry()
        self.client = EngineClient(
            transport=ClientTransport(self.thread.address),
            process=self.thread.process,
            tokenizer=self._tokenizer,
            registry=registry,
            model_name="base",
        )
        try:
            await self.client.start()
            with bind("127.0.0.1", 0) as listener:
                if self._send_buffer:  # of the connections, too
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer)
                self.port = listener.getsockname()[1]
                self.drain = Drain(timeout=1)
                app = make_app(
                    self._settings, self.client, registry, drain=self.drain, limits=self._limits
                )
                self._server = HTTPServer(
                    app, drain=self.drain, ready_line="live server ready", limits=self._limits
                )
                await self._server.serve(sockets=[listener])
        finally:
            await self.client.close()

    def __enter__(self) -> Self:
        self.thread.__enter__()
        self._thread.start()
        wait_until(lambda: self._server is not None and self._server.started)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.knobs.is_stuck = self.knobs.hold_accept = False
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join()
        self.thread.__exit__(kind, error, trace)
