"""The OpenAI API: embeddings, by the base or an adapter."""

from __future__ import annotations

import base64
import uuid
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lorikeet.client.client import EngineClient
from lorikeet.client.reply import vector_floats
from lorikeet.config import ServerConfig
from lorikeet.core.request import Pooling
from lorikeet.errors import RequestError
from lorikeet.server.openai.bodies import EmbeddingBody
from lorikeet.server.openai.calls import (
    ModelCall,
    ModelNames,
    check_finish,
    named,
    prompt_field,
    submit,
)
from lorikeet.server.protocol import body_schema, parse_body, read_large
from lorikeet.server.replies import JSONReply, until_disconnect
from lorikeet.text.completion import Completion

_FIELD_NAMES = {"text": "input", "input_ids": "input"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _EmbeddingCall(ModelCall):
    body: EmbeddingBody


class EmbeddingRoutes:
    """The routes of this module."""

    def __init__(self, config: ServerConfig, client: EngineClient) -> None:
        self._client = client
        self._names = ModelNames(config.served_model_name or config.model_path)

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
