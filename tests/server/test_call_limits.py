"""What a call may ask for, over HTTP: refused with a reason, before anything is done, and others are none the worse."""

from __future__ import annotations

import asyncio
import itertools
import re
from typing import Any

import orjson
import pytest

from lorikeet.errors import RequestError
from lorikeet.server.openai.bodies import ChatBody, CompletionBody, EmbeddingBody
from lorikeet.server.protocol import Body, GenerateBody, parse_body
from lorikeet.server.reading import MAX_CONTAINERS
from lorikeet.text.completion import Completion
from tests.server.conftest import Api, MakeApi
from tests.server.test_native import events, message

pytestmark = pytest.mark.anyio

NATIVE, CHAT = "/generate", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "ab"}]
MANY = 200_000


def deep(levels: int) -> Any:
    """What :func:`encode` makes an object of, which no writer of JSON would."""
    return f"deep {levels}"


def encode(body: object) -> bytes:
    def nested(match: re.Match[bytes]) -> bytes:
        levels = int(match[1])
        return b'{"a":' * levels + b"{}" + b"}" * levels

    return re.sub(rb'"deep (\d+)"', nested, orjson.dumps(body))


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (
            NATIVE,
            {"text": ["a"] * 4000, "sampling_params": {"n": 1024}},
            "at most 2048 completions",
        ),
        (NATIVE, {"text": ["a"] * 3, "sampling_params": {"n": 1000}}, "at most 2048 completions"),
        (NATIVE, {"text": "a", "sampling_params": {"n": 1025}}, r"an integer in \[1, 1024\]"),
        (NATIVE, {"text": "a", "rid": "r" * 129}, "rid has 129 characters .* at most 128"),
        (NATIVE, {"text": "a", "rid": "a\nb"}, r"rid is 'a\\nb' and has the character U\+000A"),
        (NATIVE, {"text": "a", "lora_path": "x" * 257}, "lora_path has 257 .* at most 256"),
        (NATIVE, {"text": "a", "lora_path": "x\u2028y"}, r"U\+2028"),
        (NATIVE, {"text": "a", "sampling_params": {"stop": ["a"] * 33}}, "at most 32"),
        (NATIVE, {"text": "a", "sampling_params": {"stop_regex": ["a"] * 9}}, "at most 8"),
        (NATIVE, {"text": "a", "sampling_params": {"stop_regex": "a{99999999}"}}, "is too large"),
        (NATIVE, {"text": "a", "sampling_params": {"json_schema": deep(950)}}, "nested too deeply"),
        (
            NATIVE,
            {"text": "a" * 300, "return_logprob": True, "logprob_start_len": 0}
            | {"top_logprobs_num": 250, "sampling_params": {"n": 9, "max_new_tokens": 1}},
            "at most 262144",
        ),
        (CHAT, {"model": "m" * 300, "messages": MESSAGES}, "model has 300 .* at most 256"),
        (CHAT, {"model": "base:a\x1bb", "messages": MESSAGES}, r"model is 'a\\x1bb'"),
        (
            CHAT,
            {"model": "base", "messages": MESSAGES}
            | {"logit_bias": {str(number): 1 for number in range(301)}},
            "logit_bias has 301 entries; allowed: at most 300",
        ),
        ("/v1/embeddings", {"model": "base", "input": ["a"] * 2049}, "at most 2048 completions"),
    ],
)
async def test_what_is_too_much_is_refused_with_a_reason(
    api: Api, path: str, body: dict[str, Any], words: str
) -> None:
    reply = await api.http.post(path, content=encode(body))
    assert reply.status_code == 400, reply.text[:300]
    with pytest.raises(RequestError, match=words):
        raise RequestError(message(reply))
    assert len(message(reply)) < 500
    assert not api.engine.seen
    assert api.client.num_open == 0


