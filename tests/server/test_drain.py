"""The end of the server as clients see it: what is new is refused, what runs finishes or is cut off."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from lorikeet.errors import UnavailableError
from tests.server.conftest import Api, MakeApi
from tests.server.test_native import message

pytestmark = pytest.mark.anyio

CHAT = {"model": "base", "messages": [{"role": "user", "content": "ab"}]}
COMPLETION = {"model": "base", "prompt": "ab", "max_tokens": 400}
GENERATE = {"text": "ab", "sampling_params": {"max_new_tokens": 400}}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/health", None),
        ("GET", "/health_generate", None),
        ("GET", "/v1/models", None),
        ("POST", "/generate", GENERATE),
        ("POST", "/v1/completions", COMPLETION),
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/load_lora_adapter", {"lora_name": "x", "lora_path": "/x"}),
    ],
)
async def test_new_requests_are_refused(api: Api, method: str, path: str, body: Any) -> None:
    api.drain.begin()
    reply = await api.http.request(method, path, json=body)
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"
    assert reply.headers["connection"] == "close"
    error = {"type": "server_error", "param": None, "code": None}
    assert reply.json() == {"error": {"message": "the server is shutting down", **error}}
    assert not api.engine.seen
    assert not api.engine.commands


async def test_what_watches_and_shortens_the_end_is_still_served(api: Api) -> None:
    api.drain.begin()
    assert (await api.http.get("/metrics")).status_code == 200
    reply = await api.http.post("/abort_request", json={"abort_all": True})
    assert reply.json() == {"aborted": 0}


async def running(api: Api, path: str, body: dict[str, Any]) -> asyncio.Task[httpx.Response]:
    """A request that the engine has seen."""
    task = asyncio.create_task(api.http.post(path, json=body))
    async with asyncio.timeout(60):
        while not api.client.num_open:
            await asyncio.sleep(0.005)
    return task


async def test_what_runs_finishes(make_api: MakeApi) -> None:
    api: Api = await make_api(step_s=0.01)
    task = await running(api, "/v1/completions", COMPLETION | {"max_tokens": 20})
    assert api.drain.num_running == 1
    api.drain.begin()
    assert (await api.http.get("/health")).status_code == 503
    waiting = asyncio.create_task(api.drain.idle())
    await asyncio.sleep(0.02)
    assert not waiting.done()
    assert (await task).json()["choices"][0]["text"] == "ab" * 10
    async with asyncio.timeout(60):
        await waiting


@pytest.mark.parametrize(
    ("path", "body"),
    [("/generate", GENERATE), ("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("knobs", [{}, {"hold_accept": True}, {"is_stuck": True}], ids=str)
async def test_what_takes_too_long_is_cut_off_with_503(
    make_api: MakeApi, path: str, body: dict[str, Any], stream: bool, knobs: dict[str, bool]
) -> None:
    api: Api = await make_api(step_s=0.01, **knobs)
    task = await running(api, path, body | {"stream": stream})
    if not knobs:
        async with asyncio.timeout(60):
            while api.engine.num_steps < 3:
                await asyncio.sleep(0.005)
    assert api.client.cut_off(UnavailableError("the server is shutting down")) == 1
    reply = await task
    if stream and not knobs:  # it has begun
        assert reply.status_code == 200
        *events, error, done = reply.text.strip().split("\n\n")
        assert events
        assert done == "data: [DONE]"
        text = json.loads(error.removeprefix("data: "))["error"]["message"]
    else:
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        text = message(reply)
    assert text == "the server is shutting down"
    if "is_stuck" not in knobs:
        async with asyncio.timeout(60):  # the engine has heard of it
            while api.client.num_open:
                await asyncio.sleep(0.005)


async def test_a_command_is_cut_off_too(make_api: MakeApi) -> None:
    api: Api = await make_api(load_s=60)
    body = {"lora_name": "x", "lora_path": "/x"}
    task = asyncio.create_task(api.http.post("/load_lora_adapter", json=body))
    async with asyncio.timeout(60):
        while not api.engine.commands:
            await asyncio.sleep(0.005)
    assert api.client.cut_off(UnavailableError("the server is shutting down")) == 0
    assert (await task).status_code == 503
