"""The routes of the OpenAI API: models, completions and chats, embeddings."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lorikeet.adapters.registry import MAX_LISTED
from lorikeet.client.client import EngineClient
from lorikeet.client.reply import vector_floats
from lorikeet.client.stream import CompletionStream
from lorikeet.config import Settings
from lorikeet.core.commands import FindAdapter
from lorikeet.core.request import Pooling
from lorikeet.errors import EngineFault, RequestError, UserError
from lorikeet.masking import shortened
from lorikeet.server.errors import ModelNotFoundError, describe
from lorikeet.server.openai.bodies import ChatBody, CompletionBody, EmbeddingBody
from lorikeet.server.openai.calls import (
    Call,
    CallReader,
    check_finish,
    find_adapter,
    make_call,
    prompt_field,
    submit,
)
from lorikeet.server.openai.replies import (
    ChatChoice,
    Choice,
    CompletionChoice,
    Envelope,
)
from lorikeet.server.protocol import body_schema, parse_body, read_large
from lorikeet.server.replies import (
    DONE,
    EventStream,
    JSONReply,
    build_reply,
    frame,
    list_body,
    until_disconnect,
)
from lorikeet.text.completion import Snapshot

Card = dict[str, Any]

# Native names of fields of an embedding -> the client's.
_FIELD_NAMES = {"text": "input", "input_ids": "input"}


class ModelRoutes:
    """Lists models: the base and its adapters."""

    def __init__(self, settings: Settings, client: EngineClient) -> None:
        self._client = client
        self._base = settings.served_model_name
        self._root = settings.model_path
        self._created = int(time.time())
        # The list, and which state of the adapters it shows: clients poll it.
        self._list: tuple[int, bytes] | None = None

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", tags=["openai"])
        router.get("/models")(self.models)
        # An id may be a path or a hub id, so it may contain slashes.
        router.get("/models/{model_id:path}")(self.model)
        return router

    async def models(self) -> Response:
        """List the base, and then every adapter."""
        self._client.check_alive()
        adapters = self._client.adapters
        if self._list is None or self._list[0] != adapters.num_changes:
            state, paths = adapters.num_changes, adapters.paths()
            self._list = state, await list_body([(self._base, None), *paths.items()], self._card)
        return Response(self._list[1], media_type=JSONReply.media_type)

    async def model(self, model_id: str) -> Response:
        """Describe one model, under each name that a request may use: ``ADAPTER`` and ``BASE:ADAPTER``."""
        self._client.check_alive()
        adapters = self._client.adapters
        if model_id == self._base:
            return JSONReply(self._card((self._base, None)))
        path = adapters.path(model_id)
        if path is None:
            path = adapters.path(model_id.removeprefix(f"{self._base}:"))
        if path is None:
            raise ModelNotFoundError(
                f"the model '{shortened(model_id)}' does not exist; known: {self._known()}", "model"
            )
        return JSONReply(self._card((model_id, path)))

    def _known(self) -> str:
        """The names of the base and of the first adapters, for a message."""
        paths = self._client.adapters.paths()
        more = len(paths) - MAX_LISTED
        listed = ", ".join([self._base, *islice(paths, MAX_LISTED)])
        return f"{listed} and {more} more" if more > 0 else listed

    def _card(self, model: tuple[str, str | None]) -> Card:
        """Describe an adapter, given with its path, or the base, given with None."""
        name, path = model
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "lorikeet",
            "root": self._root if path is None else path,
            "parent": None if path is None else self._base,
            "max_model_len": self._client.info.context_length,
        }


class CompletionRoutes:
    """Answers completions and chats, whole or streamed, and makes embeddings, by the base or an adapter."""

    def __init__(self, settings: Settings, client: EngineClient) -> None:
        self._client = client
        self._base = settings.served_model_name
        self._reader = CallReader(self._base, client, settings.http.tool_call_parser)

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", tags=["openai"])
        router.post("/completions", openapi_extra=body_schema(CompletionBody))(self.complete)
        router.post("/chat/completions", openapi_extra=body_schema(ChatBody))(self.chat)
        router.post("/embeddings", openapi_extra=body_schema(EmbeddingBody))(self.embed)
        return router

    async def complete(self, request: Request) -> Response:
        """Continue prompts."""
        return await self._answer(request, self._read_completion, CompletionChoice)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, self._read_chat, ChatChoice)

    async def _answer(
        self, request: Request, read: Callable[[bytes], Awaitable[Call]], make: type[Choice]
    ) -> Response:
        data = await request.body()

        async def begin() -> tuple[Call, CompletionStream]:
            call = await read(data)
            return call, await submit(self._client, call)

        call, stream = await until_disconnect(request.receive, begin())
        if call.is_stream:
            return EventStream(self._events(stream, call, make), on_end=stream.close)
        try:
            return await until_disconnect(request.receive, self._whole(stream, call, make))
        finally:
            stream.close()

    async def _read_completion(self, data: bytes) -> Call:
        return await read_large(data, self._reader.completion)

    async def _read_chat(self, data: bytes) -> Call:
        body = await read_large(data, partial(parse_body, ChatBody))
        adapter, _ = find_adapter(self._base, body)
        if adapter is not None and adapter not in self._client.adapter_templates:
            # The resolver may find it, and messages are rendered with its template; if not, submitting says why.
            with suppress(UserError):
                await self._client.command(FindAdapter(adapter))
        return await self._reader.chat(body, len(data))

    async def _whole(self, stream: CompletionStream, call: Call, make: type[Choice]) -> JSONReply:
        """The reply once everything has finished. One that fails fails the call, and the others are aborted."""
        snapshots = [completion.snapshot() for completion in await stream.finished(check_finish)]

        def reply() -> JSONReply:
            choices = [
                make(index, call, self._client.tokenizer).whole(snapshot)
                for index, snapshot in enumerate(snapshots)
            ]
            return JSONReply(Envelope(call, make).whole(choices, snapshots))

        return await build_reply(sum(item.num_logprobs for item in snapshots), reply)

    async def _events(
        self, stream: CompletionStream, call: Call, make: type[Choice]
    ) -> AsyncGenerator[bytes, None]:
        """Frames of chunks as the choices grow. One that fails ends the stream, and the others are aborted."""
        envelope = Envelope(call, make)
        num = call.batch.num_completions
        choices = [make(index, call, self._client.tokenizer) for index in range(num)]
        finished: dict[int, Snapshot] = {}
        told: dict[int, int] = {}  # index -> log-probabilities so far
        try:
            async for index, completion in stream:
                if completion.finish is not None:
                    check_finish(completion.finish)
                snapshot = completion.snapshot()
                new = snapshot.num_logprobs - told.get(index, 0)
                told[index] = snapshot.num_logprobs
                for choice in await build_reply(new, partial(choices[index].chunks, snapshot)):
                    yield frame(envelope.chunk(choice))
                if snapshot.finish is not None:
                    finished[index] = snapshot
            if call.has_usage:
                yield frame(envelope.usage_chunk([finished[index] for index in range(num)]))
        except (UserError, EngineFault) as error:
            yield frame(describe(error)[1])
        yield DONE

    async def embed(self, request: Request) -> Response:
        """Turn prompts into vectors."""
        data = await request.body()

        async def work() -> dict[str, Any]:
            return await self._vectors(*await read_large(data, self._read_embedding))

        return JSONReply(await until_disconnect(request.receive, work()))

    def _read_embedding(self, data: bytes) -> tuple[EmbeddingBody, Call]:
        body = parse_body(EmbeddingBody, data)
        self._check_dimensions(body.dimensions)
        native = {prompt_field(body.input): body.input, "sampling_params": {"max_new_tokens": 0}}
        pooling = Pooling(kind=body.pooling or "last", normalize=body.normalize is not False)
        call = make_call(self._base, self._client, body, "embd", native, _FIELD_NAMES, pooling)
        return body, call

    def _check_dimensions(self, dimensions: int | None) -> None:
        size = self._client.info.hidden_size
        if dimensions is not None and dimensions != size:
            raise RequestError(
                f"dimensions is {dimensions}; allowed: {size}, the size of the model's hidden states: a part of a vector "
                "has a meaning only where a model was trained for it",
                "dimensions",
            )

    async def _vectors(self, body: EmbeddingBody, call: Call) -> dict[str, Any]:
        """The reply once every vector is there. One that fails fails the call, and the others are aborted."""
        stream = await submit(self._client, call)
        try:
            vectors = [item.embedding for item in await stream.finished(check_finish)]
        finally:
            stream.close()
        num_tokens = sum(len(request.prompt_token_ids) for request in call.batch.requests)
        return {
            "id": call.id,
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": _shown(vector, body.encoding_format),
                }
                for index, vector in enumerate(vectors)
            ],
            "model": call.model,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }


def _shown(vector: bytes | None, encoding: str | None) -> str | list[float]:
    if vector is None:
        raise AssertionError("the request has no vector")
    return base64.b64encode(vector).decode() if encoding == "base64" else vector_floats(vector)