@pytest.mark.parametrize(
    "name", ["tools", "messages", "metadata", "response_format", "tool_choice"]
)
@pytest.mark.parametrize("levels", [400, 950])
async def test_depth_is_never_an_error_of_ours(api: Api, name: str, levels: int) -> None:
    value = deep(levels)
    fields: dict[str, Any] = {"tools": [value], "messages": [value]}
    body = {"model": "base", "messages": MESSAGES} | {name: fields.get(name, value)}
    reply = await api.http.post(CHAT, content=encode(body))
    assert reply.status_code in (200, 400)
    if reply.status_code == 400:
        assert message(reply)


@pytest.mark.parametrize(
    ("model", "name", "bad"),
    [
        (GenerateBody, "text", 1),
        (GenerateBody, "input_ids", "a"),
        (GenerateBody, "input_ids", [None] * 3),
        (GenerateBody, "sampling_params", 1),
        (GenerateBody, "lora_path", 1),
        (GenerateBody, "rid", 1),
        (GenerateBody, "return_logprob", 1),
        (GenerateBody, "logprob_start_len", "a"),
        (GenerateBody, "top_logprobs_num", "a"),
        (ChatBody, "stop", 1),
        (ChatBody, "stop_token_ids", "a"),
        (ChatBody, "stop_regex", 1),
        (ChatBody, "messages", 1),
        (ChatBody, "modalities", 1),
    ],
    ids=str,
)
def test_of_a_list_the_first_wrong_entry_is_reported(
    model: type[Body], name: str, bad: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    validate = model.model_validate

    def count(value: object) -> Body:
        try:
            return validate(value)
        except Exception as error:
            counts.append(error.error_count())  # pyright: ignore[reportAttributeAccessIssue]
            raise

    monkeypatch.setattr(model, "model_validate", count)
    # Of lists a body may have fewer than of other values.
    num = MAX_CONTAINERS - 10 if isinstance(bad, list) else MANY
    body = {"model": "m", "messages": [], name: [bad] * num}
    with pytest.raises(RequestError, match=rf"^{name}\[0\](\[0\])?: must be"):
        parse_body(model, orjson.dumps(body))
    assert counts[0] < 10


@pytest.mark.parametrize("model", [ChatBody, CompletionBody, EmbeddingBody])
def test_of_many_unknown_fields_the_first_is_named(model: type[Body]) -> None:
    body: dict[str, Any] = {"model": "m", "messages": [], "prompt": "a", "input": "a"}
    body = {name: body[name] for name in body if name in model.model_fields}
    unknown = {f"x{number}": 1 for number in range(MANY)}
    with pytest.raises(RequestError, match="x0: there is no such field"):
        parse_body(model, orjson.dumps(body | unknown))


def test_a_quotation_is_short_whatever_it_quotes() -> None:
    for value in (["a" * 10**6] * 10, {"k" * 10**6: deep(500)}, [[["x"] * MANY] * 9] * 9):
        with pytest.raises(RequestError) as caught:
            parse_body(GenerateBody, encode({"stream": value}))
        assert len(str(caught.value)) < 200


# ---- names ----


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("base", "is the name of the base model"),
        ("base:x", "begins with the base model's name and ':'"),
        ("base:", "begins with the base model's name and ':'"),
        ("x\n2026-01-01 00:00:00.000 INFO    server  FORGED", "U+000A"),
        ("x\x1b[2J", "U+001B"),
        ("x\x85y", "U+0085"),
        ("x\u202ey", "U+202E"),
        ("n" * 257, "at most 256"),
    ],
)
@pytest.mark.parametrize("path", ["/load_lora_adapter", "/v1/load_lora_adapter"])
async def test_names_that_no_adapter_gets(api: Api, path: str, name: str, words: str) -> None:
    reply = await api.http.post(path, json={"lora_name": name, "lora_path": "/p"})
    assert reply.status_code == 400
    assert words in reply.text
    assert api.engine.commands == []


