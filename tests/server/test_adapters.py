"""Adapters over HTTP: SGLang's names and vLLM's, their replies and statuses, and what is refused before the engine."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import pickle
import socket
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save

from lorikeet.config import ServerConfig
from lorikeet.core.commands import AnyCommand, LoadAdapter, LoadAdapterFromTensors, UnloadAdapter
from lorikeet.core.failure import Failure
from lorikeet.core.messages import AdaptersChanged, Stats
from lorikeet.core.views import AdapterUse, AdapterView
from lorikeet.server.app import ADMIN_PATHS
from lorikeet.server.tensors_body import PIECE
from tests.server.conftest import Api, MakeApi
from tests.server.test_live import MakeLive
from tests.server.test_native import message
from tests.support.live_server import wait_until

pytestmark = pytest.mark.anyio

LOADED = {"json": "/a/json", "sql": "/a/sql"}
WEIGHTS = save({"a.lora_A.weight": torch.ones(4, 8)})
CONFIG = {"peft_type": "LORA", "r": 4}


def tensors(data: bytes = WEIGHTS) -> str:
    return base64.b64encode(data).decode()


async def post(api: Api, path: str, **body: Any) -> httpx.Response:
    return await api.http.post(path, json=body)


def done(response: httpx.Response) -> dict[str, str]:
    """What is loaded after a success under SGLang's names."""
    body = response.json()
    assert (response.status_code, body["success"], body["error_message"]) == (200, True, ""), body
    assert list(body) == ["success", "error_message", "loaded_adapters"]
    return body["loaded_adapters"]


def refused(response: httpx.Response, loaded: dict[str, str] | None = None) -> str:
    """The message of a refusal under SGLang's names."""
    body = response.json()
    assert (response.status_code, body["success"]) == (400, False)
    assert list(body) == ["success", "error_message", "loaded_adapters"]
    assert body["loaded_adapters"] == (LOADED if loaded is None else loaded)
    assert "Traceback" not in body["error_message"]
    return body["error_message"]


AnyOne = TypeVar("AnyOne", LoadAdapter, LoadAdapterFromTensors, UnloadAdapter)


def sent(api: Api, kind: type[AnyOne]) -> list[AnyOne]:
    return [ask.command for ask in api.engine.commands if isinstance(ask.command, kind)]


async def test_load_and_unload(api: Api) -> None:
    reply = await post(api, "/load_lora_adapter", lora_name="new", lora_path="/a/new")
    assert done(reply) == LOADED | {"new": "/a/new"}
    reply = await post(api, "/load_lora_adapter", lora_name="p", lora_path="/a/p", pinned=True)
    assert done(reply) == LOADED | {"new": "/a/new", "p": "/a/p"}
    assert sent(api, LoadAdapter) == [
        LoadAdapter("new", "/a/new", pinned=False),
        LoadAdapter("p", "/a/p", pinned=True),
    ]
    assert done(await post(api, "/unload_lora_adapter", lora_name="new")) == LOADED | {"p": "/a/p"}
    reply = await post(api, "/unload_lora_adapter", lora_name="p", timeout=2)
    assert done(reply) == LOADED
    assert sent(api, UnloadAdapter) == [UnloadAdapter("new"), UnloadAdapter("p", timeout=2.0)]


async def test_a_name_that_is_taken(api: Api) -> None:
    reply = await post(api, "/load_lora_adapter", lora_name="sql", lora_path="/b")
    assert refused(reply) == "adapter 'sql' is already loaded"
    for path, extra in (
        ("/load_lora_adapter", {"lora_path": "/b"}),
        ("/load_lora_adapter_from_tensors", {"config_dict": CONFIG, "tensors": tensors()}),
    ):
        reply = await post(api, path, lora_name="base", **extra)
        assert "'base' is the name of the base model" in refused(reply)
    reply = await post(api, "/v1/load_lora_adapter", lora_name="base", lora_path="/b")
    assert "'base' is the name of the base model" in message(reply)


