"""The OpenAI API: the list of models, which are the base and its adapters."""

from __future__ import annotations

import time
from itertools import islice
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from lorikeet.adapters.registry import MAX_LISTED
from lorikeet.client.client import EngineClient
from lorikeet.config import ServerConfig
from lorikeet.masking import shortened
from lorikeet.server.errors import ModelNotFoundError
from lorikeet.server.replies import JSONReply, list_body

Card = dict[str, Any]


class OpenAIRoutes:
    """The routes of this module."""

    def __init__(self, config: ServerConfig, client: EngineClient) -> None:
        self._client = client
        self._base = config.served_model_name or config.model_path
        self._root = config.model_path
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
        """The base first, then every adapter."""
        self._client.check_alive()
        adapters = self._client.adapters
        if self._list is None or self._list[0] != adapters.num_changes:
            state, paths = adapters.num_changes, adapters.paths()
            self._list = state, await list_body([(self._base, None), *paths.items()], self._card)
        return Response(self._list[1], media_type=JSONReply.media_type)

    async def model(self, model_id: str) -> Response:
        """One card, under each name that a request may give: an adapter's may follow the base's."""
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
        """The base and the first adapters."""
        paths = self._client.adapters.paths()
        more = len(paths) - MAX_LISTED
        listed = ", ".join([self._base, *islice(paths, MAX_LISTED)])
        return f"{listed} and {more} more" if more > 0 else listed

    def _card(self, model: tuple[str, str | None]) -> Card:
        """Of an adapter and its path, or of the base and None."""
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
