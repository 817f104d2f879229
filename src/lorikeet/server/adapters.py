"""Adapters at run time: load, unload and list, under SGLang's names and under vLLM's."""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial
from typing import TypeVar

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from lorikeet.client.client import EngineClient
from lorikeet.client.uploads import Uploads
from lorikeet.core.commands import (
    Command,
    LoadAdapter,
    LoadAdapterFromTensors,
    LoadOutcome,
    UnloadAdapter,
)
from lorikeet.core.failure import STATUS_CODES
from lorikeet.errors import ALREADY_LOADED, LoRADisabledError, UserError
from lorikeet.names import MAX_PATH, check_adapter_name, check_name
from lorikeet.server.protocol import (
    Body,
    InplaceLoadBody,
    LoadAdapterBody,
    LoadTensorsBody,
    NamedAdapterBody,
    UnloadAdapterBody,
    body_schema,
    parse_body,
    read_large,
)
from lorikeet.server.replies import JSONReply, list_body, until_disconnect
from lorikeet.server.tensors_body import receive

ADMIN_PATHS = (
    "/load_lora_adapter",
    "/unload_lora_adapter",
    "/load_lora_adapter_from_tensors",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
)

# A body here is an adapter's weights.
LARGE_PATHS = ("/load_lora_adapter_from_tensors",)

_AnyBody = TypeVar("_AnyBody", bound=Body)


class Loaded(msgspec.Struct):
    """SGLang's reply to a load or an unload: what came of it, and which adapters are loaded now, with their paths."""

    success: bool
    error_message: str
    loaded_adapters: dict[str, str]


class AdapterRoutes:
    """The routes of this module.

    Each refusal of SGLang's names is a 400 of their own form, each of vLLM's a 400 or 404 of vLLM's form. What is not
    the caller's fault (a dead engine) has the form of every other error.
    """

    def __init__(self, base: str, client: EngineClient) -> None:
        self._client = client
        self._uploads = Uploads(client.uploads)
        self._base = base

    def router(self) -> APIRouter:
        router = APIRouter(tags=["adapters"])
        for path, route, body in (
            ("/load_lora_adapter", self.load, LoadAdapterBody),
            ("/unload_lora_adapter", self.unload, UnloadAdapterBody),
            ("/load_lora_adapter_from_tensors", self.load_tensors, LoadTensorsBody),
            ("/v1/load_lora_adapter", self.load_inplace, InplaceLoadBody),
            ("/v1/unload_lora_adapter", self.unload_named, NamedAdapterBody),
        ):
            router.post(path, openapi_extra=body_schema(body))(route)
        router.get("/v1/adapters")(self.adapters)
        # A name may be a path or a hub id, so it may contain slashes.
        router.get("/v1/adapters/{name:path}")(self.adapter)
        return router

    async def load(self, request: Request) -> Response:
        """Load an adapter from a directory, a hub id or a URL. A client that leaves before the end cancels it."""

        async def work() -> LoadOutcome:
            body = await self._body(request, LoadAdapterBody)
            self._check_load(body.lora_name, body.lora_path)
            command = LoadAdapter(body.lora_name, body.lora_path, pinned=body.pinned)
            return await self._load(request, command)

        return await self._native(work())

    async def unload(self, request: Request) -> Response:
        """Refuse new requests for an adapter at once, and answer when the running ones have ended."""

        async def work() -> LoadOutcome:
            body = await self._body(request, UnloadAdapterBody)
            check_name(body.lora_name, "lora_name")
            return await self._client.command(UnloadAdapter(body.lora_name, body.timeout))

        return await self._native(work())

    async def load_tensors(self, request: Request) -> Response:
        """Load an adapter whose weights are in the body."""

        async def work() -> LoadOutcome:
            self._check_enabled()
            weights = self._uploads.new()
            try:
                rest = await receive(request.stream(), weights)
                body = await read_large(rest, partial(parse_body, LoadTensorsBody))
                self._check_load(body.lora_name)
            except BaseException:
                self._uploads.discard(weights)
                raise
            # From here on the file is the engine's, whether it loads the adapter or not.
            command = LoadAdapterFromTensors(
                body.lora_name, body.config_dict, str(weights), body.pinned
            )
            return await self._load(request, command)

        return await self._native(work())

    async def load_inplace(self, request: Request) -> Response:
        """vLLM's load. ``load_inplace`` replaces an adapter of the name: requests that run keep the one they have."""
        try:
            body = await self._body(request, InplaceLoadBody)
            self._check_load(body.lora_name, body.lora_path)
            command = LoadAdapter(body.lora_name, body.lora_path, replace=body.load_inplace)
            await self._load(request, command)
        except UserError as error:
            return _vllm_refusal(error)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload_named(self, request: Request) -> Response:
        """vLLM's unload."""
        try:
            body = await self._body(request, NamedAdapterBody)
            check_name(body.lora_name, "lora_name")
            await self._client.command(UnloadAdapter(body.lora_name))
        except UserError as error:
            return _vllm_refusal(error)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def adapters(self) -> Response:
        """Every adapter, those that are loading, unloading or have failed included, without their reports."""
        self._client.check_alive()
        adapters = self._client.adapters
        body = await list_body(adapters.views(), adapters.shown)
        return Response(body, media_type=JSONReply.media_type)

    async def adapter(self, name: str) -> Response:
        """One adapter. While a name has several versions, the one that a request would get."""
        self._check_enabled()
        self._client.check_alive()
        return JSONReply(self._client.adapters.find(name))

    async def _body(self, request: Request, model: type[_AnyBody]) -> _AnyBody:
        data = await request.body()
        self._check_enabled()
        return parse_body(model, data)

    async def _load(self, request: Request, command: Command[LoadOutcome]) -> LoadOutcome:
        return await until_disconnect(request.receive, self._client.command(command))

    async def _native(self, work: Awaitable[LoadOutcome]) -> Response:
        status, message = 200, ""
        try:
            await work
        except UserError as error:
            status = STATUS_CODES["refused" if error.kind == "not_found" else error.kind]
            message = str(error)
        reply = Loaded(not message, message, self._client.adapters.paths())
        return JSONReply(reply, status_code=status)

    def _check_enabled(self) -> None:
        if not self._client.info.lora_enabled:
            raise LoRADisabledError("LoRA is not enabled; start the server with --enable-lora")

    def _check_load(self, name: str, path: str | None = None) -> None:
        check_adapter_name(name, self._base)
        if path is not None:
            check_name(path, "lora_path", most=MAX_PATH)


def _vllm_refusal(error: UserError) -> Response:
    """vLLM's error body: ``type`` is one of its names, and ``code`` the status."""
    status, message, param = STATUS_CODES[error.kind], str(error), error.param
    if error.kind == "not_found":
        kind, param = "NotFoundError", None
    elif error.code == ALREADY_LOADED:
        # Its clients look for this text.
        message += (
            "; this LoRA adapter has already been loaded, set 'load_inplace' to true to replace it"
        )
        kind = "InvalidUserInput"
    else:
        kind = "BadRequestError"
    body = {"message": message, "type": kind, "param": param, "code": status}
    return JSONReply({"error": body}, status_code=status)
