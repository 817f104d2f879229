"""The access line and the API keys."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from lorikeet.config import ServerConfig
from lorikeet.server.app import ADMIN_PATHS
from tests.server.conftest import Api, MakeApi
from tests.server.test_native import message

pytestmark = pytest.mark.anyio

READING = ["/v1/models", "/v1/models/base", "/model_info", "/server_info", "/metrics", "/nothing"]


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"Authorization": f"Bearer {key}".encode()}


async def status(api: Api, path: str, key: str | None, method: str = "GET") -> int:
    headers = {} if key is None else bearer(key)
    body = {"abort_all": True} if path == "/abort_request" else None
    return (await api.http.request(method, path, headers=headers, json=body)).status_code


async def test_without_keys_everything_is_open(api: Api) -> None:
    assert await status(api, "/v1/models", None) == 200
    assert await status(api, "/flush_cache", None, "POST") == 200
    assert await status(api, "/abort_request", None, "POST") == 200


async def test_one_key_opens_everything(make_api: MakeApi, config: ServerConfig) -> None:
    api: Api = await make_api(config=replace(config, api_key="k"))
    for path in READING:
        for wrong in (None, "", "K", "kk", "k\xe9"):
            assert await status(api, path, wrong) == 401
        assert await status(api, path, "k") in (200, 404)
    assert await status(api, "/abort_request", None, "POST") == 401
    assert await status(api, "/abort_request", "k", "POST") == 200
    assert await status(api, "/flush_cache", None, "POST") == 401
    assert await status(api, "/flush_cache", "k", "POST") == 200
    assert (await api.generate(text="a")).status_code == 401
    assert not api.engine.seen
    for path in ("/health", "/health_generate"):
        assert await status(api, path, None) == 200


async def test_with_both_keys_each_opens_its_own(make_api: MakeApi, config: ServerConfig) -> None:
    api: Api = await make_api(config=replace(config, api_key="k", admin_api_key="a"))
    for path in ("/flush_cache", "/abort_request"):
        assert await status(api, path, None, "POST") == 401
        assert await status(api, path, "k", "POST") == 401
        assert await status(api, path, "a", "POST") == 200
    assert await status(api, "/v1/models", "k") == 200
    assert await status(api, "/v1/models", "a") == 401


async def test_an_admin_key_alone_leaves_the_rest_open(
    make_api: MakeApi, config: ServerConfig
) -> None:
    api: Api = await make_api(config=replace(config, admin_api_key="a"))
    assert await status(api, "/v1/models", None) == 200
    assert await status(api, "/flush_cache", None, "POST") == 401
    assert await status(api, "/flush_cache", "a", "POST") == 200


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
    assert reply.headers["allow"] == "POST"


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


LOAD = ("/load_lora_adapter", b'{"lora_name": "x", "lora_path": "/x"}')
# Every path that changes the server, with a body that it takes.
CHANGING = [
    LOAD,
    ("/v1/load_lora_adapter", LOAD[1]),
    ("/unload_lora_adapter", b'{"lora_name": "json"}'),
    ("/v1/unload_lora_adapter", b'{"lora_name": "json"}'),
    ("/load_lora_adapter_from_tensors", b'{"lora_name": "x"}'),
    ("/abort_request", b'{"abort_all": true}'),
    ("/flush_cache", b"{}"),
]
INFERENCE = [("/generate", b'{"text": "a"}'), ("/v1/completions", b'{"model": "base"}')]
JSON = "application/json"


def test_the_list_of_what_changes_is_complete() -> None:
    assert {path for path, _ in CHANGING} == set(ADMIN_PATHS)


async def refusal(api: Api, call: tuple[str, bytes], **headers: str) -> int | None:
    """The status of a refusal for the caller's origin, host or kind of body; None if the route was reached."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    before = len(api.engine.commands), len(api.engine.seen)
    reply = await api.http.post(call[0], content=call[1], headers=names)
    if reply.status_code not in (403, 415):
        return None
    assert (len(api.engine.commands), len(api.engine.seen)) == before
    assert message(reply)
    return reply.status_code


@pytest.mark.parametrize("call", CHANGING, ids=lambda call: call[0])
async def test_what_changes_the_server_is_json(api: Api, call: tuple[str, bytes]) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"):
        assert await refusal(api, call, content_type=kind) == 415
    assert await refusal(api, call) == 415, "a body of no kind"
    for kind in (JSON, "Application/JSON; charset=utf-8", "application/problem+json"):
        assert await refusal(api, call, content_type=kind) is None


