"""The OpenAI API: the list of models, which are the base and its adapters."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from lorikeet.config import ServerConfig
from lorikeet.engine.client import EngineClient
from lorikeet.server.adapters import served_adapters
from lorikeet.server.errors import ModelNotFoundError
from lorikeet.server.replies import JSONReply

Card = dict[str, Any]


class OpenAIRoutes:
    """The routes of this module."""

    def __init__(self, config: ServerConfig, client: EngineClient) -> None:
        self._client = client
        self._base = config.served_model_name or config.model_path
        self._root = config.model_path
        self._created = int(time.time())

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", tags=["openai"])
        router.add_api_route("/models", self.models, methods=["GET"])
        # An id may be a path or a hub id, so it may contain slashes.
        router.add_api_route("/models/{model_id:path}", self.model, methods=["GET"])
        return router

    async def models(self) -> Response:
        """The base first, then every adapter."""
        return JSONReply({"object": "list", "data": await self._cards()})

    async def model(self, model_id: str) -> Response:
        """One card, under each name that a request may give: an adapter's may follow the base's."""
        cards = await self._cards()
        for card in cards:
            if model_id in (card["id"], f"{self._base}:{card['id']}"):
                return JSONReply(card | {"id": model_id})
        known = ", ".join(card["id"] for card in cards)
        raise ModelNotFoundError(f"the model {model_id!r} does not exist; known: {known}", "model")

    async def _cards(self) -> list[Card]:
        base = self._card(self._base, root=self._root, parent=None)
        return [base] + [
            self._card(adapter["name"], root=adapter["path"], parent=self._base)
            for adapter in await served_adapters(self._client)
        ]

    def _card(self, name: str, *, root: str, parent: str | None) -> Card:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "lorikeet",
            "root": root,
            "parent": parent,
            "max_model_len": self._client.info["context_length"],
        }
