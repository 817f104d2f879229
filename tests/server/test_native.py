"""POST /generate and /abort_request: the contract's replies and refusals, streams included."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx
import orjson
import pytest

from lorikeet.server import native
from lorikeet.server.replies import frame
from tests.server.conftest import Api, MakeApi

pytestmark = pytest.mark.anyio

FOUR = {"max_new_tokens": 4}


def message(response: httpx.Response) -> str:
    """The message of a refusal, after checking that it has the form of one."""
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error["message"]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, after checking their form."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(item.startswith("data: {") and "\n" not in item for item in frames[:-2])
    return [json.loads(item.removeprefix("data: ")) for item in frames[:-2]]


async def test_one_text_is_answered_by_one_object(api: Api) -> None:
    reply = await api.generate(text="ab", sampling_params=FOUR, rid="mine")
    assert reply.status_code == 200
    body = reply.json()
    latency = body["meta_info"].pop("e2e_latency")
    assert 0 < latency < 10
    assert body == {
        "text": "abab",
        "output_ids": [97, 98, 97, 98],
        "meta_info": {
            "id": "mine",
            "finish_reason": {"type": "length", "length": 4},
            "prompt_tokens": 2,
            "completion_tokens": 4,
            "cached_tokens": 1,
            "lora_name": None,
        },
    }


async def test_token_ids_are_as_good_as_text(api: Api) -> None:
    reply = (await api.generate(input_ids=[99, 100], sampling_params=FOUR)).json()
    assert reply["text"] == "cdcd"
    assert api.engine.seen[0].prompt_token_ids == [99, 100]


async def test_put_is_as_good_as_post(api: Api) -> None:
    reply = await api.http.put("/generate", json={"text": "ab", "sampling_params": FOUR})
    assert reply.json()["text"] == "abab"
    refused = await api.http.delete("/generate")
    assert refused.status_code == 405
    assert set(refused.headers["allow"].split(", ")) == {"POST", "PUT"}


async def test_a_list_is_answered_in_its_order_each_with_its_adapter(api: Api) -> None:
    reply = await api.generate(
        text=["aa", "b", "c"],
        lora_path=["sql", None, "json"],
        sampling_params=[{"max_new_tokens": 9}, {"max_new_tokens": 1}, {"max_new_tokens": 3}],
    )
    assert [item["text"] for item in reply.json()] == ["a" * 9, "b", "ccc"]
    assert [item["meta_info"]["lora_name"] for item in reply.json()] == ["sql", None, "json"]
    assert [request.adapter for request in api.engine.seen] == ["sql", None, "json"]


async def test_a_list_of_one_is_answered_by_a_list(api: Api) -> None:
    for prompts in ({"text": ["ab"]}, {"input_ids": [[97, 98]]}):
        reply = (await api.generate(**prompts, sampling_params=FOUR)).json()
        assert [item["text"] for item in reply] == ["abab"]


async def test_one_adapter_name_is_for_all(api: Api) -> None:
    await api.generate(text=["a", "b"], lora_path="json", sampling_params=FOUR)
    assert [request.adapter for request in api.engine.seen] == ["json", "json"]


async def test_n_completions_stand_side_by_side(api: Api) -> None:
    sampling = {"n": 2, "max_new_tokens": 2}
    one = (await api.generate(text="a", sampling_params=sampling, rid="r")).json()
    assert [item["text"] for item in one] == ["aa", "aa"]
    assert len({item["meta_info"]["id"] for item in one}) == 2
    many = (await api.generate(text=["a", "b"], sampling_params=sampling)).json()
    assert [item["text"] for item in many] == ["aa", "aa", "bb", "bb"]


async def test_stop_strings_and_stop_tokens(api: Api) -> None:
    reply = (await api.generate(text="hello ", sampling_params={"stop": ["lo"]})).json()
    assert reply["text"] == "hel"
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": "lo"}
    reply = (await api.generate(text="hello", sampling_params={"stop_token_ids": [111]})).json()
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": 111}


async def test_logprobs(api: Api) -> None:
    reply = await api.generate(
        text="ab",
        sampling_params={"max_new_tokens": 2},
        return_logprob=True,
        logprob_start_len=1,
        top_logprobs_num=2,
        return_text_in_logprobs=True,
    )
    meta = reply.json()["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.5, 97, "a"], [-0.5, 98, "b"]]
    assert meta["input_token_logprobs"] == [[-0.5, 98, "b"]]
    assert [[token for _, token, _ in top] for top in meta["output_top_logprobs"]] == [[0, 1]] * 2


async def test_unknown_keys_at_the_top_and_null_are_ignored(api: Api) -> None:
    reply = await api.generate(
        text="a",
        sampling_params=None,
        image_data=None,
        made_up={"x": 1},
        stream=None,
        rid=None,
        lora_path=None,
        return_logprob=None,
        logprob_start_len=None,
        top_logprobs_num=None,
    )
    assert reply.status_code == 200
    assert reply.json()["meta_info"]["completion_tokens"] == 128


REFUSALS: list[tuple[Any, str]] = [
    ({}, "exactly one of text and input_ids"),
    ({"text": "a", "input_ids": [1]}, "exactly one of text and input_ids"),
    ({"text": 5}, "text: must be a string or a list of strings; got 5"),
    ({"text": ["a", 5]}, "text[1]: must be a string or a list of strings; got 5"),
    ({"text": ""}, "text"),
    ({"text": []}, "text is an empty list"),
    ({"text": ["a", ""]}, "text[1]"),
    ({"input_ids": []}, "input_ids is an empty list"),
    ({"input_ids": [[1], []]}, "input_ids[1] is an empty list"),
    ({"input_ids": "1 2"}, "input_ids: must be a list of token ids"),
    ({"input_ids": [1, "2"]}, "input_ids[1]: must be a list of token ids"),
    ({"input_ids": [1, 2.5]}, "input_ids[1]: must be a list of token ids"),
    ({"input_ids": [1, True]}, "input_ids[1]: must be a list of token ids"),
    ({"input_ids": [[1], [True]]}, "input_ids[1][0]: must be a list of token ids"),
    ({"input_ids": [1, 257]}, "allowed: token ids in [0, 256]"),
    ({"input_ids": [-1]}, "allowed: token ids in [0, 256]"),
    ({"text": "a", "stream": "true"}, 'stream: must be true or false; got "true"'),
    ({"text": "a", "stream": 1}, "stream: must be true or false; got 1"),
    ({"text": "a", "sampling_params": 3}, "sampling_params: must be an object"),
    ({"text": "a", "sampling_params": {"temprature": 1}}, "temprature"),
    ({"text": "a", "sampling_params": {"temperature": "hot"}}, "sampling_params.temperature"),
    ({"text": "a", "sampling_params": {"temperature": -1}}, "sampling_params.temperature is -1"),
    ({"text": "a", "sampling_params": {"top_p": 2}}, "sampling_params.top_p is 2"),
    ({"text": "a", "sampling_params": {"n": 0}}, "sampling_params.n is 0"),
    ({"text": "a", "sampling_params": {"regex": "a", "ebnf": "b"}}, "exclude each other"),
    ({"text": "a", "sampling_params": {"regex": "("}}, "regex"),
    ({"text": "a", "sampling_params": [{}, {}]}, "sampling_params has 2 entries for 1 prompt"),
    ({"text": "a", "lora_path": 7}, "lora_path: must be an adapter's name, null"),
    ({"text": "a", "lora_path": ["json", None]}, "lora_path has 2 entries for 1 prompt"),
    ({"text": ["a", "b", "c"], "lora_path": ["json"]}, "lora_path has 1 entries for 3 prompts"),
    ({"text": "a", "lora_path": "nobody"}, "'nobody' has never been loaded; loaded: json, sql"),
    ({"text": ["a", "b"], "lora_path": ["json", "nobody"]}, "'nobody' has never been loaded"),
    ({"text": "a", "rid": 5}, "rid: must be a string"),
    ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid"),
    ({"text": "a", "return_logprob": "yes"}, "return_logprob: must be true, false"),
    ({"text": "a", "return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num"),
    ({"text": "a" * 513}, "the prompt has 513 tokens; allowed: at most 511"),
    ([1, 2], "the body must be a JSON object; got [1,2]"),
    ("text", 'the body must be a JSON object; got "text"'),
    (None, "the body must be a JSON object; got null"),
]


@pytest.mark.parametrize(("body", "wanted"), REFUSALS)
@pytest.mark.parametrize("stream", [False, True])
async def test_refused_before_any_work(api: Api, body: Any, wanted: str, stream: bool) -> None:
    if stream and isinstance(body, dict):
        body = {"stream": True} | body
    reply = await api.http.post("/generate", content=orjson.dumps(body))
    assert reply.status_code == 400, reply.text
    assert wanted in message(reply)
    assert (await api.generate(text="a", sampling_params=FOUR)).status_code == 200


@pytest.mark.parametrize(
    "data", [b"", b"{", b"text=a", b'{"text": "\\ud800"}', b"\xff\xfe", b"NaN"]
)
async def test_a_body_that_is_not_json(api: Api, data: bytes) -> None:
    reply = await api.http.post("/generate", content=data)
    assert reply.status_code == 400
    assert "the body is not valid JSON" in message(reply)


async def test_the_refused_field_is_named_apart(api: Api) -> None:
    reply = await api.generate(text="a", stream="yes")
    assert reply.json()["error"]["param"] == "stream"
    assert reply.json()["error"]["type"] == "invalid_request_error"


async def test_a_stream_is_cumulative(make_api: MakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = threading.Semaphore(1)

    def next_step(content: object) -> bytes:
        steps.release()  # the next token comes when this one is written
        return frame(content)

    monkeypatch.setattr(native, "frame", next_step)
    api: Api = await make_api(steps=steps)
    reply = await api.generate(text="ab", sampling_params={"max_new_tokens": 6}, stream=True)
    seen = events(reply)
    assert len(seen) >= 3
    texts = [event["text"] for event in seen]
    assert texts == ["ababab"[: len(text)] for text in texts]
    assert texts[-1] == "ababab"
    assert all(len(event["output_ids"]) == len(event["text"]) for event in seen)
    assert all("index" not in event for event in seen)
    ends = [event["meta_info"]["finish_reason"] for event in seen]
    assert ends[:-1] == [None] * (len(ends) - 1)
    assert ends[-1] == {"type": "length", "length": 6}


async def test_events_of_a_batch_have_an_index(api: Api) -> None:
    reply = await api.generate(
        text=["a", "b"], sampling_params={"max_new_tokens": 3, "n": 2}, stream=True
    )
    last = {event["index"]: event for event in events(reply)}
    assert [last[index]["text"] for index in range(4)] == ["aaa", "aaa", "bbb", "bbb"]
    one = await api.generate(text=["a"], sampling_params=FOUR, stream=True)
    assert {event["index"] for event in events(one)} == {0}


async def test_half_a_character_is_never_streamed(make_api: MakeApi) -> None:
    api: Api = await make_api(step_s=0.005)
    reply = await api.generate(text="é€", sampling_params={"max_new_tokens": 10}, stream=True)
    seen = events(reply)
    assert all("\ufffd" not in event["text"] for event in seen)
    assert seen[-1]["text"] == "é€é€"


async def test_a_refused_request_of_a_batch_aborts_the_others(make_api: MakeApi) -> None:
    api: Api = await make_api(step_s=0.005)
    reply = await api.generate(
        text=["a", "b"],
        lora_path=[None, "nobody"],
        sampling_params={"max_new_tokens": 500},
        stream=True,
        rid=["first", "second"],
    )
    assert reply.status_code == 400
    while api.client.num_open:
        await asyncio.sleep(0.005)
    assert api.engine.aborted == [0]


async def test_one_that_fails_later_fails_in_its_place(make_api: MakeApi) -> None:
    api: Api = await make_api(fail_token=ord("x"))
    reply = await api.generate(text="ax", sampling_params=FOUR)
    assert reply.status_code == 500
    assert message(reply) == "out of memory"
    reply = await api.generate(text=["ax", "a"], sampling_params=FOUR)
    assert reply.status_code == 200
    failed, whole = reply.json()
    assert failed["meta_info"]["finish_reason"] == {
        "type": "abort",
        "message": "out of memory",
        "status_code": 500,
    }
    assert whole["text"] == "aaaa"
    assert whole["meta_info"]["finish_reason"]["type"] == "length"
    assert (await api.generate(text="a", sampling_params=FOUR)).status_code == 200


async def test_one_that_fails_later_is_an_error_event(make_api: MakeApi) -> None:
    api: Api = await make_api(fail_token=ord("x"))
    one = events(await api.generate(text="ax", sampling_params=FOUR, stream=True))
    assert one[-1]["error"]["message"] == "out of memory"
    batch = events(await api.generate(text=["ax", "a"], sampling_params=FOUR, stream=True))
    failed = [event for event in batch if "error" in event]
    assert [event["index"] for event in failed] == [0]
    assert [event["text"] for event in batch if event["index"] == 1][-1] == "aaaa"


async def test_a_hundred_calls_at_a_time(make_api: MakeApi) -> None:
    api: Api = await make_api(step_s=0.005)

    async def one(number: int) -> str:
        body = {"text": f"{number:03}", "sampling_params": {"max_new_tokens": 6}}
        if number % 2:
            return events(await api.generate(**body, stream=True))[-1]["text"]
        return (await api.generate(**body)).json()["text"]

    texts = await asyncio.gather(*(one(number) for number in range(100)))
    assert texts == [f"{number:03}" * 2 for number in range(100)]


async def test_a_large_body_is_read_aside(api: Api) -> None:
    prompts = [chr(97 + n % 26) * 500 for n in range(60)]
    reply = await api.generate(text=prompts, sampling_params={"max_new_tokens": 1})
    assert [item["text"] for item in reply.json()] == [prompt[0] for prompt in prompts]
    prompts[59] = ""
    assert (await api.generate(text=prompts)).status_code == 400


async def test_an_id_in_use_is_refused(make_api: MakeApi) -> None:
    api: Api = await make_api(step_s=0.01)
    first = asyncio.create_task(
        api.generate(text="a", sampling_params={"max_new_tokens": 20}, rid="r")
    )
    while not api.client.num_open:
        await asyncio.sleep(0.001)
    reply = await api.generate(text="b", rid="r")
    assert reply.status_code == 400
    assert "'r' is already in use" in message(reply)
    assert (await first).json()["text"] == "a" * 20


async def test_abort_one(make_api: MakeApi) -> None:
    api: Api = await make_api(step_s=0.01)
    calls = {
        rid: asyncio.create_task(
            api.generate(text="a", sampling_params={"max_new_tokens": 50}, rid=rid)
        )
        for rid in ("r", "other")
    }
    while api.engine.num_running < 2:
        await asyncio.sleep(0.001)
    reply = await api.http.post("/abort_request", json={"rid": "r"})
    assert (reply.status_code, reply.json()) == (200, {"aborted": 1})
    ended = await calls["r"]
    assert ended.status_code == 200
    assert ended.json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(ended.json()["text"]) < 50
    assert len((await calls["other"]).json()["text"]) == 50
    late = await api.http.post("/abort_request", json={"rid": "r"})
    assert (late.status_code, late.json()) == (200, {"aborted": 0})


async def test_abort_means_the_whole_call_that_was_given_the_id(make_api: MakeApi) -> None:
    api: Api = await make_api(step_s=0.01)
    sampling = {"max_new_tokens": 300, "n": 2}
    call = asyncio.create_task(api.generate(text=["a", "b"], sampling_params=sampling, rid="r"))
    named = asyncio.create_task(
        api.generate(text=["a", "b"], sampling_params=sampling, rid=["x", "y"])
    )
    while api.engine.num_running < 8:
        await asyncio.sleep(0.001)
    assert (await api.http.post("/abort_request", json={"rid": "r"})).json() == {"aborted": 4}
    assert (await api.http.post("/abort_request", json={"rid": "y"})).json() == {"aborted": 2}
    assert {item["meta_info"]["finish_reason"]["type"] for item in (await call).json()} == {"abort"}
    while api.client.num_open > 2:  # until the ends of "y" have arrived, they count as open
        await asyncio.sleep(0.001)
    assert (await api.http.post("/abort_request", json={"abort_all": True})).json() == {
        "aborted": 2
    }
    assert len((await named).json()) == 4


async def test_abort_in_a_stream_ends_it(make_api: MakeApi) -> None:
    api: Api = await make_api(step_s=0.01)
    call = asyncio.create_task(
        api.generate(text="a", sampling_params={"max_new_tokens": 300}, rid="r", stream=True)
    )
    while not api.engine.num_running:
        await asyncio.sleep(0.001)
    await api.http.post("/abort_request", json={"abort_all": True})
    last = events(await call)[-1]
    assert last["meta_info"]["finish_reason"]["type"] == "abort"


@pytest.mark.parametrize(
    ("body", "wanted"),
    [({}, "rid"), ({"rid": 5}, "rid: must be a string"), ({"abort_all": 1}, "abort_all")],
)
async def test_abort_refuses(api: Api, body: dict[str, Any], wanted: str) -> None:
    reply = await api.http.post("/abort_request", json=body)
    assert reply.status_code == 400
    assert wanted in message(reply)


async def test_death_in_the_middle(make_api: MakeApi) -> None:
    api: Api = await make_api(step_s=0.01)
    sampling = {"max_new_tokens": 500}
    whole = asyncio.create_task(api.generate(text="a", sampling_params=sampling))
    stream = asyncio.create_task(
        api.generate(text=["a", "b"], sampling_params=sampling, stream=True)
    )
    while api.engine.num_steps < 5:
        await asyncio.sleep(0.001)
    api.engine.die()
    reply = await whole
    assert reply.status_code == 503
    assert "the engine process has ended" in message(reply)
    seen = events(await stream)
    assert "the engine process has ended" in seen[-1]["error"]["message"]
    assert sum("error" in event for event in seen) == 1
    late = await api.generate(text="a", sampling_params=sampling, stream=True)
    assert late.status_code == 503