async def test_an_unknown_name_is_a_400_for_sglang_and_a_404_for_vllm(api: Api) -> None:
    reply = await post(api, "/unload_lora_adapter", lora_name="nobody")
    assert "'nobody' has never been loaded" in refused(reply)
    reply = await post(api, "/v1/unload_lora_adapter", lora_name="nobody")
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert "'nobody' has never been loaded" in error["message"]
    assert (error["type"], error["code"]) == ("NotFoundError", 404)


async def test_the_engines_reason_is_the_message(make_api: MakeApi) -> None:
    reason = "rank 64 is incompatible with --max-lora-rank 16"
    api: Api = await make_api(load_error=Failure("refused", reason))
    reply = await post(api, "/load_lora_adapter", lora_name="x", lora_path="/x")
    assert refused(reply) == reason
    reply = await post(api, "/v1/load_lora_adapter", lora_name="x", lora_path="/x")
    assert reply.status_code == 400
    assert reply.json() == {
        "error": {"message": reason, "type": "BadRequestError", "param": None, "code": 400}
    }
    api.knobs.load_error = Failure("not_found", "/x does not exist")
    assert refused(await post(api, "/load_lora_adapter", lora_name="x", lora_path="/x"))
    reply = await post(api, "/v1/load_lora_adapter", lora_name="x", lora_path="/x")
    assert (reply.status_code, reply.json()["error"]["type"]) == (404, "NotFoundError")
    api.knobs.load_error = Failure("failed", "a thread failed")
    reply = await post(api, "/load_lora_adapter", lora_name="x", lora_path="/x")
    assert (reply.status_code, message(reply)) == (500, "a thread failed")


async def test_vllms_names(api: Api) -> None:
    reply = await post(api, "/v1/load_lora_adapter", lora_name="new", lora_path="/a/new")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    assert reply.text == "Success: LoRA adapter 'new' added successfully."
    reply = await post(api, "/v1/load_lora_adapter", lora_name="new", lora_path="/b")
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "has already been loaded" in error["message"]
    assert "load_inplace" in error["message"]
    assert (error["type"], error["code"]) == ("InvalidUserInput", 400)
    reply = await post(
        api, "/v1/load_lora_adapter", lora_name="new", lora_path="/b", load_inplace=True
    )
    assert reply.status_code == 200
    assert api.knobs.adapters["new"] == "/b"
    assert [command.replace for command in sent(api, LoadAdapter)] == [False, False, True]
    reply = await post(api, "/v1/unload_lora_adapter", lora_name="new", lora_int_id=7)
    assert (reply.status_code, reply.text) == (
        200,
        "Success: LoRA adapter 'new' removed successfully.",
    )
    assert api.knobs.adapters == LOADED


def uploaded(api: Api) -> bytes:
    """The weights that the engine was told of first."""
    return Path(sent(api, LoadAdapterFromTensors)[0].weights).read_bytes()


def uploads(api: Api) -> list[Path]:
    """What clients have sent and is still there."""
    return list(api.client.uploads.iterdir()) if api.client.uploads.exists() else []


async def test_weights_in_the_body(api: Api) -> None:
    reply = await post(
        api,
        "/load_lora_adapter_from_tensors",
        lora_name="t",
        config_dict=CONFIG,
        tensors=tensors(),
        pinned=True,
    )
    assert done(reply) == LOADED | {"t": "__tensor__"}
    [command] = sent(api, LoadAdapterFromTensors)
    assert uploaded(api) == WEIGHTS
    assert command.weights.startswith(api.thread.address.directory)
    assert command == LoadAdapterFromTensors("t", CONFIG, command.weights, pinned=True)
    assert len(uploads(api)) == 1, "it is the engine's from now on"
    for path in (api.client.uploads, uploads(api)[0]):
        assert path.stat().st_mode & 0o077 == 0


