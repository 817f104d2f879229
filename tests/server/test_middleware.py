"""The access line and the API keys."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from lorikeet.config import ServerConfig
from tests.server.conftest import Api, MakeApi
from tests.server.test_native import message

pytestmark = pytest.mark.anyio

READING = ["/v1/models", "/v1/models/base", "/model_info", "/server_info", "/metrics", "/nothing"]


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"Authorization": f"Bearer {key}".encode()}


async def status(api: Api, path: str, key: str | None, method: str = "GET") -> int:
    headers = {} if key is None else bearer(key)
    content = b'{"abort_all": true}' if path == "/abort_request" else None
    return (await api.http.request(method, path, headers=headers, content=content)).status_code


async def test_without_keys_everything_is_open(api: Api) -> None:
    assert await status(api, "/v1/models", None) == 200
    assert await status(api, "/flush_cache", None) == 200
    assert await status(api, "/abort_request", None, "POST") == 200


async def test_one_key_opens_everything(make_api: MakeApi, config: ServerConfig) -> None:
    api: Api = await make_api(config=replace(config, api_key="k"))
    for path in [*READING, "/flush_cache"]:
        for wrong in (None, "", "K", "kk", "k\xe9"):
            assert await status(api, path, wrong) == 401
        assert await status(api, path, "k") in (200, 404)
    assert await status(api, "/abort_request", None, "POST") == 401
    assert await status(api, "/abort_request", "k", "POST") == 200
    assert (await api.generate(text="a")).status_code == 401
    assert not api.engine.seen
    for path in ("/health", "/health_generate"):
        assert await status(api, path, None) == 200


async def test_with_both_keys_each_opens_its_own(make_api: MakeApi, config: ServerConfig) -> None:
    api: Api = await make_api(config=replace(config, api_key="k", admin_api_key="a"))
    for path, method in (("/flush_cache", "GET"), ("/abort_request", "POST")):
        assert await status(api, path, None, method) == 401
        assert await status(api, path, "k", method) == 401
        assert await status(api, path, "a", method) == 200
    assert await status(api, "/v1/models", "k") == 200
    assert await status(api, "/v1/models", "a") == 401


async def test_an_admin_key_alone_leaves_the_rest_open(
    make_api: MakeApi, config: ServerConfig
) -> None:
    api: Api = await make_api(config=replace(config, admin_api_key="a"))
    assert await status(api, "/v1/models", None) == 200
    assert await status(api, "/flush_cache", None) == 401
    assert await status(api, "/flush_cache", "a") == 200


@pytest.mark.parametrize("path", ["//flush_cache", "/flush_cache/"])
async def test_another_spelling_of_a_path_is_no_way_in(
    make_api: MakeApi, config: ServerConfig, path: str
) -> None:
    api: Api = await make_api(config=replace(config, api_key="k", admin_api_key="a"))
    assert await status(api, path, None) == 401
    assert await status(api, path, "k") in (307, 404)


async def test_a_refusal_says_how_to_send_a_key(make_api: MakeApi, config: ServerConfig) -> None:
    api: Api = await make_api(config=replace(config, api_key="topsecret"))
    for headers in ({}, {"Authorization": "Basic topsecret"}, {"Authorization": "topsecret"}):
        reply = await api.http.get("/v1/models", headers=headers)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert "Authorization: Bearer KEY" in message(reply)
        assert reply.json()["error"]["type"] == "authentication_error"
    lower = await api.http.get("/v1/models", headers={"authorization": "bearer topsecret"})
    assert lower.status_code == 200


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "lorikeet.access"]


async def test_one_line_for_each_request(
    make_api: MakeApi, config: ServerConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    api: Api = await make_api(config=replace(config, api_key="topsecret"))
    headers = bearer("topsecret")
    await api.http.get("/v1/models", headers=headers)
    await api.http.post("/generate", json={"text": "a"}, headers=headers)
    await api.http.post("/generate", json={"text": "a", "stream": True}, headers=headers)
    await api.http.post("/generate", json={"text": 5}, headers=headers)
    await api.http.get("/flush_cache?timeout=0&api_key=topsecret")
    await api.http.get("/no%0Athing%1b[31m", headers=headers)
    seen = [line.rsplit(" ", 1) for line in lines(caplog)]
    assert [head.split(" ", 1)[1] for head, _ in seen] == [
        "GET /v1/models 200",
        "POST /generate 200",
        "POST /generate 200",
        "POST /generate 400",
        "GET /flush_cache 401",
        "GET /no%0Athing%1b[31m 404",
    ]
    assert all(head.startswith("127.0.0.1:") for head, _ in seen)
    assert all(0 <= float(took.removesuffix("s")) < 10 for _, took in seen)
    assert not any("topsecret" in line for line in lines(caplog))


async def test_an_unexpected_error_is_a_500_without_a_traceback(
    api: Api, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("private detail")

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(api.client, "abort", broken)
    reply = await api.http.post("/abort_request", json={"abort_all": True})
    assert reply.status_code == 500
    assert "private detail" not in reply.text
    assert "its log has the details" in message(reply)
    assert lines(caplog)[-1].split(" ")[3] == "500"


async def test_unknown_routes_and_wrong_methods_have_the_form_of_errors(api: Api) -> None:
    reply = await api.http.get("/nothing")
    assert (reply.status_code, message(reply)) == (404, "there is no /nothing")
    reply = await api.http.get("/generate")
    assert reply.status_code == 405
    assert "GET /generate is not allowed; allowed: " in message(reply)
    assert "POST" in reply.headers["allow"]
    reply = await api.http.delete("/flush_cache")
    assert reply.status_code == 405
    assert "DELETE /flush_cache" in message(reply)
    assert {"GET", "POST"} == set(reply.headers["allow"].split(", "))


async def test_the_openapi_document_knows_the_bodies(api: Api) -> None:
    document = (await api.http.get("/openapi.json")).json()
    post = document["paths"]["/generate"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    assert "/flush_cache" in document["paths"]
    assert {"text", "input_ids", "sampling_params", "lora_path"} <= set(schema["properties"])


@pytest.mark.parametrize("keys", [{}, {"api_key": "k"}, {"admin_api_key": "k"}], ids=str)
async def test_the_openapi_document_knows_the_keys(
    make_api: MakeApi, config: ServerConfig, keys: dict[str, str]
) -> None:
    api: Api = await make_api(config=replace(config, **keys))
    document = (await api.http.get("/openapi.json", headers=bearer("k"))).json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            reply = await api.http.request(method, path)
            assert (reply.status_code == 401) == ("401" in operation["responses"]), path