async def test_inference_takes_what_curl_sends(api: Api) -> None:
    for call in INFERENCE:
        for kind in ("application/x-www-form-urlencoded", "text/plain"):
            assert await refusal(api, call, content_type=kind) is None


@pytest.mark.parametrize("call", [*CHANGING, *INFERENCE], ids=lambda call: call[0])
async def test_a_page_of_another_origin_may_not_call(api: Api, call: tuple[str, bytes]) -> None:
    for origin in ("https://evil.example", "null", "http://localhost:8080", "http://127.0.0.1"):
        assert await refusal(api, call, origin=origin, content_type=JSON) == 403
    for site in ("cross-site", "same-site"):
        assert await refusal(api, call, sec_fetch_site=site, content_type=JSON) == 403
    assert await refusal(api, call, origin="http://localhost", content_type=JSON) is None
    assert await refusal(api, call, sec_fetch_site="none", content_type=JSON) is None


@pytest.mark.parametrize("call", CHANGING, ids=lambda call: call[0])
async def test_a_name_that_was_made_to_point_here_is_no_way_in(
    api: Api, call: tuple[str, bytes]
) -> None:
    for host in ("evil.example", "evil.example:30000", "127.0.0.1.evil.example", "[::1", "", "x@y"):
        assert await refusal(api, call, host=host, content_type=JSON) == 403
        origin = f"http://{host}"
        assert await refusal(api, call, host=host, origin=origin, content_type=JSON) == 403
    for host in ("localhost:30000", "127.0.0.1:1", "127.8.9.1", "[::1]:30000", "a.localhost"):
        assert await refusal(api, call, host=host, content_type=JSON) is None


async def test_a_page_whose_name_was_made_to_point_here_may_not_ask(api: Api) -> None:
    host, origin = "evil.example:30000", "http://evil.example:30000"
    for call in INFERENCE:
        assert await refusal(api, call, host=host, origin=origin) == 403
        assert await refusal(api, call, host=host) is None, "a proxy's name, and no page"


async def test_allowed_hosts_and_origins(make_api: MakeApi, config: ServerConfig) -> None:
    api: Api = await make_api(
        config=replace(
            config, allowed_hosts=("llm.example",), allowed_origins=("https://app.example/",)
        )
    )
    json = {"content_type": JSON}
    assert await refusal(api, LOAD, host="LLM.example:443", **json) is None
    assert await refusal(api, LOAD, host="other.example", **json) == 403
    assert await refusal(api, LOAD, origin="https://app.example", **json) is None
    assert await refusal(api, LOAD, origin="http://app.example", **json) == 403
    assert await refusal(api, LOAD, host="app.example", **json) is None
    every: Api = await make_api(config=replace(config, allowed_origins=("*",)))
    assert await refusal(every, LOAD, origin="https://any.example", **json) is None
    public: Api = await make_api(config=replace(config, host="0.0.0.0"))
    assert await refusal(public, LOAD, host="any.example", **json) is None
    same = "http://any.example"
    assert await refusal(public, LOAD, host="any.example", origin=same, **json) is None
    assert await refusal(public, LOAD, host="any.example", origin="http://x", **json) == 403


PREFLIGHT = {
    "Origin": "https://app.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


async def test_cors_is_off_unless_asked_for(api: Api) -> None:
    reply = await api.http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert reply.status_code == 405
    reply = await api.http.get("/v1/models", headers={"Origin": "https://app.example"})
    assert not [name for name in reply.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("allowed", ["https://app.example", "*"])
async def test_cors(make_api: MakeApi, config: ServerConfig, allowed: str) -> None:
    api: Api = await make_api(config=replace(config, api_key="k", allowed_origins=(allowed,)))
    # A preflight carries no key.
    reply = await api.http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == allowed
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "authorization" in reply.headers["access-control-allow-headers"]
    for key, status in (("k", 200), ("wrong", 401)):
        reply = await api.http.get(
            "/v1/models",
            headers={"Origin": "https://app.example", "Authorization": f"Bearer {key}"},
        )
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (
            status,
            allowed,
        )
    other = await api.http.options(
        "/v1/chat/completions", headers={**PREFLIGHT, "Origin": "https://evil.example"}
    )
    assert (other.status_code == 200) == (allowed == "*")
