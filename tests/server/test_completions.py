"""POST /v1/completions and /v1/chat/completions over an engine double, which repeats its prompt."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorikeet.text.tokenizer import Tokenizer
from tests.server.conftest import Api, MakeApi
from tests.server.test_native import events, message
from tests.support.byte_tokenizer import save_byte_tokenizer

pytestmark = pytest.mark.anyio


async def complete(api: Api, **body: Any) -> httpx.Response:
    return await api.http.post("/v1/completions", json={"model": "base", "prompt": "ab"} | body)


async def chat(api: Api, content: Any = "ab", **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": content}]
    fields = {"model": "base", "messages": messages, "max_tokens": 4} | body
    return await api.http.post("/v1/chat/completions", json=fields)


def added_up(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The choices that the chunks of a stream add up to: text, logprobs and how it ended."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            choice = choices.setdefault(
                piece["index"], {"text": "", "logprobs": {}, "finish_reason": None}
            )
            assert choice["finish_reason"] is None, "a chunk after the last one"
            delta = piece["delta"].get("content", "") if "delta" in piece else piece["text"]
            choice["text"] += delta
            choice["finish_reason"] = piece["finish_reason"]
            for name, values in (piece["logprobs"] or {}).items():
                choice["logprobs"][name] = (choice["logprobs"].get(name) or []) + (values or [])
    return choices


async def test_a_completion(api: Api) -> None:
    reply = await complete(api, max_tokens=4)
    body = reply.json()
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "base",
        "choices": [{"index": 0, "text": "abab", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 4,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


async def test_a_chat(api: Api) -> None:
    reply = await chat(api, stop="ba")
    body = reply.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body.pop("usage")["total_tokens"] == 5
    assert body == {
        "object": "chat.completion",
        "model": "base",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "a", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
    }


async def test_how_many_tokens_without_a_limit(api: Api) -> None:
    assert (await complete(api)).json()["usage"]["completion_tokens"] == 16
    assert (await chat(api, max_tokens=None)).json()["usage"]["total_tokens"] == 512
    short = await chat(api, max_tokens=None, max_completion_tokens=3)
    assert short.json()["usage"]["completion_tokens"] == 3


async def test_parts_of_a_content_are_lines(api: Api) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert (await chat(api, parts)).json()["choices"][0]["message"]["content"] == "a\nba"


async def test_every_form_of_prompts_and_n(api: Api) -> None:
    for prompt in (["ab", "c"], [[97, 98], [99]]):
        choices = (await complete(api, prompt=prompt, n=2, max_tokens=2)).json()["choices"]
        assert [choice["text"] for choice in choices] == ["ab", "ab", "cc", "cc"]
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    one = (await complete(api, prompt=[97, 98], max_tokens=2)).json()
    assert one["choices"][0]["text"] == "ab"
    usage = (await complete(api, prompt=["ab", "c"], n=2, max_tokens=2)).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 8)


@pytest.mark.parametrize(
    ("body", "adapter"),
    [
        ({"model": "base"}, None),
        ({"model": "base:"}, None),
        ({"model": "base:sql"}, "sql"),
        ({"model": "sql"}, "sql"),
        ({"model": "base", "lora_path": "json"}, "json"),
        ({"model": "base:", "lora_path": "json"}, "json"),
        ({"model": "sql", "lora_path": "json"}, "sql"),
        ({"model": "base:sql", "lora_path": "nobody"}, "sql"),
        ({"model": "sql", "lora_path": None}, "sql"),
    ],
)
async def test_which_adapter(api: Api, body: dict[str, Any], adapter: str | None) -> None:
    for ask in (complete, chat):
        reply = await ask(api, **body)
        assert reply.status_code == 200
        assert reply.json()["model"] == body["model"]
        assert api.engine.seen[-1].adapter == adapter


@pytest.mark.parametrize("model", ["nobody", "base:nobody", "other:sql"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_is_not_there(api: Api, model: str, stream: bool) -> None:
    for ask in (complete, chat):
        reply = await ask(api, model=model, stream=stream)
        assert reply.status_code == 404
        assert f"{model!r} does not exist" in message(reply)
        error = reply.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")


async def test_a_refusal_that_is_not_the_models_fault(api: Api) -> None:
    reply = await complete(api, model="sql", regex="(")
    assert reply.status_code == 400
    assert message(reply) == "regex: '(' is no regular expression"
    assert reply.json()["error"]["param"] == "regex"
    reply = await complete(api, lora_path="nobody")
    assert reply.status_code == 400
    assert "lora_path" in message(reply)
    assert "'nobody' has never been loaded" in message(reply)
    assert reply.json()["error"]["param"] == "lora_path"


async def test_sampling_fields_arrive(api: Api) -> None:
    sent = {
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["x", "y"],
        "seed": 7,
        "logit_bias": {"15": -3},
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "top_k": 11,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "stop_token_ids": [5],
        "stop_regex": "z+",
        "no_stop_trim": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "ebnf": 'root ::= "a"',
    }
    for ask in (complete, chat):
        assert (await ask(api, **sent, max_tokens=9)).status_code == 200
        params = api.engine.seen[-1].sampling
        renamed = {"seed": "sampling_seed", "min_tokens": "min_new_tokens"}
        got = {name: getattr(params, renamed.get(name, name)) for name in sent}
        assert got == sent | {
            "stop": ("x", "y"),
            "logit_bias": {15: -3.0},
            "stop_token_ids": (5,),
            "stop_regex": ("z+",),
        }
        assert params.max_new_tokens == 9
    assert (await complete(api)).status_code == 200
    assert api.engine.seen[-1].sampling.temperature == 1


async def test_what_a_request_does_not_say_the_model_recommends(make_api: MakeApi) -> None:
    recommended = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1}
    api = await make_api(sampling_defaults=recommended | {"repetition_penalty": 1.05})

    def got() -> dict[str, float]:
        return {name: getattr(api.engine.seen[-1].sampling, name) for name in recommended}

    for ask in (complete, chat):
        assert (await ask(api)).status_code == 200
        assert got() == recommended
        assert api.engine.seen[-1].sampling.repetition_penalty == 1.05
        assert (await ask(api, temperature=0, top_k=-1, min_p=None)).status_code == 200
        # Null counts as not given; -1 is every token of the vocabulary.
        assert got() == recommended | {"temperature": 0, "top_k": -1}
    # The native API has defaults of its own.
    await api.generate(text="a")
    assert got() == {"temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0}


async def test_a_prompt_that_is_too_long_is_recognised(api: Api) -> None:
    """Clients look for the code or the words, and send the prompt elsewhere."""
    for reply in (
        await complete(api, prompt="a" * 600),
        await complete(api, prompt=[97] * 600),
        await chat(api, "a" * 600),
    ):
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "context_length_exceeded"
        assert "allowed: at most 511" in message(reply)
        assert "maximum context length is 512" in message(reply)


async def test_n_has_a_seed_for_each(api: Api) -> None:
    await chat(api, n=3, seed=5)
    (seen,) = api.engine.seen
    assert [seen.seed(sample) for sample in range(3)] == [5, 6, 7]


async def test_response_formats(api: Api) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    text = {"type": "text", "json_schema": None}
    wanted = [(text, None), ({"type": "json_object"}, {"type": "object"})]
    for value, expected in [*wanted, (form, schema)]:
        assert (await chat(api, response_format=value)).status_code == 200
        source = api.engine.seen[-1].sampling.json_schema
        assert (None if source is None else json.loads(source)) == expected


NEUTRAL = {
    "user": "me",
    "safety_identifier": "me",
    "prompt_cache_key": "k",
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "best_of": 1,
    "made_up": None,
}


async def test_neutral_fields(api: Api) -> None:
    chats = {
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "none",
        "modalities": ["text"],
    }
    assert (await complete(api, **NEUTRAL, suffix="")).status_code == 200
    assert (await chat(api, **NEUTRAL, **chats)).status_code == 200
    plain = (await chat(api)).json()["choices"]
    assert (await chat(api, **NEUTRAL, **chats)).json()["choices"] == plain


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"made_up": 1}, "made_up", "there is no such field here"),
    ({"stream_options": {"x": 1}}, "stream_options.x", "there is no such field"),
    ({"stream_options": {"include_usage": "yes"}}, "stream_options", "include_usage"),
    ({"model": None}, "model", "is required"),
    ({"model": ""}, "model", "model is empty"),
    ({"model": 5}, "model", "got 5"),
    ({"temperature": "hot"}, "temperature", 'must be a number; got "hot"'),
    ({"temperature": -1}, "temperature", "temperature is -1"),
    ({"top_p": 2}, "top_p", "top_p is 2"),
    ({"n": 0}, "n", "n is 0"),
    ({"best_of": 2}, "best_of", "best_of is 2; allowed: n (1)"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens is -1"),
    ({"max_tokens": 2, "min_tokens": 3}, "min_tokens", "at most max_tokens (2)"),
    ({"seed": -1}, "seed", "seed is -1"),
    ({"stop": ""}, "stop", "stop is ''"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias"),
    ({"logit_bias": {"999": 1}}, "logit_bias", "[0, 256]"),
    ({"regex": "a", "ebnf": "b"}, "ebnf", "regex and ebnf exclude each other"),
    (
        {"regex": "a", "response_format": {"type": "json_object"}},
        "regex",
        "response_format and regex exclude each other",
    ),
    ({"response_format": {"type": "xml"}}, "response_format.type", '"xml"'),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "null"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "null",
    ),
    ({"response_format": {"type": "text", "x": 1}}, "response_format.x", "not supported"),
]

COMPLETION_REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "is required"),
    ({"prompt": ""}, "prompt", "prompt is ''"),
    ({"prompt": []}, "prompt", "prompt is an empty list"),
    ({"prompt": ["a", 5]}, "prompt", "prompt[1] is 5"),
    ({"prompt": [[1], []]}, "prompt", "prompt[1] is an empty list"),
    ({"prompt": [999]}, "prompt", "[0, 256]"),
    ({"prompt": {"a": 1}}, "prompt", "must be a string"),
    ({"prompt": "a" * 513}, "prompt", "513"),
    ({"logprobs": -1}, "logprobs", "logprobs is -1"),
    ({"logprobs": True}, "logprobs", "must be an integer"),
    ({"suffix": "x"}, "suffix", "must be empty"),
    ({"tools": []}, "tools", "there is no such field"),
]

CHAT_REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "messages is empty"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages", "no token"),
    ({"messages": "hi"}, "messages", "must be a list"),
    ({"messages": [5]}, "messages", "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
    ({"messages": [{"role": 5, "content": "a"}]}, "messages[0].role", "is 5"),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "is required"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "is 5"),
    ({"messages": [{"role": "function", "content": "a"}]}, "messages[0].role", "allowed: tool"),
    (
        {"messages": [{"role": "user", "content": "a", "tool_calls": []}]},
        "messages[0].tool_calls",
        "not supported",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
        "image_url",
    ),
    ({"messages": [{"role": "user", "content": "a" * 600}]}, "messages", "600"),
    ({"max_completion_tokens": 3}, "max_tokens", "give one of them"),
    ({"max_tokens": None, "max_completion_tokens": -3}, "max_completion_tokens", "is -3"),
    ({"top_logprobs": 2}, "top_logprobs", "only allowed with logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "top_logprobs is -1"),
    ({"logprobs": 1}, "logprobs", "must be true or false"),
    ({"tool_choice": "auto"}, "tool_choice", "only allowed with tools"),
    ({"modalities": ["audio"]}, "modalities", "modalities"),
    ({"echo": True}, "echo", "there is no such field"),
    ({"functions": []}, "functions", "there is no such field"),
]


def check_refusal(reply: httpx.Response, param: str, words: str) -> None:
    assert reply.status_code == 400, reply.text
    assert words in message(reply)
    assert "sampling_params" not in message(reply)
    assert reply.json()["error"]["param"] == param
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("body", "param", "words"), [*REFUSALS, *COMPLETION_REFUSALS])
async def test_a_refused_completion(api: Api, body: dict[str, Any], param: str, words: str) -> None:
    for stream in (False, True):
        check_refusal(await complete(api, stream=stream, **body), param, words)
    assert not api.engine.seen


@pytest.mark.parametrize(("body", "param", "words"), [*REFUSALS, *CHAT_REFUSALS])
async def test_a_refused_chat(api: Api, body: dict[str, Any], param: str, words: str) -> None:
    for stream in (False, True):
        check_refusal(await chat(api, stream=stream, **body), param, words)
    assert not api.engine.seen


def nested(depth: int, inner: str) -> str:
    return '{"a":' * depth + inner + "}" * depth


@pytest.mark.parametrize("depth", [200, 600, 1000])
async def test_deep_values(api: Api, depth: int) -> None:
    deep = nested(depth, "1")
    schema = f'{{"type": "json_schema", "json_schema": {{"name": "x", "schema": {deep}}}}}'
    for field, value in (
        ("metadata", deep),
        ("temperature", deep),
        ("response_format", schema),
        ("messages", f'[{{"role": "user", "content": {deep}}}]'),
        ("messages", f'[{{"role": "user", "content": [{deep}]}}]'),
        ("messages", f'[{{"role": "user", "content": "a", "x": {deep}}}]'),
    ):
        messages = "" if field == "messages" else '"messages": [{"role": "user", "content": "a"}],'
        data = f'{{"model": "base", "max_tokens": 1, {messages} "{field}": {value}}}'
        reply = await api.http.post("/v1/chat/completions", content=data)
        assert reply.status_code in (200, 400), (field, reply.text)


async def test_the_schema_of_the_api_has_no_loose_ends(api: Api) -> None:
    document = (await api.http.get("/openapi.json")).json()
    for path in ("/v1/completions", "/v1/chat/completions"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert "#/$defs" not in json.dumps(body)
        assert "include_usage" in json.dumps(body)


async def test_logprobs_of_a_chat(api: Api) -> None:
    reply = await chat(api, "é", max_tokens=2, logprobs=True, top_logprobs=2)
    first, second = reply.json()["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["bytes"]) == ("bytes:\\xc3", [0xC3])
    assert (second["token"], second["bytes"]) == ("bytes:\\xa9", [0xA9])
    assert first["logprob"] == -0.5
    assert [top["bytes"] for top in first["top_logprobs"]] == [[0], [1]]
    bare = await chat(api, logprobs=True)
    assert [item["top_logprobs"] for item in bare.json()["choices"][0]["logprobs"]["content"]] == [
        []
    ] * 4


async def test_logprobs_of_a_completion(api: Api) -> None:
    reply = await complete(api, prompt="aé", max_tokens=4, logprobs=1)
    assert reply.json()["choices"][0]["logprobs"] == {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9", "a"],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [
            {"\x00": -0.5, "a": -0.5},
            {"\x00": -0.5, "bytes:\\xc3": -0.5},
            {"\x00": -0.5, "bytes:\\xa9": -0.5},
            {"\x00": -0.5, "a": -0.5},
        ],
        "text_offset": [0, 1, 1, 2],
    }


async def test_echo(api: Api) -> None:
    for prompt in (["ab", "é"], [[97, 98], [0xC3, 0xA9]]):
        reply = await complete(api, prompt=prompt, max_tokens=2, n=2, echo=True, logprobs=0)
        choices = reply.json()["choices"]
        assert [choice["text"] for choice in choices] == ["abab", "abab", "éé", "éé"]
        assert choices[0]["logprobs"]["tokens"] == ["a", "b", "a", "b"]
        assert choices[0]["logprobs"]["text_offset"] == [0, 1, 2, 3]
        assert choices[2]["logprobs"]["text_offset"] == [0, 0, 1, 1]


STREAMS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"stop": ["cda", "zz"]},
    {"stop": ["cda"], "no_stop_trim": True},
    {"max_tokens": 1},
    {"model": "sql", "n": 2},
]


@pytest.mark.parametrize("options", STREAMS, ids=str)
@pytest.mark.parametrize("logprobs", [False, True])
async def test_a_stream_adds_up(make_api: MakeApi, options: dict[str, Any], logprobs: bool) -> None:
    api: Api = await make_api(step_s=0.002)
    text = "abé€cd"
    completion = {"prompt": [text, "x"], "max_tokens": 25} | options
    talk = {"content": text, "max_tokens": 25} | options
    if logprobs:
        completion |= {"logprobs": 1, "echo": True}
        talk |= {"logprobs": True, "top_logprobs": 1}
    for ask, body in ((complete, completion), (chat, talk)):
        whole = (await ask(api, **body)).json()
        chunks = events(await ask(api, **body, stream=True))
        pieces = added_up(chunks)
        assert sorted(pieces) == list(range(len(whole["choices"])))
        for choice in whole["choices"]:
            told = choice["message"]["content"] if "message" in choice else choice["text"]
            piece = pieces[choice["index"]]
            assert piece["text"] == told
            assert piece["finish_reason"] == choice["finish_reason"]
            wanted = {name: value or [] for name, value in (choice["logprobs"] or {}).items()}
            assert piece["logprobs"] == wanted
        assert all("\ufffd" not in json.dumps(chunk, ensure_ascii=False) for chunk in chunks)


async def test_chunks_of_a_chat(api: Api) -> None:
    chunks = events(await chat(api, max_tokens=2, stream=True))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in choice["delta"] for choice in choices[1:])
    assert choices[-1] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)


async def test_usage_at_the_end_of_a_stream(api: Api) -> None:
    for ask in (complete, chat):
        body: dict[str, Any] = {"n": 2, "max_tokens": 3}
        options = {"stream_options": {"include_usage": True}}
        whole = (await ask(api, **body)).json()
        chunks = events(await ask(api, **body, **options, stream=True))
        assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == whole["usage"]
        # Without a stream the options have nothing to change.
        assert (await ask(api, **body, **options)).json()["usage"] == whole["usage"]


async def test_a_failure(make_api: MakeApi) -> None:
    api: Api = await make_api(fail_token=ord("x"))
    for ask, body in ((complete, {"prompt": ["abx", "abcdefgh"]}), (chat, {"content": "abx"})):
        reply = await ask(api, **body)
        assert reply.status_code == 500
        assert message(reply) == "out of memory"
        seen = events(await ask(api, **body, stream=True))
        assert seen[-1]["error"]["message"] == "out of memory"
        assert all("error" not in event for event in seen[:-1])
    while api.client.num_open:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_aborted_call_is_an_error(make_api: MakeApi, stream: bool) -> None:
    api: Api = await make_api(step_s=0.005)
    call = asyncio.create_task(chat(api, n=2, max_tokens=400, stream=stream))
    while api.engine.num_running < 2:
        assert not call.done()
        await asyncio.sleep(0.001)
    (group,) = (rid for rid, call in api.client._labels.items() if len(call.labels[rid]) == 2)
    aborted = await api.http.post("/abort_request", json={"rid": group})
    assert aborted.json() == {"aborted": 2}
    reply = await call
    if stream:
        assert "aborted" in events(reply)[-1]["error"]["message"]
    else:
        assert reply.status_code == 400
        assert "aborted" in message(reply)


async def test_a_large_body(api: Api) -> None:
    prompts = ["abcdefgh" * 60] * 50
    reply = await complete(api, prompt=prompts, max_tokens=1)
    assert [choice["text"] for choice in reply.json()["choices"]] == ["a"] * 50


async def test_a_model_without_a_chat_template(api: Api, tmp_path: Path) -> None:
    api.client.tokenizer = Tokenizer.load(save_byte_tokenizer(tmp_path))
    reply = await chat(api)
    assert reply.status_code == 400
    assert "no chat template" in message(reply)
    assert reply.json()["error"]["param"] == "messages"
