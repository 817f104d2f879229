"""Texts and conversations that are too long are refused for their length, and in linear time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorikeet.client.intake import MAX_TEXT, MAX_TEXTS, OWN, SERVED, Intake
from lorikeet.errors import RequestError
from lorikeet.text.tokenizer import Tokenizer
from tests.server.conftest import Api
from tests.server.test_native import message
from tests.server.tool_api import ask, open_tools, prompt
from tests.support.tokenizer_variants import VARIANTS
from tests.support.tool_templates import HERMES, MISTRAL_ARGS

pytestmark = pytest.mark.anyio

LEAST = "has at least {} tokens; allowed: at most 512, because the maximum context length is 512"


@pytest.fixture
def uncounted(api: Api, monkeypatch: pytest.MonkeyPatch) -> Api:
    """A server that fails where it tokenizes."""

    def refuse(*args: Any, **kwargs: Any) -> list[int]:
        raise AssertionError("a text that cannot fit was tokenized")

    monkeypatch.setattr(api.client.tokenizer, "encode", refuse)
    return api


async def test_a_text_that_cannot_fit_is_not_tokenized(uncounted: Api) -> None:
    api = uncounted
    # The longest token of this vocabulary is the 4 bytes of </s>.
    for text, least in (
        ("a" * 2052, 513),
        ("é" * 1_500_000, 750_000),
        ("a b" * 1_000_000, 750_000),
    ):
        reply = await api.generate(text=text)
        assert reply.status_code == 400
        assert "text " + LEAST.format(least) in message(reply)
    reply = await api.generate(text=["a", "a" * 2052])
    assert "text[1] " + LEAST.format(513) in message(reply)
    reply = await api.http.post("/v1/completions", json={"model": "base", "prompt": "a" * 5_000})
    assert (reply.status_code, message(reply)) == (400, "prompt " + LEAST.format(1250))
    reply = await api.http.post("/v1/embeddings", json={"model": "base", "input": "a" * 5_000})
    assert (reply.status_code, message(reply)) == (400, "input " + LEAST.format(1250))
    for size in (5_000, 500_000):
        chat = {"model": "base", "messages": [{"role": "user", "content": "a" * size}]}
        reply = await api.http.post("/v1/chat/completions", json=chat)
        assert (reply.status_code, message(reply)) == (400, "messages " + LEAST.format(size // 4))
        assert reply.json()["error"]["param"] == "messages"


async def test_texts_have_limits_of_their_own(
    uncounted: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tokenizers make one token of a text of any length."""
    api = uncounted
    monkeypatch.setattr(api.client.tokenizer, "least_tokens", lambda text: 0)
    reply = await api.generate(text="a" * (MAX_TEXT + 1))
    assert reply.status_code == 400
    assert f"text has {MAX_TEXT + 1:,} characters; allowed: {MAX_TEXT:,}" in message(reply)
    reply = await api.generate(text=["a" * (MAX_TEXTS // 4)] * 5)
    assert reply.status_code == 400
    assert f"characters in 5 prompts; allowed: {MAX_TEXTS:,} in one call" in message(reply)
    chat = {"model": "base", "messages": [{"role": "user", "content": "a" * (MAX_TEXT + 1)}]}
    reply = await api.http.post("/v1/chat/completions", json=chat)
    assert reply.status_code == 400
    assert f"makes {MAX_TEXT + 1:,} characters of these messages; allowed: {MAX_TEXT:,}" in message(
        reply
    )


async def test_what_may_fit_is_counted(api: Api) -> None:
    reply = await api.generate(text="</s>" * 511, sampling_params={"max_new_tokens": 1})
    assert reply.status_code == 200
    assert reply.json()["meta_info"]["prompt_tokens"] == 511
    reply = await api.generate(text="a" * 2048)
    assert "the prompt has 2048 tokens; allowed: at most 511" in message(reply)


def test_in_ones_own_process_texts_are_as_long_as_one_likes(tmp_path: Path) -> None:
    VARIANTS["words"](tmp_path)  # a tokenizer that makes one token of any word
    limits: dict[str, Any] = {"vocab_size": 4, "context_length": 10}
    text = {"text": "a" * (MAX_TEXT + 1)}
    tokenizer = Tokenizer.load(tmp_path)
    requests = Intake(tokenizer, **limits, limits=OWN).make_requests(text).requests
    assert len(requests[0].prompt_token_ids) == 1
    with pytest.raises(RequestError, match="allowed: 4,194,304 in one prompt"):
        Intake(tokenizer, **limits, limits=SERVED).make_requests(text)


def call(arguments: str) -> list[dict[str, Any]]:
    function = {"name": "add", "arguments": arguments}
    return [
        {"role": "user", "content": "?"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
    ]


@pytest.mark.parametrize("depth", [60, 480, 1000, 90_000])
async def test_deep_arguments(tmp_path: Path, depth: int) -> None:
    async with open_tools(tmp_path, HERMES, "ok") as api:
        arguments = '{"a":' + "[" * depth + "]" * depth + "}"
        reply = await ask(api, messages=call(arguments))
        assert reply.status_code == (200 if depth == 60 else 400)
        if depth != 60:
            error = reply.json()["error"]
            assert error["message"].startswith("messages[1].tool_calls")
            assert len(error["message"]) < 500
    async with open_tools(tmp_path, MISTRAL_ARGS, "ok") as api:
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        for _ in range(min(depth, 200)):
            tool["function"]["parameters"] = {
                "type": "object",
                "properties": {"a": tool["function"]["parameters"]},
            }
        reply = await ask(api, tools=[tool])
        assert reply.status_code in ((200, 400) if depth == 60 else (400,))
        assert reply.json().get("error", {}).get("message") != ""


async def test_many_parts_and_messages(tmp_path: Path) -> None:
    async with open_tools(tmp_path, HERMES, "ok", "ok") as api:
        parts = [{"type": "text", "text": ""}] * 50_000
        reply = await ask(api, messages=[{"role": "user", "content": parts}], tools=None)
        assert reply.status_code == 400
        assert "at least" in message(reply)
        messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}] * 200
        reply = await ask(api, messages=messages, tools=None)
        assert reply.status_code in (200, 400)
        assert prompt(api) if reply.status_code == 200 else "tokens" in message(reply)


async def test_arguments_of_many_values(tmp_path: Path) -> None:
    """They are JSON inside of a string of the body, and parsed as well; together they have the body's limits."""
    async with open_tools(tmp_path, HERMES, "ok") as api:
        many = '{"a": [' + "[]," * 40_000 + "0]}"
        for messages in (call(many) * 3, call(many)[:1] + call(many)[1:] * 3):
            reply = await ask(api, messages=messages)
            assert reply.status_code == 400
            assert (
                "the arguments of tool_calls have more than 100,000 lists and objects"
                in message(reply)
            )
        reply = await ask(api, messages=call('{"a": "' + "[," * 200_000 + '"}'))
        assert "at least" in message(reply)
