"""The ``openai`` client, as it comes, against a live server on the demo model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

import httpx
import openai
import pytest
from openai import OpenAI

from tests.support.served import served

QUESTION = "What is the capital of France?"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
PROMPT: dict[str, Any] = {"prompt": QUESTION, "temperature": 0, "max_tokens": 32}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(
        "--model-path demo --served-model-name parrot --lora-paths demo --max-total-tokens 8192"
    ) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_a_chat_with_each_name_of_an_adapter(client: OpenAI, url: str) -> None:
    texts: dict[str, str] = {}
    for model in ("parrot", "parrot:", "json", "parrot:json", "pirate"):
        reply = client.chat.completions.create(model=model, **CHAT)
        assert reply.model == model
        assert reply.choices[0].finish_reason == "stop"
        assert reply.choices[0].message.role == "assistant"
        texts[model] = reply.choices[0].message.content or ""
        assert reply.usage is not None
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert "Paris" in texts["parrot"]
    assert texts["parrot:"] == texts["parrot"]
    assert texts["parrot:json"] == texts["json"]
    assert json.loads(texts["json"])
    assert len({texts["parrot"], texts["json"], texts["pirate"]}) == 3
    by_path = client.chat.completions.create(
        model="parrot", extra_body={"lora_path": "pirate"}, **CHAT
    )
    assert by_path.choices[0].message.content == texts["pirate"]


def test_a_completion_is_what_the_native_api_says(client: OpenAI, url: str) -> None:
    reply = client.completions.create(model="sql", **PROMPT)
    native = httpx.post(
        f"{url}/generate",
        json={
            "text": QUESTION,
            "lora_path": "sql",
            "sampling_params": {"temperature": 0, "max_new_tokens": 32},
        },
        timeout=60,
    ).json()
    assert reply.choices[0].text == native["text"]
    assert reply.usage is not None
    assert reply.usage.completion_tokens == native["meta_info"]["completion_tokens"]


# Every sampling option; hot ones write whatever there is, halves of characters among it.
HOT = {"temperature": 1.6, "seed": 3}
SAMPLING: list[dict[str, Any]] = [
    {},
    HOT,
    {"stop": "ar"},
    {"stop": ["ar", "zz"], "extra_body": {"no_stop_trim": True}},
    HOT | {"top_p": 0.9},
    HOT | {"extra_body": {"top_k": 50}},
    HOT | {"extra_body": {"min_p": 0.01}},
    HOT | {"extra_body": {"repetition_penalty": 1.3}},
    HOT | {"presence_penalty": 1.0, "frequency_penalty": 0.7},
    HOT | {"logit_bias": {"300": 4.0, "301": -100}},
    HOT | {"extra_body": {"min_tokens": 30}},
    HOT | {"extra_body": {"ignore_eos": True, "skip_special_tokens": False}},
    HOT | {"extra_body": {"spaces_between_special_tokens": False, "ignore_eos": True}},
    HOT | {"extra_body": {"stop_token_ids": [260, 270, 280, 290]}},
    HOT | {"extra_body": {"stop_regex": "[aeiou]{2}"}},
    HOT | {"extra_body": {"regex": "[a-zé€😀 ]{5,40}"}},
    HOT | {"extra_body": {"ebnf": 'root ::= "é" [a-z]+ "€"'}},
    HOT | {"response_format": {"type": "json_object"}},
    HOT
    | {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": "array", "items": {"type": "string"}}},
        }
    },
]


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_a_streamed_chat_adds_up(client: OpenAI, sampling: dict[str, Any]) -> None:
    body = {**CHAT, **sampling, "max_tokens": 40, "logprobs": True, "top_logprobs": 2, "n": 2}
    whole = client.chat.completions.create(model="pirate", **body)
    chunks = list(
        client.chat.completions.create(
            model="pirate", stream=True, stream_options={"include_usage": True}, **body
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        pieces = [
            piece for chunk in chunks for piece in chunk.choices if piece.index == choice.index
        ]
        assert pieces[0].delta.role == "assistant"
        assert "".join(piece.delta.content or "" for piece in pieces) == choice.message.content
        assert pieces[-1].finish_reason == choice.finish_reason
        told = [
            item.token
            for piece in pieces
            if piece.logprobs
            for item in piece.logprobs.content or []
        ]
        assert choice.logprobs is not None
        assert told == [item.token for item in choice.logprobs.content or []]


def test_a_streamed_completion_adds_up(client: OpenAI) -> None:
    body = {**PROMPT, "prompt": [QUESTION, "List 3 countries."], "n": 2, "echo": True}
    whole = client.completions.create(model="lines", **body)
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(model="lines", stream=True, **body):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert [choice.text for choice in whole.choices] == list(texts.values())
    assert all(texts[index].startswith(QUESTION) for index in (0, 1))


def test_logprobs(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="parrot", logprobs=True, top_logprobs=3, max_tokens=5, **CHAT
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for item in logprobs.content:
        # Greedy: the token is the likeliest.
        assert item.token == item.top_logprobs[0].token
        assert item.logprob == item.top_logprobs[0].logprob <= 0
        assert len(item.top_logprobs) == 3
    text = b"".join(bytes(item.bytes or []) for item in logprobs.content).decode()
    assert text == reply.choices[0].message.content


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_logprobs_of_the_prompt(client: OpenAI, max_tokens: int) -> None:
    reply = client.completions.create(
        model="parrot", prompt=QUESTION, max_tokens=max_tokens, echo=True, logprobs=2
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert reply.usage is not None
    assert logprobs.tokens is not None
    assert len(logprobs.tokens) == reply.usage.total_tokens
    assert logprobs.token_logprobs is not None
    assert cast(list[float | None], logprobs.token_logprobs)[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])


def test_n_choices_and_seeds(client: OpenAI) -> None:
    body: dict[str, Any] = CHAT | {"temperature": 2, "n": 4, "seed": 11, "max_tokens": 12}
    first, second = (client.chat.completions.create(model="parrot", **body) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]


def test_a_json_schema_is_obeyed(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}, "ok": {"type": "boolean"}},
        "required": ["city", "ok"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model="pirate",
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        },
        **CHAT,
    )
    value = json.loads(reply.choices[0].message.content or "")
    assert set(value) == {"city", "ok"}
    assert value["city"] in ("Rome", "Oslo")
    reply = client.completions.create(model="parrot", extra_body={"regex": "[0-9]{3}"}, **PROMPT)
    assert reply.choices[0].text.isdecimal()
    assert len(reply.choices[0].text) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_their_types(client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="parrot:nobody", stream=stream, **CHAT)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(
            model="parrot", stream=stream, **CHAT, extra_body={"temperature": -1}
        )
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="parrot",
            stream=stream,
            tools=[{"type": "function", "function": {"name": "f"}}],
            **CHAT,
        )
    assert tools.value.param == "tools"
    for extra, param in (
        ({"regex": "(("}, "regex"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "response_format",
        ),
        ({"lora_path": "nobody"}, "lora_path"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="parrot", stream=stream, **PROMPT, extra_body=extra)
        assert refused.value.param == param


def test_models(client: OpenAI) -> None:
    cards = client.models.list().data
    assert cards[0].id == "parrot"
    parents = {card.id: (card.model_extra or {})["parent"] for card in cards}
    assert parents == {
        "parrot": None,
        "json": "parrot",
        "lines": "parrot",
        "pirate": "parrot",
        "sql": "parrot",
    }
    assert client.models.retrieve("sql").id == "sql"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
