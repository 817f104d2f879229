"""The native API: generate and abort."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lorikeet.client.client import EngineClient
from lorikeet.client.intake import RequestBatch
from lorikeet.client.reply import TokenText, native_reply
from lorikeet.client.stream import CompletionStream
from lorikeet.core.request import FinishReason
from lorikeet.errors import EngineFault, RequestError, UnavailableError
from lorikeet.server.errors import describe
from lorikeet.server.protocol import AbortBody, GenerateBody, body_schema, parse_body, read_large
from lorikeet.server.replies import (
    DONE,
    LARGE_REPLY,
    EventStream,
    JSONReply,
    build_reply,
    frame,
    until_disconnect,
)
from lorikeet.text.completion import Snapshot


class NativeRoutes:
    """The routes of this module."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def router(self) -> APIRouter:
        router = APIRouter(tags=["native"])
        body = body_schema(GenerateBody)
        # FastAPI's document cannot hold a route with two methods; the lines after it are only for the document.
        router.add_api_route(
            "/generate", self.generate, methods=["POST", "PUT"], include_in_schema=False
        )
        for method in ("POST", "PUT"):
            router.add_api_route("/generate", self.generate, methods=[method], openapi_extra=body)
        router.post("/abort_request", openapi_extra=body_schema(AbortBody))(self.abort)
        return router

    async def generate(self, request: Request) -> Response:
        """Complete prompts, each with its own adapter."""
        data = await request.body()
        body, batch, stream = await until_disconnect(request.receive, self._begin(data))
        if body.stream:
            return EventStream(self._events(stream, batch), on_end=stream.close)
        try:
            return await until_disconnect(request.receive, self._whole(stream, batch))
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
        return body, batch, await self._client.submit(batch)

    def _read(self, data: bytes) -> tuple[GenerateBody, RequestBatch]:
        body = parse_body(GenerateBody, data)
        # Not model_dump(), which copies every token id of every prompt.
        fields = {name: getattr(body, name) for name in GenerateBody.model_fields}
        return body, self._client.intake.make_requests(fields)

    async def _whole(self, stream: CompletionStream, batch: RequestBatch) -> JSONReply:
        """The reply once everything has finished.

        One of a list that fails is an entry whose finish reason says so, and the others go on. A call for one completion
        fails with it, and so does any call that an engine which is not available cuts off.
        """

        def check(finish: FinishReason) -> None:
            error = finish.error()
            if error is not None and (not batch.is_list or isinstance(error, UnavailableError)):
                raise error

        snapshots = [completion.snapshot() for completion in await stream.finished(check)]

        def reply() -> JSONReply:
            token_text = self._token_text(batch)
            replies = [native_reply(item, token_text=token_text) for item in snapshots]
            return JSONReply(replies if batch.is_list else replies[0])

        return await build_reply(sum(item.num_logprobs for item in snapshots), reply)

    async def _events(
        self, stream: CompletionStream, batch: RequestBatch
    ) -> AsyncGenerator[bytes, None]:
        """Frames of a stream, one each time a completion has grown. One that fails is an error frame, and the others go on.

        A frame repeats the log-probabilities of all output tokens. Once they are many, the next frame comes when they have
        grown by an eighth, so that all frames together take a time that is linear in the last one's.
        """
        told: dict[int, int] = {}  # index -> log-probabilities of its last frame
        try:
            async for index, completion in stream:
                place = index if batch.is_list else None
                error = completion.finish.error() if completion.finish else None
                if error is None:
                    snapshot, last = completion.snapshot(), told.get(index, 0)
                    num = snapshot.num_logprobs
                    if snapshot.finish is None and max(last, LARGE_REPLY) < num < last * 9 // 8:
                        continue
                    write = partial(self._frame, snapshot, batch, place, tells_prompt=not last)
                    told[index] = num
                    yield await build_reply(num, write)
                else:
                    yield frame(describe(error)[1] | ({} if place is None else {"index": place}))
        except EngineFault as fault:
            yield frame(describe(fault)[1])
        yield DONE

    def _frame(
        self, snapshot: Snapshot, batch: RequestBatch, place: int | None, *, tells_prompt: bool
    ) -> bytes:
        token_text = self._token_text(batch)
        return frame(
            native_reply(snapshot, token_text=token_text, index=place, tells_prompt=tells_prompt)
        )

    def _token_text(self, batch: RequestBatch) -> TokenText | None:
        return self._client.tokenizer.token_text if batch.return_text_in_logprobs else None
