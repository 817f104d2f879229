"""Routes about the server as a whole: health, model and server info, flushing the prefix cache, metrics."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from lorikeet import __version__
from lorikeet.client.client import EngineClient
from lorikeet.config import Settings
from lorikeet.core.commands import FlushCache
from lorikeet.errors import RequestError, UnavailableError
from lorikeet.masking import mask_all
from lorikeet.server.errors import error_response
from lorikeet.server.protocol import quote
from lorikeet.server.replies import JSONReply, until_disconnect

# How often a flush that found the engine busy is tried again within its timeout.
FLUSH_RETRY_S = 0.05
# How long it may wait for an engine that is never idle.
MAX_FLUSH_S = 600
# The document's description of the query of /flush_cache.
_SECONDS = {"type": "number", "minimum": 0, "maximum": MAX_FLUSH_S, "default": 0}
TIMEOUT = {"parameters": [{"name": "timeout", "in": "query", "schema": _SECONDS}]}


class Status(msgspec.Struct):
    """Reply of the routes that tell whether the server is well."""

    status: Literal["ok"] = "ok"


class ModelInfo(msgspec.Struct, kw_only=True):
    """Reply of ``/model_info``."""

    model_path: str
    tokenizer_path: str
    served_model_name: str
    is_generation: bool = True
    context_length: int
    vocab_size: int
    dtype: str
    lora_enabled: bool
    max_lora_rank: int | None
    lora_target_modules: list[str] | None


class Flushed(msgspec.Struct):
    """Reply of ``/flush_cache``."""

    success: bool = True
    message: str = "the prefix cache is empty"


class HealthRoutes:
    """The routes of this module.

    Args:
        registry: shown at ``/metrics`` if the settings say so.
        generate_timeout: seconds that ``/health_generate`` waits for its token.
    """

    def __init__(
        self,
        settings: Settings,
        client: EngineClient,
        registry: CollectorRegistry,
        *,
        generate_timeout: float,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._client = client
        self._generate_timeout = generate_timeout
        self._flushing = asyncio.Lock()

    def router(self) -> APIRouter:
        router = APIRouter(tags=["server"])
        router.get("/health")(self.health)
        router.get("/health_generate")(self.health_generate)
        for path in ("/model_info", "/get_model_info"):
            router.get(path)(self.model_info)
        for path in ("/server_info", "/get_server_info"):
            router.get(path)(self.server_info)
        router.post("/flush_cache", openapi_extra=TIMEOUT)(self.flush_cache)
        if self._settings.http.enable_metrics:
            router.get("/metrics")(self.metrics)
        return router

    async def health(self) -> Response:
        """200 while the engine lives and its process gives signs of it; says nothing about how busy it is."""
        self._client.check_awake()
        return JSONReply(Status())

    async def health_generate(self, request: Request) -> Response:
        """Generate one token; 503 if the engine is dead or does not answer in time. A full queue is no illness."""
        try:
            async with asyncio.timeout(self._generate_timeout):
                await until_disconnect(request.receive, self._generate_one())
        except UnavailableError:
            self._client.check_alive()
        except TimeoutError:
            return error_response(
                f"the engine produced no token within {self._generate_timeout:g} seconds", 503
            )
        return JSONReply(Status())

    async def _generate_one(self) -> None:
        sampling = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True}
        probe = {"input_ids": [0], "sampling_params": sampling}
        stream = await self._client.submit(self._client.intake.make_requests(probe))
        try:
            async for _ in stream:
                pass
        finally:
            stream.close()

    async def model_info(self) -> Response:
        settings = self._settings
        own = {
            "model_path": settings.model_path,
            "tokenizer_path": settings.tokenizer_path,
            "served_model_name": settings.served_model_name,
        }
        fields = msgspec.structs.asdict(self._client.info) | own
        return JSONReply(msgspec.convert(fields, ModelInfo))

    async def server_info(self) -> Response:
        """Every setting but the keys, what the engine reported, and its adapters and numbers of now.

        No text of it shows a password, a signature or whatever else a URL may keep secret.
        """
        self._client.check_alive()
        reply: dict[str, Any] = {
            **self._settings.by_option(),
            **msgspec.structs.asdict(self._client.info),
            "adapters": self._client.adapters.paths(),
            "version": __version__,
            "internal_states": [dict(self._client.stats)],
        }
        return JSONReply(mask_all(reply))

    async def flush_cache(self, request: Request) -> Response:
        """Forget cached prefixes. The engine must be idle; ``timeout`` is how many seconds to wait until it is."""
        seconds = _seconds(request, "timeout", most=MAX_FLUSH_S)
        await request.body()
        if await until_disconnect(request.receive, self._flush(time.monotonic() + seconds)):
            return JSONReply(Flushed())
        return error_response(
            "the cache was not flushed: requests are running; wait until they have ended or pass timeout=SECONDS",
            400,
        )

    async def metrics(self) -> Response:
        headers = {"Content-Type": CONTENT_TYPE_LATEST}
        return Response(generate_latest(self._registry), headers=headers)

    async def _flush(self, deadline: float) -> bool:
        """Flush before ``deadline``, as soon as the engine is idle; False if it never was."""
        while True:
            # One question at a time, however many wait.
            async with self._flushing:
                if await self._client.command(FlushCache()):
                    return True
                if time.monotonic() + FLUSH_RETRY_S > deadline:
                    return False
                await asyncio.sleep(FLUSH_RETRY_S)


def _seconds(request: Request, name: str, most: float) -> float:
    text = request.query_params.get(name, "0")
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:
        raise RequestError(
            f"{name}: must be a number of seconds, at least 0 and at most {most:g}; got {quote(text)}",
            name,
        )
    return value
