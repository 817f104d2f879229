"""The OpenAI API: completions and chats, whole and streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lorikeet.client.client import EngineClient
from lorikeet.client.stream import CompletionStream
from lorikeet.config import ServerConfig
from lorikeet.core.commands import FindAdapter
from lorikeet.errors import EngineFault, UserError
from lorikeet.server.errors import describe
from lorikeet.server.openai.bodies import ChatBody, CompletionBody
from lorikeet.server.openai.calls import Call, CallReader, ModelNames, check_finish, submit
from lorikeet.server.openai.replies import (
    ChatChoice,
    CompletionChoice,
    Envelope,
    MakeChoice,
)
from lorikeet.server.protocol import body_schema, parse_body, read_large
from lorikeet.server.replies import JSONReply, build_reply, until_disconnect
from lorikeet.server.sse import DONE, EventStream, frame
from lorikeet.text.completion import Snapshot


@dataclass(frozen=True, slots=True)
class _Form:
    """What tells one endpoint from the other."""

    read: Callable[[bytes], Awaitable[Call]]
    make_choice: MakeChoice
    kind: str
    chunk_kind: str


class CompletionRoutes:
    """The routes of this module."""

    def __init__(self, config: ServerConfig, client: EngineClient) -> None:
        self._client = client
        base = config.served_model_name or config.model_path
        self._names = ModelNames(base)
        self._reader = CallReader(self._names, client, config.tool_call_parser)
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
