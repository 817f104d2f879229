"""The list of models."""

from __future__ import annotations

import asyncio
import time

import pytest

from lorikeet.config import ServerConfig
from tests.server.conftest import Api, MakeApi
from tests.server.test_native import message

pytestmark = pytest.mark.anyio


async def test_the_base_comes_first_and_adapters_name_it(api: Api, config: ServerConfig) -> None:
    body = (await api.http.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["base", "json", "sql"]
    base, adapter, _ = body["data"]
    assert abs(base.pop("created") - time.time()) < 60
    assert base == {
        "id": "base",
        "object": "model",
        "owned_by": "lorikeet",
        "root": config.model_path,
        "parent": None,
        "max_model_len": 512,
    }
    assert (adapter["root"], adapter["parent"]) == ("/a/json", "base")
    assert adapter["max_model_len"] == 512


async def test_one_model(make_api: MakeApi) -> None:
    api: Api = await make_api(adapters={"org/name": "/a/b"})
    for name in ("base", "org/name"):
        reply = await api.http.get(f"/v1/models/{name}")
        assert reply.json()["id"] == name
    reply = await api.http.get("/v1/models/nobody")
    assert reply.status_code == 404
    assert "'nobody' does not exist; known: base, org/name" in message(reply)
    assert reply.json()["error"]["code"] == "model_not_found"
    assert reply.json()["error"]["param"] == "model"


async def test_models_follow_the_engine(api: Api) -> None:
    api.knobs.adapters["late"] = "/a/late"
    while len(api.client.adapters) < 3:
        await asyncio.sleep(0.001)
    names = [card["id"] for card in (await api.http.get("/v1/models")).json()["data"]]
    assert names == ["base", "json", "sql", "late"]
