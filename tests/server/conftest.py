"""The application over an engine double: in the test's loop (``api``) or behind real sockets (``live``)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from lorikeet.client.client import EngineClient
from lorikeet.client.transport import ClientTransport
from lorikeet.config import ServerConfig, Settings, resolve
from lorikeet.server.app import make_app
from lorikeet.server.middleware import Drain
from lorikeet.text.tokenizer import Tokenizer
from tests.support.byte_tokenizer import save_byte_tokenizer
from tests.support.fake_engine import FakeEngine, Knobs, ThreadEngine
from tests.support.live_server import LiveServer

# The prompt is what the messages say and nothing else, so the double answers with it.
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer, whose chat template writes contents alone, and nothing else."""
    directory = save_byte_tokenizer(tmp_path_factory.mktemp("model"))
    settings = {"eos_token": "</s>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.load(model_dir)


@dataclass
class Api:
    """An application in the test's own loop."""

    http: httpx.AsyncClient
    client: EngineClient
    thread: ThreadEngine
    drain: Drain

    @property
    def engine(self) -> FakeEngine:
        return self.thread.engine

    @property
    def knobs(self) -> Knobs:
        return self.thread.knobs

    async def generate(self, **body: Any) -> httpx.Response:
        return await self.http.post("/generate", json=body)


MakeApi = Callable[..., Any]


@pytest.fixture
def config(model_dir: Path) -> ServerConfig:
    return ServerConfig(model_path=str(model_dir), served_model_name="base", enable_metrics=True)


@asynccontextmanager
async def open_api(
    settings: Settings, tokenizer: Tokenizer, knobs: Knobs, health_timeout: float = 60.0
) -> AsyncIterator[Api]:
    registry = CollectorRegistry()
    with ThreadEngine(knobs) as thread:
        client = EngineClient(
            transport=ClientTransport(thread.address),
            process=thread.process,
            tokenizer=tokenizer,
            registry=registry,
            model_name="base",
            max_lora=settings.lora.max_loras_per_batch,
        )
        try:
            await client.start()
            drain = Drain(timeout=1)
            app = make_app(settings, client, registry, drain=drain, health_timeout=health_timeout)
            # An exception that escapes is answered with 500, as uvicorn does.
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                yield Api(http, client, thread, drain)
        finally:
            knobs.is_stuck = knobs.hold_accept = False
            await client.close()


@pytest.fixture
async def api(config: ServerConfig, tokenizer: Tokenizer) -> AsyncIterator[Api]:
    async with open_api(resolve(config), tokenizer, Knobs()) as made:
        yield made


@pytest.fixture
async def make_api(config: ServerConfig, tokenizer: Tokenizer) -> AsyncIterator[MakeApi]:
    """``await make_api(config=..., settings=..., health_timeout=..., **knobs)``; settings are those of the configuration
    unless they are given."""
    async with AsyncExitStack() as stack:

        async def make(
            config: ServerConfig = config,
            settings: Settings | None = None,
            health_timeout: float = 60.0,
            **knobs: Any,
        ) -> Api:
            return await stack.enter_async_context(
                open_api(settings or resolve(config), tokenizer, Knobs(**knobs), health_timeout)
            )

        yield make


@pytest.fixture
def make_live(config: ServerConfig, tokenizer: Tokenizer) -> Iterator[Callable[..., LiveServer]]:
    """``make_live(**knobs)``: a server on a free port."""
    with ExitStack() as stack:

        def make(config: ServerConfig = config, send_buffer: int = 0, **knobs: Any) -> LiveServer:
            live = LiveServer(config, tokenizer, Knobs(**knobs), send_buffer=send_buffer)
            return stack.enter_context(live)

        yield make
