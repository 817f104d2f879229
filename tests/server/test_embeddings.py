"""``POST /v1/embeddings`` over the engine double."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

import pytest

from lorikeet.core.request import Pooling
from tests.server.conftest import Api, MakeApi
from tests.server.test_live import MakeLive, send
from tests.support.fake_engine import vector
from tests.support.live_server import wait_until

pytestmark = pytest.mark.anyio


async def embed(api: Api, **body: Any) -> Any:
    fields = {"model": "base", "input": "ab"} | body
    return await api.http.post("/v1/embeddings", json=fields)


async def test_the_form_of_a_reply(api: Api) -> None:
    reply = await embed(api, user="someone", input=["ab", "c"])
    assert reply.status_code == 200
    found = reply.json()
    assert found.pop("id").startswith("embd-")
    assert found == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0, 97 + 98, 0, 1]},
            {"object": "embedding", "index": 1, "embedding": [0, 99, 0, 1]},
        ],
        "model": "base",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }
    for request in api.engine.seen:
        assert request.pooling == Pooling(kind="last", normalize=True)
        assert request.sampling.max_new_tokens == 0
    assert api.client.num_open == 0


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("ab", [[97, 98]]),
        (["ab"], [[97, 98]]),
        ([97, 98], [[97, 98]]),
        ([[97, 98], [3]], [[97, 98], [3]]),
    ],
    ids=str,
)
async def test_inputs(api: Api, given: Any, prompts: list[list[int]]) -> None:
    reply = await embed(api, input=given)
    assert [request.prompt_token_ids for request in api.engine.seen] == prompts
    data = reply.json()["data"]
    assert [item["embedding"] for item in data] == [vector(seen) for seen in api.engine.seen]


@pytest.mark.parametrize(
    ("fields", "adapter"),
    [
        ({"model": "base"}, None),
        ({"model": "base:"}, None),
        ({"model": "base:json"}, "json"),
        ({"model": "sql"}, "sql"),
        ({"lora_path": "sql"}, "sql"),
        ({"model": "json", "lora_path": "sql"}, "json"),
        ({"lora_path": None}, None),
    ],
    ids=str,
)
async def test_which_model(api: Api, fields: dict[str, Any], adapter: str | None) -> None:
    reply = await embed(api, **fields)
    assert reply.status_code == 200
    assert [request.adapter for request in api.engine.seen] == [adapter]
    assert reply.json()["model"] == fields.get("model", "base")


@pytest.mark.parametrize("kind", ["last", "mean"])
@pytest.mark.parametrize("normalize", [True, False])
async def test_pooling(api: Api, kind: str, normalize: bool) -> None:
    reply = await embed(api, pooling=kind, normalize=normalize, dimensions=4)
    kind_number = ("last", "mean").index(kind)
    assert reply.json()["data"][0]["embedding"] == [0, 195, kind_number, normalize]


async def test_base64_is_little_endian_float32(api: Api) -> None:
    reply = await embed(api, encoding_format="base64")
    data = base64.b64decode(reply.json()["data"][0]["embedding"])
    assert struct.unpack("<4f", data) == (0, 195, 0, 1)
    reply = await embed(api, encoding_format="float")
    assert reply.json()["data"][0]["embedding"] == [0, 195, 0, 1]


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"input": None}, "input", "is required"),
        ({"input": 5}, "input", "must be a string, a list of strings, a list of token ids"),
        ({"input": []}, "input", "input is an empty list"),
        ({"input": ""}, "input", "which has no tokens"),
        ({"input": ["a", 5]}, "input", "input[1] is 5"),
        ({"input": [[1], []]}, "input", "input[1] is an empty list"),
        ({"input": [1, 257]}, "input", "allowed: token ids in [0, 256]"),
        ({"input": [1] * 513}, "input", "513 tokens; allowed: at most 512"),
        ({"encoding_format": "hex"}, "encoding_format", "must be float or base64"),
        ({"dimensions": 3}, "dimensions", "dimensions is 3; allowed: 4, the size of the model's"),
        ({"pooling": "cls"}, "pooling", "must be last (the last token's state) or mean"),
        ({"normalize": "yes"}, "normalize", "must be true or false"),
        ({"model": ""}, "model", "model is empty"),
        ({"lora_path": ""}, "lora_path", "lora_path is ''"),
        ({"truncate": True}, "truncate", "there is no such field"),
        ({"lora_path": "nobody"}, "lora_path", "'nobody' has never been loaded"),
    ],
    ids=str,
)
async def test_what_is_refused(api: Api, fields: dict[str, Any], param: str, text: str) -> None:
    reply = await embed(api, **fields)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert text in error["message"]
    assert api.client.num_open == 0


@pytest.mark.parametrize("model", ["nobody", "base:nobody"])
async def test_a_model_that_is_not_there(api: Api, model: str) -> None:
    reply = await embed(api, model=model)
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"


async def test_a_prompt_may_fill_the_context(api: Api) -> None:
    assert (await embed(api, input=[1] * 512)).status_code == 200


async def test_a_full_queue(make_api: MakeApi) -> None:
    api: Api = await make_api(queue_is_full=True)
    reply = await embed(api, input=["a", "b"])
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")


def test_a_client_that_leaves_aborts_its_requests(make_live: MakeLive) -> None:
    server = make_live(hold_accept=True)
    body = {"model": "base", "input": ["a", "b"]}
    with send(server, body, path="/v1/embeddings"):
        wait_until(lambda: server.engine.num_running == 2)
    wait_until(lambda: server.engine.num_running == 0)
    assert len(server.engine.aborted) == 2


async def test_an_abort_by_its_id_is_an_error(make_api: MakeApi) -> None:
    api: Api = await make_api(hold_accept=True)
    work = asyncio.create_task(embed(api))
    async with asyncio.timeout(60):
        while not api.client.num_open:
            await asyncio.sleep(0.005)
    assert api.client.abort() == 1
    reply = await work
    assert reply.status_code == 400
    assert "the request was aborted" in reply.json()["error"]["message"]
