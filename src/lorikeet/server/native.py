"""The native API: generate and abort."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lorikeet.engine.client import EngineClient
from lorikeet.engine.completion import Completion
from lorikeet.engine.intake import RequestBatch
from lorikeet.engine.reply import native_reply
from lorikeet.engine.stream import CompletionStream, finish_error
from lorikeet.errors import EngineFault, RequestError, UnavailableError
from lorikeet.server.errors import describe
from lorikeet.server.protocol import AbortBody, GenerateBody, body_schema, parse_body, read_large
from lorikeet.server.replies import JSONReply, until_disconnect
from lorikeet.server.sse import DONE, EventStream, frame


class NativeRoutes:
    """The routes of this module."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def router(self) -> APIRouter:
        router = APIRouter(tags=["native"])
        router.add_api_route(
            "/generate",
            self.generate,
            methods=["POST"],
            openapi_extra=body_schema(GenerateBody),
        )
        router.add_api_route(
            "/abort_request", self.abort, methods=["POST"], openapi_extra=body_schema(AbortBody)
        )
        return router

    async def generate(self, request: Request) -> Response:
        """Complete prompts, each with its own adapter."""
        data = await request.body()
        body, batch, stream = await until_disconnect(request.receive, self._begin(data))
        if body.stream:
            return EventStream(self._events(stream, batch), on_end=stream.close)
        try:
            return JSONReply(await until_disconnect(request.receive, self._whole(stream, batch)))
        finally:
            stream.close()

    async def abort(self, request: Request) -> Response:
        """End requests early; their callers get what there is, with the finish reason ``abort``."""
        body = parse_body(AbortBody, await request.body())
        if body.rid is None and not body.abort_all:
            raise RequestError("rid: give the id of a request, or abort_all: true", "rid")
        count = self._client.abort(None if body.abort_all else body.rid)
        return JSONReply({"aborted": count})

    async def _begin(self, data: bytes) -> tuple[GenerateBody, RequestBatch, CompletionStream]:
        body, batch = await read_large(data, self._read)
        return body, batch, await self._client.submit(batch.requests, _groups(body, batch))

    def _read(self, data: bytes) -> tuple[GenerateBody, RequestBatch]:
        body = parse_body(GenerateBody, data)
        # Not model_dump(), which copies every token id of every prompt.
        fields = {name: getattr(body, name) for name in GenerateBody.model_fields}
        return body, self._client.intake.make_requests(fields)

    async def _whole(self, stream: CompletionStream, batch: RequestBatch) -> object:
        """The reply once everything has finished.

        One of a list that fails is an entry whose finish reason says so, and the others go on. A call for one completion
        fails with it, and so does any call that an engine which is not available cuts off.
        """
        finished: dict[int, Completion] = {}
        async for index, completion in stream:
            if completion.finish is None:
                continue
            error = finish_error(completion.finish)
            if error is not None and (not batch.is_list or isinstance(error, UnavailableError)):
                raise error
            finished[index] = completion
        replies = [
            self._reply(finished[index], batch, None) for index in range(len(batch.requests))
        ]
        return replies if batch.is_list else replies[0]

    async def _events(
        self, stream: CompletionStream, batch: RequestBatch
    ) -> AsyncGenerator[bytes, None]:
        """A frame for each growth of a completion. One that fails is an error frame, and the others go on."""
        try:
            async for index, completion in stream:
                place = index if batch.is_list else None
                error = finish_error(completion.finish) if completion.finish else None
                if error is None:
                    yield frame(self._reply(completion, batch, place))
                else:
                    yield frame(describe(error)[1] | ({} if place is None else {"index": place}))
        except EngineFault as fault:
            yield frame(describe(fault)[1])
        yield DONE

    def _reply(
        self, completion: Completion, batch: RequestBatch, index: int | None
    ) -> dict[str, Any]:
        token_text = self._client.tokenizer.token_text if batch.return_text_in_logprobs else None
        return native_reply(completion.snapshot(), token_text=token_text, index=index)


def _groups(body: GenerateBody, batch: RequestBatch) -> dict[str, str]:
    """The id that the caller gave for each request, where the call was expanded from it."""
    if body.rid is None:
        return {}
    given = body.rid if isinstance(body.rid, list) else [body.rid]
    num_each = len(batch.requests) // len(given)
    return {request.rid: given[index // num_each] for index, request in enumerate(batch.requests)}
