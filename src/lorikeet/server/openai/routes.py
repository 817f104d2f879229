"""The routes of the OpenAI API: models, completions and chats, embeddings."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
    ModelCall,
    ModelNames,
    check_finish,
    named,
    prompt_field,
    submit,
)
from lorikeet.server.openai.replies import (
    ChatChoice,
    CompletionChoice,
    Envelope,
    MakeChoice,
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
from lorikeet.text.completion import Completion, Snapshot

Card = dict[str, Any]


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
        router.add_api_route("/models", self.models, methods=["GET"])
        # An id may be a path or a hub id, so it may contain slashes.
        router.add_api_route("/models/{model_id:path}", self.model, methods=["GET"])
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


@dataclass(frozen=True, slots=True)
class _Form:
    """In what completions and chats differ."""

    read: Callable[[bytes], Awaitable[Call]]
    make_choice: MakeChoice
    kind: str
    chunk_kind: str


class CompletionRoutes:
    """Answers completions and chats, whole or streamed."""

    def __init__(self, settings: Settings, client: EngineClient) -> None:
        self._client = client
        base = settings.served_model_name
        self._names = ModelNames(base)
        self._reader = CallReader(self._names, client, settings.http.tool_call_parser)
        self._completion = _Form(
            self._read_completion, CompletionChoice, "text_completion", "text_completion"
        )
        self._chat = _Form(self._read_chat, ChatChoice, "chat.completion", "chat.completion.chunk")

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", tags=["openai"])
        router.add_api_route(
            "/completions",
            self.complete,
            methods=["POST"],
            openapi_extra=body_schema(CompletionBody),
        )
        router.add_api_route(
            "/chat/completions", self.chat, methods=["POST"], openapi_extra=body_schema(ChatBody)
        )
        return router

    async def complete(self, request: Request) -> Response:
        """Continue prompts."""
        return await self._answer(request, self._completion)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, self._chat)

    async def _answer(self, request: Request, form: _Form) -> Response:
        data = await request.body()
        call, stream = await until_disconnect(request.receive, self._begin(data, form))
        if call.body.stream:
            return EventStream(self._events(stream, call, form), on_end=stream.close)
        try:
            return await until_disconnect(request.receive, self._whole(stream, call, form))
        finally:
            stream.close()

    async def _begin(self, data: bytes, form: _Form) -> tuple[Call, CompletionStream]:
        call = await form.read(data)
        return call, await submit(self._client, call)

    async def _read_completion(self, data: bytes) -> Call:
        return await read_large(data, self._reader.completion)

    async def _read_chat(self, data: bytes) -> Call:
        body = await read_large(data, partial(parse_body, ChatBody))
        adapter = self._names.adapter_of(body)
        if adapter is not None and adapter not in self._client.adapter_templates:
            # The resolver may find it, and messages are rendered with its template; if not, submitting says why.
            with suppress(UserError):
                await self._client.command(FindAdapter(adapter))
        return await self._reader.chat(body, len(data))

    async def _whole(self, stream: CompletionStream, call: Call, form: _Form) -> JSONReply:
        """The reply once everything has finished. One that fails fails the call, and the others are aborted."""
        finished: dict[int, Snapshot] = {}
        async for index, completion in stream:
            if completion.finish is not None:
                check_finish(completion.finish)
                finished[index] = completion.snapshot()
        snapshots = [finished[index] for index in range(call.batch.num_completions)]
        num_logprobs = sum(snapshot.num_logprobs for snapshot in snapshots)
        return await build_reply(num_logprobs, partial(self._reply, snapshots, call, form))

    def _reply(self, snapshots: Sequence[Snapshot], call: Call, form: _Form) -> JSONReply:
        choices = [
            form.make_choice(index, call, self._client.tokenizer).whole(snapshot)
            for index, snapshot in enumerate(snapshots)
        ]
        return JSONReply(_envelope(call, form).whole(choices, snapshots))

    async def _events(
        self, stream: CompletionStream, call: Call, form: _Form
    ) -> AsyncGenerator[bytes, None]:
        """Frames of chunks as the choices grow. One that fails ends the stream, and the others are aborted."""
        envelope = _envelope(call, form)
        num = call.batch.num_completions
        choices = [form.make_choice(index, call, self._client.tokenizer) for index in range(num)]
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
            if envelope.has_usage:
                yield frame(envelope.usage_chunk([finished[index] for index in range(num)]))
        except (UserError, EngineFault) as error:
            yield frame(describe(error)[1])
        yield DONE


def _envelope(call: Call, form: _Form) -> Envelope:
    return Envelope(call, kind=form.kind, chunk_kind=form.chunk_kind)


_FIELD_NAMES = {"text": "input", "input_ids": "input"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _EmbeddingCall(ModelCall):
    body: EmbeddingBody


class EmbeddingRoutes:
    """Makes embeddings, by the base or an adapter."""

    def __init__(self, base: str, client: EngineClient) -> None:
        self._client = client
        self._names = ModelNames(base)

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", tags=["openai"])
        router.add_api_route(
            "/embeddings", self.embed, methods=["POST"], openapi_extra=body_schema(EmbeddingBody)
        )
        return router

    async def embed(self, request: Request) -> Response:
        """Turn prompts into vectors."""
        data = await request.body()

        async def work() -> dict[str, Any]:
            return await self._answer(await read_large(data, self._read))

        return JSONReply(await until_disconnect(request.receive, work()))

    def _read(self, data: bytes) -> _EmbeddingCall:
        body = parse_body(EmbeddingBody, data)
        self._check_dimensions(body.dimensions)
        adapter = self._names.adapter_of(body)
        call_id = f"embd-{uuid.uuid4().hex}"
        fields = {
            prompt_field(body.input): body.input,
            "lora_path": adapter,
            "rid": call_id,
            "sampling_params": {"max_new_tokens": 0},
        }
        pooling = Pooling(kind=body.pooling or "last", normalize=body.normalize is not False)
        with named(_FIELD_NAMES):
            batch = self._client.intake.make_requests(fields, pooling)
        return _EmbeddingCall(
            body=body,
            id=call_id,
            model=body.model,
            batch=batch,
            adapter=adapter,
            named_by_model=self._names.named_by_model(body.model) is not None,
            names=_FIELD_NAMES,
        )

    def _check_dimensions(self, dimensions: int | None) -> None:
        size = self._client.info.hidden_size
        if dimensions is not None and dimensions != size:
            raise RequestError(
                f"dimensions is {dimensions}; allowed: {size}, the size of the model's hidden states: a part of a vector "
                "has a meaning only where a model was trained for it",
                "dimensions",
            )

    async def _answer(self, call: _EmbeddingCall) -> dict[str, Any]:
        """The reply once every vector is there. One that fails fails the call, and the others are aborted."""
        stream = await submit(self._client, call)
        done: dict[int, bytes] = {}
        try:
            async for index, completion in stream:
                done[index] = _vector(completion)
        finally:
            stream.close()
        as_floats = call.body.encoding_format != "base64"
        num_tokens = sum(len(request.prompt_token_ids) for request in call.batch.requests)
        return {
            "id": call.id,
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": vector_floats(done[index])
                    if as_floats
                    else base64.b64encode(done[index]).decode(),
                }
                for index in range(len(done))
            ],
            "model": call.model,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }


def _vector(completion: Completion) -> bytes:
    if completion.finish is not None:
        check_finish(completion.finish)
    if completion.embedding is None:
        raise AssertionError("the request has not finished, or has no vector")
    return completion.embedding
