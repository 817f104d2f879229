"""Health, info, cache and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from lorikeet import __version__
from lorikeet.config import OPTIONS, LoRAPath, Option, ServerConfig, Settings, resolve
from tests.server.conftest import Api, MakeApi
from tests.server.test_native import message
from tests.support.live_server import LiveServer, wait_until

pytestmark = pytest.mark.anyio


async def test_health_follows_the_engine(api: Api) -> None:
    assert (await api.http.get("/health")).status_code == 200
    assert (await api.http.get("/health_generate")).status_code == 200
    assert len(api.engine.seen) == 1, "/health asks nothing of the engine"
    assert api.engine.seen[0].sampling.max_new_tokens == 1
    api.engine.die()
    await api.client.died()
    for path in ("/health", "/health_generate"):
        reply = await api.http.get(path)
        assert reply.status_code == 503
        assert "the engine process has ended" in message(reply)


async def test_a_stuck_engine_is_up_but_not_healthy(make_api: MakeApi) -> None:
    api: Api = await make_api(health_timeout=0.2, hold_accept=True)
    reply = await api.http.get("/health_generate")
    assert reply.status_code == 503
    assert "no token within 0.2 seconds" in message(reply)
    assert (await api.http.get("/health")).status_code == 200
    async with asyncio.timeout(60):  # the probe is not left behind
        while api.client.num_open:
            await asyncio.sleep(0.005)
    assert len(api.engine.aborted) == 1


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
async def test_model_info(api: Api, config: ServerConfig, path: str) -> None:
    info = (await api.http.get(path)).json()
    assert info["model_path"] == info["tokenizer_path"] == config.model_path
    assert info["served_model_name"] == "base"
    assert info["is_generation"] is True
    assert info["context_length"] == 512
    assert info["lora_enabled"] is True
    assert info["max_lora_rank"] == 16


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
async def test_server_info_has_everything_but_the_keys(
    make_api: MakeApi, config: ServerConfig, path: str
) -> None:
    config = replace(
        config,
        api_key="topsecret",
        admin_api_key="moresecret",
        lora_paths=(LoRAPath("json", "/a/json", pinned=True),),
    )
    api: Api = await make_api(config=config)
    reply = await api.http.get(path, headers={"Authorization": "Bearer topsecret"})
    assert "secret" not in reply.text
    info = reply.json()
    assert "api_key" not in info
    assert info["lora_paths"][0]["name"] == "json"
    assert info["schedule_policy"] == "fcfs"
    assert info["max_total_num_tokens"] == 4096
    assert info["version"] == __version__
    assert isinstance(info["internal_states"], list)


async def test_flush_cache(api: Api) -> None:
    reply = await api.http.post("/flush_cache")
    assert (reply.status_code, reply.json()["success"]) == (200, True)


async def test_get_changes_nothing(api: Api) -> None:
    reply = await api.http.get("/flush_cache")
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert not api.engine.commands


async def test_flush_cache_waits_as_long_as_it_may(make_api: MakeApi) -> None:
    api: Api = await make_api(step_s=0.02)
    call = asyncio.create_task(api.generate(text="a", sampling_params={"max_new_tokens": 20}))
    while not api.engine.num_running:
        await asyncio.sleep(0.001)
    reply = await api.http.post("/flush_cache")
    assert reply.status_code == 400
    assert "requests are running" in message(reply)
    reply = await api.http.post("/flush_cache?timeout=0.1")
    assert reply.status_code == 400
    assert not call.done()
    assert (await api.http.post("/flush_cache", params={"timeout": "20"})).status_code == 200
    assert (await call).json()["text"] == "a" * 20


def test_a_flush_ends_when_its_client_leaves(make_live: Callable[..., LiveServer]) -> None:
    server = make_live(step_s=0.05)
    body = {"text": "a", "sampling_params": {"max_new_tokens": 400}, "stream": True}
    with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        assert next(lines)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/flush_cache?timeout=600", timeout=0.2)
        wait_until(lambda: server.drain.num_running == 1, 60)
        num_steps = server.engine.num_steps
        wait_until(
            lambda: server.engine.num_steps > num_steps + 1
        )  # it has read what was on its way
        num_asked = len(server.engine.commands)
        time.sleep(0.3)
        assert len(server.engine.commands) == num_asked


async def test_refusals_take_no_thread(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a thread was asked for")

    monkeypatch.setattr("anyio.to_thread.run_sync", refuse)
    for path, status in (("/nothing", 404), ("/flush_cache", 405), ("/v1/models/none", 404)):
        assert (await api.http.get(path)).status_code == status
    assert (await api.generate(text=5)).status_code == 400
    monkeypatch.setattr(api.client, "abort", lambda *_: 1 / 0)
    assert (await api.http.post("/abort_request", json={"rid": "a"})).status_code == 500


async def test_many_that_wait_for_a_flush_ask_one_at_a_time(make_api: MakeApi) -> None:
    api: Api = await make_api(step_s=0.05)
    call = asyncio.create_task(api.generate(text="a", sampling_params={"max_new_tokens": 20}))
    while not api.engine.num_running:
        await asyncio.sleep(0.001)
    waiting = [asyncio.create_task(api.http.post("/flush_cache?timeout=60")) for _ in range(50)]
    await call
    num_asked = len(api.engine.commands)
    assert num_asked < 50, "each asks every 50 ms, for a second"
    assert {task.status_code for task in await asyncio.gather(*waiting)} == {200}


@pytest.mark.parametrize("value", ["soon", "-1", "inf", "nan", "", "600.1", "1e9"])
async def test_flush_cache_refuses_other_timeouts(api: Api, value: str) -> None:
    reply = await api.http.post("/flush_cache", params={"timeout": value})
    assert reply.status_code == 400
    assert "timeout: must be a number of seconds, at least 0 and at most 600" in message(reply)
    assert not api.engine.commands


SECRET_URL = "https://user:PASSW0RD@host/x?sig=SIGN4TURE#t0ken"


def planted(option: Option) -> object:
    """A value with secrets for an option; None if it cannot hold text."""
    if option.value_type is str:
        return SECRET_URL
    if option.value_type == tuple[LoRAPath, ...]:
        return (LoRAPath("a", SECRET_URL), LoRAPath(SECRET_URL, "/b"))
    return (SECRET_URL,) if option.value_type == tuple[str, ...] else None


def with_values(settings: Settings, values: dict[str, Any]) -> Settings:
    """The settings with other values of some, which may be ones that no option has."""
    groups = (settings.lora, settings.http, settings)
    lora, http, rest = ({n: v for n, v in values.items() if hasattr(g, n)} for g in groups)
    return replace(
        settings, **rest, lora=replace(settings.lora, **lora), http=replace(settings.http, **http)
    )


async def test_server_info_shows_no_secret_of_any_option(
    make_api: MakeApi, config: ServerConfig
) -> None:
    values = {
        name: value for name, option in OPTIONS.items() if (value := planted(option)) is not None
    }
    assert {"model_path", "lora_paths", "lora_root", "host", "admin_api_key"} <= values.keys()
    api: Api = await make_api(settings=with_values(resolve(config), values))
    headers = {"Authorization": f"Bearer {SECRET_URL}"}
    reply = await api.http.get("/server_info", headers=headers)
    for secret in ("PASSW0RD", "SIGN4TURE", "t0ken"):
        assert secret not in reply.text
    info = reply.json()
    assert info["lora_resolver_dir"] == "https://***@host/x?***"
    assert info["lora_paths"][0] == {"name": "a", "path": "https://***@host/x?***", "pinned": False}
    assert not {"api_key", "admin_api_key"} & info.keys()


async def test_metrics_count_what_was_served(api: Api) -> None:
    await api.generate(text=["a", "b"], sampling_params={"max_new_tokens": 3})
    await api.generate(text="a", lora_path="nobody")
    reply = await api.http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    lines = reply.text.splitlines()
    assert 'lorikeet_requests_total{model_name="base",outcome="length"} 2.0' in lines
    assert 'lorikeet_requests_total{model_name="base",outcome="error"} 1.0' in lines
    assert 'lorikeet_generated_tokens_total{model_name="base"} 6.0' in lines
    assert 'lorikeet_time_to_first_token_seconds_count{model_name="base"} 2.0' in lines
    assert any(line.startswith("lorikeet_engine_num_running{") for line in lines)


async def test_no_metrics_unless_asked_for(make_api: MakeApi, config: ServerConfig) -> None:
    api: Api = await make_api(config=replace(config, enable_metrics=False))
    assert (await api.http.get("/metrics")).status_code == 404
