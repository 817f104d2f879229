"""A live server, started by its command line, against PEFT and against clients that misbehave."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from lorikeet.text.tokenizer import Tokenizer
from tests.e2e.conftest import World
from tests.support.peft_adapters import peft_generate, peft_states
from tests.support.served import served

GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def url(world: World) -> Iterator[str]:
    """Two adapters, two of them in a batch at most."""
    with served(
        f"--model-path {world.model} --enable-lora --lora-paths a={world.adapters['qv']}"
        f" b={world.adapters['big']} --max-loras-per-batch 2 --max-total-tokens 8192"
    ) as url:
        yield url


def post(url: str, **body: object) -> httpx.Response:
    return httpx.post(f"{url}/generate", json=body, timeout=60)


def test_a_base_row_between_two_adapters_equals_peft(url: str, world: World) -> None:
    ids = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
    response = post(
        url,
        input_ids=ids,
        lora_path=["a", None, "b"],
        sampling_params=GREEDY,
        return_logprob=True,
    )
    assert response.status_code == 200
    adapters = [world.adapters["qv"], None, world.adapters["big"]]
    for reply, adapter, prompt in zip(response.json(), adapters, ids, strict=True):
        tokens, logprobs = peft_generate(world.model, adapter, prompt, max_new_tokens=6)
        assert reply["output_ids"] == tokens
        ours = [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]
        assert ours == pytest.approx(logprobs, abs=2e-3)


def test_one_adapter_for_all_prompts(url: str) -> None:
    both = post(url, text=["x", "y"], lora_path="b", sampling_params=GREEDY).json()
    single = post(url, text="y", lora_path="b", sampling_params=GREEDY).json()
    assert both[1]["output_ids"] == single["output_ids"]


def test_a_stream_adds_up_to_the_whole_reply(url: str) -> None:
    whole = post(url, text="hello", lora_path="a", sampling_params=GREEDY | {"max_new_tokens": 30})
    body = {"text": "hello", "lora_path": "a", "stream": True}
    events = []
    with httpx.stream(
        "POST",
        f"{url}/generate",
        json=body | {"sampling_params": GREEDY | {"max_new_tokens": 30}},
        timeout=60,
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    texts = [event["text"] for event in events]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert events[-1]["text"] == whole.json()["text"]
    assert events[-1]["output_ids"] == whole.json()["output_ids"]
    assert [e["meta_info"]["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 1)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"text": "x", "lora_path": "nobody"}, ["nobody", "never been loaded", "a, b"]),
        ({"text": "x", "lora_path": "nobody", "stream": True}, ["nobody", "never been loaded"]),
        ({"text": ["x", "y"], "lora_path": ["a"]}, ["lora_path", "1", "2"]),
        ({"text": ["x", "y"], "lora_path": ["a", "nobody"]}, ["nobody"]),
        ({"input_ids": [1] * 600}, ["600", "512"]),
        ({"input_ids": [99999]}, ["99999", "input_ids"]),
        ({"input_ids": []}, ["input_ids", "empty"]),
        ({"text": ""}, ["text"]),
        ({"text": "x", "input_ids": [1]}, ["text", "input_ids"]),
        ({}, ["text", "input_ids"]),
        ({"text": "x", "sampling_params": {"nonsense": 1}}, ["nonsense", "temperature"]),
        ({"text": "x", "sampling_params": {"regex": "(("}, "stream": True}, ["regex"]),
        ({"text": "x", "sampling_params": {"regex": "a", "ebnf": "b"}}, ["regex", "ebnf"]),
        ({"text": 5}, ["text"]),
    ],
    ids=str,
)
def test_a_bad_request_is_400_and_says_why(url: str, body: dict, words: list[str]) -> None:
    response = post(url, **body)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    for word in words:
        assert word in message


def test_a_body_that_is_not_json(url: str) -> None:
    response = httpx.post(f"{url}/generate", content=b'{"text": "x"', timeout=10)
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_bad_requests_do_not_touch_others(url: str) -> None:
    good = {"text": "steady", "lora_path": "a", "sampling_params": GREEDY | {"max_new_tokens": 40}}
    expected = post(url, **good).json()["output_ids"]
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(post, url, **good) for _ in range(6)]
        refused = [pool.submit(post, url, text="x", lora_path=f"no{i}") for i in range(6)]
        assert [r.result().status_code for r in refused] == [400] * 6
        assert all(r.result().json()["output_ids"] == expected for r in answers)


def running(url: str) -> float:
    info = httpx.get(f"{url}/get_server_info", timeout=10).json()
    state = info["internal_states"][0]
    return state["num_running"] + state["num_waiting"] + state["num_used_pages"]


def wait_until_idle(url: str) -> None:
    deadline = time.monotonic() + 20
    while running(url):
        assert time.monotonic() < deadline, "the engine still works for a client that is gone"
        time.sleep(0.05)


def test_a_disconnect_frees_everything(url: str) -> None:
    body = {
        "text": ["x", "y"],
        "lora_path": "b",
        "stream": True,
        "sampling_params": GREEDY | {"max_new_tokens": 400},
    }
    with httpx.stream("POST", f"{url}/generate", json=body, timeout=60) as response:
        next(response.iter_lines())
    wait_until_idle(url)


def test_abort_request_ends_the_call(url: str) -> None:
    body = {"text": "x", "rid": "mine", "sampling_params": GREEDY | {"max_new_tokens": 500}}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, url, **body)
        # The request is found as soon as it has arrived.
        while not httpx.post(f"{url}/abort_request", json={"rid": "mine"}).json()["aborted"]:
            assert not answer.done()
        reply = answer.result()
    assert reply.json()["meta_info"]["finish_reason"]["type"] == "abort"
    wait_until_idle(url)


def test_models_lists_the_base_and_its_adapters(url: str, world: World) -> None:
    cards = httpx.get(f"{url}/v1/models").json()["data"]
    assert [card["id"] for card in cards] == [str(world.model), "a", "b"]
    assert [card["parent"] for card in cards] == [None, str(world.model), str(world.model)]
    assert cards[1]["root"] == str(world.adapters["qv"])


def test_health_and_flush(url: str) -> None:
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/health_generate", timeout=20).status_code == 200
    prompt = list(range(40))
    post(url, input_ids=prompt, sampling_params=GREEDY)
    hit = post(url, input_ids=prompt, sampling_params=GREEDY).json()
    assert hit["meta_info"]["cached_tokens"] == 32
    assert httpx.post(f"{url}/flush_cache?timeout=5").status_code == 200
    miss = post(url, input_ids=prompt, sampling_params=GREEDY).json()
    assert miss["meta_info"]["cached_tokens"] == 0


def test_vectors_for_the_openai_client_beside_completions(url: str, world: World) -> None:
    """The client asks for base64 by itself and decodes it."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    names = {str(world.model): None, "a": world.adapters["qv"], "b": world.adapters["big"]}
    tokenizer = Tokenizer.load(world.model)
    texts = ["one text", "x", "and another, a little longer than the first"]

    states = {
        (model, text): peft_states(world.model, path, tokenizer.encode(text))
        for model, path in names.items()
        for text in texts
    }

    def embed(model: str, kind: str) -> None:
        extra = {"pooling": kind}
        found = client.embeddings.create(model=model, input=texts, extra_body=extra)
        assert found.model == model
        assert [item.index for item in found.data] == [0, 1, 2]
        for item, text in zip(found.data, texts, strict=True):
            right = states[model, text][-1] if kind == "last" else states[model, text].mean(0)
            right = (right / right.norm()).tolist()
            assert item.embedding == pytest.approx(right, abs=2e-5), (model, kind, text)
        assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, texts))
        plain = client.embeddings.create(
            model=model, input=texts, encoding_format="float", extra_body=extra
        )
        for item, other in zip(found.data, plain.data, strict=True):
            assert item.embedding == pytest.approx(other.embedding, abs=1e-5)

    generating = {
        "text": ["abc"] * 4,
        "sampling_params": GREEDY,
        "lora_path": [None, "a", "b", "a"],
    }
    alone = post(url, **generating).json()
    with ThreadPoolExecutor(8) as pool:
        replies = [pool.submit(post, url, **generating) for _ in range(6)]
        vectors = [pool.submit(embed, name, kind) for name in names for kind in ("last", "mean")]
        for future in vectors:
            future.result()
        for future in replies:
            assert [r["output_ids"] for r in future.result().json()] == [
                r["output_ids"] for r in alone
            ]
    with pytest.raises(openai.BadRequestError, match="dimensions is 8; allowed: 64") as refused:
        client.embeddings.create(model="a", input="x", dimensions=8)
    assert refused.value.param == "dimensions"
    with pytest.raises(openai.NotFoundError, match="'nobody'"):
        client.embeddings.create(model="nobody", input="x")