async def test_a_path_of_a_load_has_a_length_and_characters(api: Api) -> None:
    for path, words in (("/" * 4097, "at most 4096"), ("/a\nb", "U+000A")):
        body = {"lora_name": "x", "lora_path": path}
        reply = await api.http.post("/load_lora_adapter", json=body)
        assert reply.status_code == 400
        assert words in reply.json()["error_message"]


# ---- ids ----


async def test_two_callers_of_one_rid_over_http(make_api: MakeApi) -> None:
    """The second is refused while the first runs, and gets its own text as soon as the first has left."""
    api: Api = await make_api(step_s=0.005)
    long = {"max_new_tokens": 400}
    first = asyncio.create_task(
        api.generate(text=["first", "other"], rid=["A", "B"], sampling_params=long)
    )
    while api.engine.num_running < 2:
        await asyncio.sleep(0.001)
    for rid in ("A", "B"):
        reply = await api.generate(text="secret", rid=rid)
        assert reply.status_code == 400
        assert f"{rid!r} is already in use" in message(reply)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    reply = await api.generate(text="secret", rid="A", sampling_params={"max_new_tokens": 6})
    assert reply.json()["text"] == "secret"
    assert reply.json()["meta_info"]["id"] == "A"


async def test_one_output_that_cannot_be_taken_ends_its_own_completion(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Completion.add

    def broken(self: Completion, output: Any) -> bool:
        if self.rid == "bad":
            raise ZeroDivisionError("a bug")
        return add(self, output)

    monkeypatch.setattr(Completion, "add", broken)
    sampling = {"max_new_tokens": 3}
    bad = api.generate(text="x", rid="bad", sampling_params=sampling)
    good = api.generate(text="y", rid="good", sampling_params=sampling)
    replies = await asyncio.gather(bad, good)
    assert [reply.status_code for reply in replies] == [500, 200]
    assert "ZeroDivisionError" in message(replies[0])
    assert replies[1].json()["text"] == "yyy"
    while api.client.num_open:
        await asyncio.sleep(0.001)
    assert (await api.generate(text="z", sampling_params=sampling)).json()["text"] == "zzz"


# ---- streams with log-probabilities ----


async def test_a_stream_tells_the_prompts_log_probabilities_once(make_api: MakeApi) -> None:
    api: Api = await make_api(step_s=0.01)
    fields = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    sampling = {"max_new_tokens": 6, "n": 2}
    whole = (await api.generate(text="abc", sampling_params=sampling, **fields)).json()
    reply = await api.generate(text="abc", sampling_params=sampling, stream=True, **fields)
    for index in range(2):
        metas = [event["meta_info"] for event in events(reply) if event["index"] == index]
        assert len(metas) >= 3
        for name in ("input_token_logprobs", "input_top_logprobs"):
            assert metas[0][name] == whole[index]["meta_info"][name]
            assert len(metas[0][name]) == 3
            assert not any(meta[name] for meta in metas[1:])
        last = whole[index]["meta_info"]["output_token_logprobs"]
        assert metas[-1]["output_token_logprobs"] == last
        assert all(
            last[: len(m["output_token_logprobs"])] == m["output_token_logprobs"] for m in metas
        )


async def test_frames_of_many_log_probabilities_grow_by_an_eighth(make_api: MakeApi) -> None:
    api: Api = await make_api(step_s=0.001)
    reply = await api.generate(
        text="ab",
        sampling_params={"max_new_tokens": 200},
        return_logprob=True,
        top_logprobs_num=100,
        stream=True,
    )
    sizes = [101 * len(event["meta_info"]["output_token_logprobs"]) for event in events(reply)]
    assert sizes[-1] == 101 * 200
    large = [size for size in sizes[:-1] if size > 2_000]
    assert all(later >= earlier * 9 // 8 for earlier, later in itertools.pairwise(large))
    assert sum(sizes) < 40 * sizes[-1]
