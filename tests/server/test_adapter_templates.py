"""Messages for an adapter are rendered with its own chat template."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from lorikeet.core.commands import FindAdapter
from lorikeet.server.reading import LARGE
from tests.server.conftest import Api, MakeApi
from tests.server.test_native import message
from tests.server.tool_api import ask, calls_of, open_tools, prompt
from tests.support.tool_templates import HERMES, MISTRAL_ARGS, PLAIN

pytestmark = pytest.mark.anyio

LOUD = "{% for message in messages %}{{ message.content | upper }}{% endfor %}{{ eos_token }}"


async def content(api: Api, model: str) -> Any:
    """What the echo of the rendered messages is, or the refusal."""
    reply = await ask(api, "Hi", model=model, tools=None, max_tokens=3)
    if reply.status_code != 200:
        return reply.status_code, message(reply)
    return reply.json()["choices"][0]["message"]["content"]


async def test_an_adapter_with_a_template(make_api: MakeApi) -> None:
    api = await make_api(templates={"/a/json": {"default": LOUD}})
    assert await content(api, "json") == "HI"
    assert await content(api, "base:json") == "HI"
    assert prompt(api) == "HI</s>"
    for model in ("base", "sql"):
        assert await content(api, model) == "HiH"
    reply = await ask(api, "Hi", lora_path="json", tools=None, max_tokens=2)
    assert reply.json()["choices"][0]["message"]["content"] == "HI"


async def test_a_name_that_comes_to_mean_another_adapter(make_api: MakeApi) -> None:
    api = await make_api(
        templates={"/b/1": {"default": LOUD}, "/b/2": {"default": "x{{ messages[0].content }}"}}
    )

    async def load(path: str) -> None:
        reply = await api.http.post(
            "/load_lora_adapter", json={"lora_name": "b", "lora_path": path}
        )
        assert reply.status_code == 200

    async def unload() -> None:
        assert (
            await api.http.post("/unload_lora_adapter", json={"lora_name": "b"})
        ).status_code == 200

    status, words = await content(api, "b")
    assert status == 404
    assert "never been loaded" in words
    for path, wanted in (("/b/1", "HI"), ("/b/2", "xHi"), ("/b/3", "HiH")):
        await load(path)
        assert await content(api, "b") == wanted
        await unload()
        assert (await content(api, "b"))[0] == 404
    await load("/b/1")
    body = {"lora_name": "b", "lora_path": "/b/2", "load_inplace": True}
    assert (await api.http.post("/v1/load_lora_adapter", json=body)).status_code == 200
    assert await content(api, "b") == "xHi"


async def test_an_adapter_that_the_resolver_finds(make_api: MakeApi) -> None:
    """Its template is needed before the request that makes it load."""
    api = await make_api(findable={"late": "/late"}, templates={"/late": {"default": LOUD}})
    assert await content(api, "late") == "HI"
    assert [ask.command for ask in api.engine.commands] == [FindAdapter("late")]
    assert await content(api, "late") == "HI"
    assert len(api.engine.commands) == 1


async def test_a_base_without_a_template(tmp_path: Path) -> None:
    knobs: dict[str, Any] = {"templates": {"/a/json": {"default": LOUD}}}
    async with open_tools(tmp_path, None, **knobs) as api:
        assert await content(api, "json") == "HI"
        assert "no chat template" in (await content(api, "base"))[1]


async def test_tools_are_those_of_the_adapters_template(tmp_path: Path) -> None:
    script = 'a<tool_call>{"name": "add", "arguments": {}}</tool_call>[TOOL_CALLS]add[ARGS]{"a": 1}'
    templates = {
        "/a/json": {"default": MISTRAL_ARGS},
        "/a/sql": {"default": PLAIN, "tool_use": HERMES},
    }
    async with open_tools(tmp_path, PLAIN, script, templates=templates) as api:
        assert (
            message(await ask(api))
            == "tools: the form of this model's tool calls cannot be told from its chat template; the server must be started with --tool-call-parser"
        )
        for model, arguments in (("json", '{"a": 1}'), ("sql", "{}")):
            reply = (await ask(api, model=model)).json()["choices"][0]["message"]
            assert calls_of(reply) == [("add", arguments)]


async def test_a_template_is_bound_to_its_sandbox(make_api: MakeApi) -> None:
    nasty = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    api = await make_api(templates={"/a/json": {"default": nasty}})
    status, words = await content(api, "json")
    assert status == 400
    assert "chat template cannot render" in words


SPIN = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [(SPIN, "it takes "), ("{{ 'a' * 2000000000 }}", "it takes more than 256 MB of memory")],
)
async def test_a_template_that_takes_too_much(make_api: MakeApi, template: str, words: str) -> None:
    api = await make_api(templates={"/a/json": {"default": template}, "/a/sql": {"default": LOUD}})
    slow = asyncio.create_task(content(api, "json"))
    # Nobody else waits for it: neither another adapter's template, nor the base's, nor a probe.
    assert await content(api, "sql") == "HI"
    assert await content(api, "base") == "HiH"
    assert (await api.http.get("/health")).status_code == 200
    if template == SPIN:
        assert not slow.done()
    status, message_ = await slow
    assert status == 400
    assert message_.startswith(f"the chat template of the adapter 'json' cannot be used: {words}")
    assert await content(api, "sql") == "HI"


async def test_a_chat_whose_client_leaves_is_not_rendered_any_more(make_api: MakeApi) -> None:
    api = await make_api(templates={"/a/json": {"default": SPIN}})
    calls = [asyncio.create_task(content(api, "json")) for _ in range(3)]
    await asyncio.sleep(0.1)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    turn = api.client.templates._turns.get(SPIN)
    assert turn is None or not turn.locked()


async def test_long_chats_of_the_base_are_rendered_aside(
    make_api: MakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever started the server chose the base's template, so that it is rendered at once, but not of what is long."""
    api = await make_api(context_length=10 * LARGE)
    asked: list[str] = []
    render = api.client.templates.render

    async def watch(source: str, *args: Any, **kwargs: Any) -> str:
        asked.append(source)
        return await render(source, *args, **kwargs)

    monkeypatch.setattr(api.client.templates, "render", watch)
    assert (await ask(api, "Hi", model="base", tools=None, max_tokens=1)).status_code == 200
    assert not asked
    reply = await ask(api, "Hi" * LARGE, model="base", tools=None, max_tokens=1)
    assert reply.json()["usage"]["prompt_tokens"] == 2 * LARGE
    assert len(asked) == 1