async def test_a_large_body_is_as_good(api: Api) -> None:
    weights = save({"a": torch.ones(1 << 16)})
    reply = await post(
        api,
        "/load_lora_adapter_from_tensors",
        lora_name="t",
        config_dict=CONFIG,
        tensors=tensors(weights),
    )
    assert "t" in done(reply)
    assert uploaded(api) == weights
    reply = await post(
        api,
        "/load_lora_adapter_from_tensors",
        lora_name="u",
        config_dict=CONFIG,
        tensors="!" * (1 << 16),
    )
    assert "tensors: is not valid base64" in refused(reply, LOADED | {"t": "__tensor__"})


def saved_by_torch() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    return buffer.getvalue()


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize("size", [PIECE // 4 * 3 + extra for extra in (-1, 0, 1, 2)])
async def test_base64_of_several_pieces(api: Api, size: int) -> None:
    weights = (header(b"{}") + bytes(range(256)) * (size // 256 + 1))[:size]
    body = {"lora_name": "t", "config_dict": CONFIG, "tensors": tensors(weights)}
    done(await post(api, "/load_lora_adapter_from_tensors", **body))
    assert uploaded(api) == weights


async def test_padding_in_the_middle_is_no_base64(api: Api) -> None:
    text = tensors(bytes(PIECE // 4 * 3 - 1)) + tensors(b"more")
    body = {"lora_name": "t", "config_dict": CONFIG, "tensors": text}
    reply = await post(api, "/load_lora_adapter_from_tensors", **body)
    assert "tensors: is not valid base64" in refused(reply)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("not base64!", "tensors: is not valid base64"),
        ("é", "tensors: is not valid base64"),
        ("", "tensors: must be a safetensors file in base64"),
        (7, "tensors: must be a safetensors file in base64"),
        (tensors(b"hello"), "tensors: is not a safetensors file"),
        (tensors(header(b"[1, 2]")), "tensors: is not a safetensors file"),
        (tensors(header(b"{}", 1 << 62)), "tensors: is not a safetensors file"),
        (tensors(header(b"", 0)), "tensors: is not a safetensors file"),
        (tensors(pickle.dumps({"a": [1.0]})), "tensors: is a pickle, which is never read"),
        (tensors(saved_by_torch()), "tensors: is a pickle, which is never read"),
    ],
)
async def test_what_is_not_safetensors(api: Api, value: object, reason: str) -> None:
    reply = await post(
        api,
        "/load_lora_adapter_from_tensors",
        lora_name="t",
        config_dict=CONFIG,
        tensors=value,
    )
    assert reason in refused(reply)
    assert not sent(api, LoadAdapterFromTensors)
    assert uploads(api) == []


async def test_refusals_leave_nothing_behind(api: Api) -> None:
    path = "/load_lora_adapter_from_tensors"
    for body in (
        {"lora_name": "base", "config_dict": CONFIG, "tensors": tensors()},
        {"config_dict": CONFIG, "tensors": tensors()},
        {"lora_name": "t", "config_dict": [], "tensors": tensors()},
    ):
        refused(await post(api, path, **body))
        assert uploads(api) == []


def test_a_client_that_leaves_in_the_middle_leaves_nothing_behind(make_live: MakeLive) -> None:
    server = make_live()
    body = json.dumps({"lora_name": "t", "config_dict": {}, "tensors": tensors()}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        path = "/load_lora_adapter_from_tensors"
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body[:-20])
        root = server.client.uploads
        wait_until(lambda: root.exists() and len(list(root.iterdir())) == 1)
    wait_until(lambda: not list(root.iterdir()))


BAD_BODIES: list[tuple[str, Any, str]] = [
    ("/load_lora_adapter", [], "the body must be a JSON object"),
    ("/load_lora_adapter", {"lora_path": "/x"}, "lora_name: is required"),
    ("/load_lora_adapter", {"lora_name": "x"}, "lora_path: is required"),
    ("/load_lora_adapter", {"lora_name": "", "lora_path": "/x"}, "lora_name: must be a string"),
    ("/load_lora_adapter", {"lora_name": None, "lora_path": "/x"}, "lora_name: must be a string"),
    (
        "/load_lora_adapter",
        {"lora_name": "x", "lora_path": "/x", "pinned": "yes"},
        'pinned: must be true or false; got "yes"',
    ),
    ("/unload_lora_adapter", {}, "lora_name: is required"),
    (
        "/unload_lora_adapter",
        {"lora_name": "x", "timeout": -1},
        "timeout: must be a number of seconds, at least 0; got -1",
    ),
    ("/unload_lora_adapter", {"lora_name": "x", "timeout": True}, "timeout: must be a number"),
    (
        "/load_lora_adapter_from_tensors",
        {"lora_name": "x", "config_dict": "r=4", "tensors": tensors()},
        "config_dict: must be the object of an adapter_config.json",
    ),
    (
        "/load_lora_adapter_from_tensors",
        {"lora_name": "x", "config_dict": {}, "serialized_tensors": "gAR9"},
        "tensors: is required; it must be a safetensors file in base64 (serialized_tensors, a pickle",
    ),
    (
        "/load_lora_adapter_from_tensors",
        {
            "lora_name": "x",
            "config_dict": {},
            "tensors": tensors(),
            "added_tokens_config": {"<new>": 5},
        },
        "added_tokens_config: must be null or left out",
    ),
]


@pytest.mark.parametrize(("path", "body", "reason"), BAD_BODIES)
async def test_bad_bodies_have_the_form_of_refusals(
    api: Api, path: str, body: Any, reason: str
) -> None:
    assert reason in refused(await api.http.post(path, json=body))


JSON = {"Content-Type": "application/json"}


async def test_a_body_that_is_no_json(api: Api) -> None:
    for path in ("/load_lora_adapter", "/unload_lora_adapter", "/load_lora_adapter_from_tensors"):
        assert "not valid JSON" in refused(await api.http.post(path, content=b"{", headers=JSON))
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        reply = await api.http.post(path, content=b"{", headers=JSON)
        assert reply.status_code == 400
        assert "not valid JSON" in message(reply)
        assert reply.json()["error"]["type"] == "BadRequestError"
    reply = await post(
        api, "/v1/load_lora_adapter", lora_name="x", lora_path="/x", is_3d_lora_weight=True
    )
    assert message(reply).startswith("is_3d_lora_weight: must be false or left out")
    assert reply.json()["error"]["param"] == "is_3d_lora_weight"


async def test_without_lora(make_api: MakeApi) -> None:
    api: Api = await make_api(adapters={}, lora_enabled=False)
    for path in ADMIN_PATHS:
        if "lora" not in path:
            continue
        reply = await post(api, path, lora_name="x", lora_path="/x")
        text = message(reply) if path.startswith("/v1") else refused(reply, {})
        assert reply.status_code == 400
        assert "LoRA is not enabled" in text
        assert "--enable-lora" in text
    assert (await api.http.get("/v1/adapters")).json() == {"object": "list", "data": []}
    reply = await api.http.get("/v1/adapters/x")
    assert reply.status_code == 400
    assert "LoRA is not enabled" in message(reply)


async def test_the_adapters_and_one_of_them(make_api: MakeApi) -> None:
    api: Api = await make_api(adapters={"org/name": "/a", "x": "/x"}, states={"x": "unloading"})
    body = (await api.http.get("/v1/adapters")).json()
    assert body["object"] == "list"
    assert [(item["name"], item["state"]) for item in body["data"]] == [
        ("org/name", "loaded"),
        ("x", "unloading"),
    ]
    assert (await api.http.get("/v1/adapters/org/name")).json()["path"] == "/a"
    assert (await api.http.get("/v1/adapters/x")).json()["state"] == "unloading"
    reply = await api.http.get("/v1/adapters/nobody")
    assert reply.status_code == 404
    assert "'nobody' has never been loaded" in message(reply)
    assert reply.json()["error"]["type"] == "not_found_error"


async def test_of_a_name_in_several_versions_the_one_in_use_is_shown(
    api: Api,
) -> None:
    old = AdapterView(name="x", path="/old", state="unloading", pinned=False, version=1)
    now = AdapterView(name="x", path="/new", state="loaded", pinned=True, version=2)
    next_one = AdapterView(name="x", path="/next", state="loading", pinned=False)
    use = AdapterUse(tier="device", in_flight=2, last_use=5.0)
    api.client.adapters.apply(
        AdaptersChanged({"x": [now, old, next_one]}, {2: use}, {2: b'{"rank":4}'})
    )
    shown = (await api.http.get("/v1/adapters/x")).json()
    assert shown == {
        "name": "x",
        "path": "/new",
        "version": 2,
        "state": "loaded",
        "tier": "device",
        "pinned": True,
        "rank": None,
        "targets": None,
        "bytes": None,
        "in_flight": 2,
        "last_use": 5.0,
        "reason": None,
        "report": {"rank": 4},
    }
    listed = (await api.http.get("/v1/adapters")).json()["data"]
    assert [(item["name"], item["state"]) for item in listed[2:]] == [
        ("x", "loaded"),
        ("x", "unloading"),
        ("x", "loading"),
    ]
    assert listed[2] | {"report": shown["report"]} == shown, "a list has no reports"
    assert not [item for item in listed if "report" in item]
    cards = (await api.http.get("/v1/models")).json()["data"]
    assert [(card["id"], card["root"]) for card in cards[3:]] == [("x", "/new")]


async def test_lists_are_answered_while_the_engine_does_not_answer(make_api: MakeApi) -> None:
    """And a thousand of them cost it nothing: none of these asks it."""
    names = [f"a{index:04}" for index in range(1000)]
    api: Api = await make_api(adapters={name: f"/a/{name}" for name in names})
    api.knobs.is_stuck = True
    for path, count in (("/v1/adapters", 1000), ("/v1/models", 1001)):
        listed = (await api.http.get(path)).json()["data"]
        assert len(listed) == count
    assert [item["id"] for item in listed[1:]] == names
    assert (await api.http.get("/v1/adapters/a0500")).json()["path"] == "/a/a0500"
    assert (await api.http.get("/v1/models/a0500")).json()["root"] == "/a/a0500"
    assert list((await api.http.get("/server_info")).json()["adapters"]) == names
    reply = await post(api, "/load_lora_adapter", lora_name="base", lora_path="/x")
    assert list(reply.json()["loaded_adapters"]) == names
    for path in ("/v1/adapters/nobody", "/v1/models/nobody"):
        reply = await api.http.get(path)
        assert reply.status_code == 404
        assert "a0007 and 992 more" in message(reply)
        assert len(message(reply)) < 200
    assert api.engine.commands == []


async def test_models_follow_loads_and_unloads(api: Api) -> None:
    async def names() -> list[str]:
        return [card["id"] for card in (await api.http.get("/v1/models")).json()["data"]]

    await post(api, "/load_lora_adapter", lora_name="new", lora_path="/a/new")
    assert await names() == ["base", "json", "sql", "new"]
    await post(api, "/unload_lora_adapter", lora_name="json")
    assert await names() == ["base", "sql", "new"]
    assert (await api.http.get("/server_info")).json()["adapters"] == api.knobs.adapters
    api.knobs.states |= {"sql": "loading", "new": "failed"}
    while len(api.client.adapters) > 1:
        await asyncio.sleep(0.001)
    assert await names() == ["base", "new"], "a failed adapter keeps its name"


async def test_a_slow_load_holds_nobody_up(make_api: MakeApi) -> None:
    api: Api = await make_api(load_s=2)
    load = asyncio.create_task(post(api, "/load_lora_adapter", lora_name="x", lora_path="/x"))
    while not sent(api, LoadAdapter):
        await asyncio.sleep(0.001)
    for _ in range(3):
        assert (await api.generate(text="a")).status_code == 200
    assert not load.done()
    assert "x" in done(await load)


async def test_a_dead_engine(api: Api) -> None:
    api.engine.die()
    await api.client.died()
    for path in ("/load_lora_adapter", "/v1/load_lora_adapter"):
        reply = await post(api, path, lora_name="x", lora_path="/x")
        assert reply.status_code == 503
        assert "the engine process has ended" in message(reply)


async def test_loading_needs_the_admin_key_and_looking_does_not(
    make_api: MakeApi, config: ServerConfig
) -> None:
    api: Api = await make_api(config=replace(config, api_key="k", admin_api_key="a"))
    body = {"lora_name": "x", "lora_path": "/x"}
    paths = [path for path in ADMIN_PATHS if "lora" in path]
    assert len(paths) == 5
    for path in paths:
        for key, allowed in (("k", False), ("a", True)):
            headers = {"Authorization": f"Bearer {key}"}
            reply = await api.http.post(path, json=body, headers=headers)
            assert (reply.status_code != 401) is allowed
    reply = await api.http.get("/v1/adapters", headers={"Authorization": "Bearer k"})
    assert reply.status_code == 200


async def test_the_openapi_document_knows_the_bodies(api: Api) -> None:
    document = (await api.http.get("/openapi.json")).json()
    for path in ADMIN_PATHS:
        if "lora" in path:
            content = document["paths"][path]["post"]["requestBody"]["content"]
            assert "lora_name" in content["application/json"]["schema"]["properties"]


async def test_metrics_of_adapters(make_api: MakeApi) -> None:
    stats = Stats(
        {"num_adapters_device": 1.0, "total_adapter_loads": 2.0},
        {"running_lora_adapters": ["sql"], "waiting_lora_adapters": ["json"]},
        {"adapter_load_seconds": [0.01]},
    )
    api: Api = await make_api(stats=stats)
    sampling = {"max_new_tokens": 3}
    await api.generate(text=["a", "b"], lora_path=["sql", None], sampling_params=sampling)
    await api.generate(text="a", lora_path="made up", sampling_params=sampling)
    text = (await api.http.get("/metrics")).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]

    def value(name: str, **labels: str) -> float:
        [found] = [
            s.value for s in samples if s.name == name and s.labels.items() >= labels.items()
        ]
        return found

    for adapter in ("sql", "base"):
        assert value("lorikeet_adapter_generated_tokens_total", adapter=adapter) == 3
    assert value("lorikeet_adapter_requests_total", adapter="other", outcome="error") == 1
    assert value("lorikeet_adapters", tier="device") == 1
    assert value("lorikeet_adapter_loads_total") == 2
    assert value("lorikeet_adapter_load_seconds_count") >= 1
    assert "made up" not in text
    [info] = [s for s in samples if s.name == "vllm:lora_requests_info"]
    assert info.labels == {
        "max_lora": "8",
        "running_lora_adapters": "sql",
        "waiting_lora_adapters": "json",
    }


@pytest.mark.parametrize(
    ("path", "extra", "kind"),
    [
        ("/load_lora_adapter", {"lora_path": "/x"}, LoadAdapter),
        ("/v1/load_lora_adapter", {"lora_path": "/x"}, LoadAdapter),
        (
            "/load_lora_adapter_from_tensors",
            {"config_dict": CONFIG, "tensors": tensors()},
            LoadAdapterFromTensors,
        ),
    ],
)
def test_a_client_that_leaves_cancels_its_load(
    make_live: MakeLive, path: str, extra: dict[str, object], kind: type[AnyCommand]
) -> None:
    server = make_live(load_s=300)
    data = json.dumps({"lora_name": "x"} | extra).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        fields = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        head = f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n"
        connection.sendall(head.encode() + data)
        wait_until(lambda: any(isinstance(ask.command, kind) for ask in server.engine.commands))
    wait_until(lambda: bool(server.engine.cancelled))
    [load] = [ask for ask in server.engine.commands if isinstance(ask.command, kind)]
    assert server.engine.cancelled == [load.id]
    server.knobs.load_s = 0
    # The name is free again.
    reply = httpx.post(
        server.url + "/load_lora_adapter", json={"lora_name": "x", "lora_path": "/y"}, timeout=60
    )
    assert reply.json()["loaded_adapters"]["x"] == "/y"
