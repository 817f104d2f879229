"""What must not change an answer: caching, chunking, preemption, company. And what must end it."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lorikeet import LLM
from lorikeet.errors import EngineFault, RequestError
from tests.support.peft_adapters import make_adapter
from tests.support.tiny_models import make_tiny_model

GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
MakeLLM = Callable[..., LLM]


def prompts(count: int, length: int = 40, seed: int = 3) -> list[list[int]]:
    chance = random.Random(seed)
    shared = [chance.randrange(256) for _ in range(length // 2)]
    return [
        shared + [chance.randrange(256) for _ in range(length - len(shared))] for _ in range(count)
    ]


def answers(llm: LLM, ids: list[list[int]], names: list[str | None], **sampling) -> list[list[int]]:
    replies = llm.generate(input_ids=ids, sampling_params=GREEDY | sampling, lora_path=names)
    llm._core.check_integrity()
    return [reply["output_ids"] for reply in replies]


@pytest.mark.parametrize(
    "options",
    [
        {"disable_radix_cache": True},
        {"chunked_prefill_size": 8},
        {"page_size": 1},
        {"max_total_tokens": 192},  # three sequences of 64 tokens: the rest is preempted or waits
        {"max_running_requests": 2},
        {"schedule_policy": "lpm"},
    ],
    ids=str,
)
def test_options_do_not_change_the_answers(make_llm: MakeLLM, options: dict) -> None:
    names = ["qv", None, "big", "qv", None, "head", "mlp", "big"]
    ids = prompts(len(names))
    adapters = ("qv", "big", "head", "mlp")
    plain = answers(make_llm(*adapters), ids, names)
    changed = make_llm(*adapters, **options)
    assert answers(changed, ids, names) == plain
    assert answers(changed, ids, names) == plain  # and again, with what the first run has cached


@pytest.mark.parametrize("name", [None, "all"])
def test_a_cached_prefix_is_reported_and_gives_the_same_tokens(make_llm: MakeLLM, name) -> None:
    llm = make_llm("all", page_size=4)
    prompt = prompts(1)[0]
    first = llm.generate(input_ids=prompt, sampling_params=GREEDY, lora_path=name)
    second = llm.generate(input_ids=prompt, sampling_params=GREEDY, lora_path=name)
    assert first["meta_info"]["cached_tokens"] == 0
    assert second["meta_info"]["cached_tokens"] == 36  # all but the last token, in whole pages of 4
    assert second["output_ids"] == first["output_ids"]
    assert llm.flush_cache()
    third = llm.generate(input_ids=prompt, sampling_params=GREEDY, lora_path=name)
    assert third["meta_info"]["cached_tokens"] == 0


def test_adapters_never_share_a_cached_prefix(make_llm: MakeLLM) -> None:
    llm = make_llm("all", "qv", page_size=4)
    prompt = prompts(1)[0]
    for name in (None, "all", "qv"):
        reply = llm.generate(input_ids=prompt, sampling_params=GREEDY, lora_path=name)
        assert reply["meta_info"]["cached_tokens"] == 0


def test_a_seed_gives_the_same_tokens_in_any_company(make_llm: MakeLLM) -> None:
    llm = make_llm("qv", "big")
    ids = prompts(5)
    seeded = GREEDY | {"temperature": 0.9, "top_p": 0.95, "sampling_seed": 11}
    alone = llm.generate(input_ids=ids[0], sampling_params=seeded, lora_path="qv")
    free = GREEDY | {"temperature": 1.2}
    together = llm.generate(
        input_ids=[*ids[1:], ids[0]],
        sampling_params=[free] * 4 + [seeded],
        lora_path=["big", None, "qv", "big", "qv"],
    )
    assert together[-1]["output_ids"] == alone["output_ids"]
    other = llm.generate(
        input_ids=ids[0], sampling_params=seeded | {"sampling_seed": 12}, lora_path="qv"
    )
    assert other["output_ids"] != alone["output_ids"]


def test_n_completions_differ_and_repeat_with_the_seed(make_llm: MakeLLM) -> None:
    llm = make_llm()
    sampling = {"temperature": 1.0, "n": 3, "max_new_tokens": 12, "sampling_seed": 5}
    first = llm.generate("some text", sampling)
    assert len({tuple(reply["output_ids"]) for reply in first}) == 3
    again = llm.generate("some text", sampling)
    assert [r["output_ids"] for r in again] == [r["output_ids"] for r in first]


def test_preempted_requests_with_seeds_and_penalties_keep_their_tokens(make_llm: MakeLLM) -> None:
    ids = prompts(6)
    sampling = [
        {
            "temperature": 1.0,
            "sampling_seed": seed,
            "frequency_penalty": 0.7,
            "repetition_penalty": 1.2,
            "max_new_tokens": 40,
            "ignore_eos": True,
        }
        for seed in range(6)
    ]
    roomy = make_llm().generate(input_ids=ids, sampling_params=sampling)
    tight = make_llm(max_total_tokens=160).generate(input_ids=ids, sampling_params=sampling)
    assert [r["output_ids"] for r in tight] == [r["output_ids"] for r in roomy]


def test_a_stop_string_ends_the_request_in_the_engine(make_llm: MakeLLM) -> None:
    llm = make_llm("qv")
    free = llm.generate("abc", GREEDY, lora_path="qv")
    stop = free["text"][3:5]
    reply = llm.generate("abc", GREEDY | {"stop": stop}, lora_path="qv")
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert reply["text"] == free["text"][: free["text"].index(stop)]
    assert llm._core.num_open == 0
    llm._core.check_integrity()


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def test_structured_output_with_and_without_an_adapter(make_llm: MakeLLM) -> None:
    llm = make_llm("big")
    bounded = {"temperature": 0.8, "max_new_tokens": 200, "sampling_seed": 1}
    replies = llm.generate(
        ["x"] * 4,
        [
            bounded | {"json_schema": SCHEMA, "logit_bias": {str(ord("}")): 20}},
            bounded | {"regex": "(ab|cd){2}"},
            bounded | {"ebnf": 'root ::= "yes" | "no"'},
            {"temperature": 0, "max_new_tokens": 5, "ignore_eos": True},
        ],
        lora_path=["big", None, "big", "big"],
    )
    value = json.loads(replies[0]["text"])
    assert isinstance(value["a"], int)
    assert value["b"] in ("x", "y")
    assert replies[1]["text"] in ("abab", "abcd", "cdab", "cdcd")
    assert replies[2]["text"] in ("yes", "no")
    assert all(r["meta_info"]["finish_reason"]["type"] == "stop" for r in replies[:3])
    assert replies[3]["meta_info"]["finish_reason"] == {"type": "length", "length": 5}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora_path": "nobody"}, ["nobody", "never been loaded", "qv"]),
        ({"sampling_params": {"regex": "(("}}, ["regex"]),
        ({"sampling_params": {"json_schema": "{"}}, ["json_schema"]),
        ({"sampling_params": {"temperature": -1}}, ["temperature"]),
        ({"sampling_params": {"heat": 1}}, ["heat", "temperature"]),
        ({"input_ids": [5] * 600, "prompts": None}, ["600", "512"]),
    ],
    ids=str,
)
def test_a_refused_call_leaves_nothing_behind(make_llm: MakeLLM, fields: dict, words) -> None:
    llm = make_llm("qv")
    with pytest.raises(RequestError) as caught:
        llm.generate(**{"prompts": "abc"} | fields)
    for word in words:
        assert word in str(caught.value)
    assert llm._core.num_open == 0
    assert llm.generate("abc", GREEDY, lora_path="qv")["meta_info"]["completion_tokens"] == 24
    llm._core.check_integrity()


def test_one_bad_entry_refuses_the_whole_call(make_llm: MakeLLM) -> None:
    llm = make_llm("qv")
    with pytest.raises(RequestError, match="nobody"):
        llm.generate(["a", "b", "c"], GREEDY, lora_path=["qv", "nobody", None])
    assert llm._core.num_open == 0
    llm._core.check_integrity()


def test_a_prompt_that_the_pages_never_hold_is_refused(make_llm: MakeLLM) -> None:
    llm = make_llm(max_total_tokens=64)
    with pytest.raises(RequestError, match="64"):
        llm.generate(input_ids=[1] * 100)


def test_an_adapter_without_lora(make_llm: MakeLLM) -> None:
    with pytest.raises(RequestError, match="--enable-lora"):
        make_llm().generate("abc", GREEDY, lora_path="qv")


def test_a_grammar_ends_the_completion_even_if_eos_is_ignored(make_llm: MakeLLM) -> None:
    reply = make_llm().generate("x", GREEDY | {"regex": "abc", "ignore_eos": True})
    assert reply["text"] == "abc"
    assert reply["meta_info"]["finish_reason"]["type"] == "stop"


def test_the_only_token_of_a_prompt_is_reported_without_a_logprob(make_llm: MakeLLM) -> None:
    reply = make_llm().generate(
        input_ids=[7], sampling_params=GREEDY, return_logprob=True, logprob_start_len=0
    )
    assert reply["meta_info"]["input_token_logprobs"] == [[None, 7, None]]


def test_no_new_tokens_computes_the_prompt_alone(make_llm: MakeLLM) -> None:
    reply = make_llm().generate(
        input_ids=[7, 8, 9],
        sampling_params={"max_new_tokens": 0},
        return_logprob=True,
        logprob_start_len=1,
    )
    assert reply["output_ids"] == []
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    assert [entry[1] for entry in reply["meta_info"]["input_token_logprobs"]] == [8, 9]


def test_an_adapter_that_makes_logits_that_are_not_finite(tmp_path: Path) -> None:
    """Each row of it fails with its name, once; the rows beside it and the next calls are as if it were not there."""
    model = make_tiny_model(tmp_path)
    adapter = make_adapter(model, tmp_path / "huge")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: tensor * 1e19 for name, tensor in tensors.items()},
        adapter / "adapter_model.safetensors",
    )
    with LLM(str(model), lora_paths={"huge": str(adapter)}, max_total_tokens=512) as llm:
        ids = [[*range(40)], [*range(40)], [5, 6, 7]]
        alone = llm.generate(input_ids=ids[0], sampling_params=GREEDY)["output_ids"]
        for _ in range(3):
            bad, good, other = llm.generate(
                input_ids=ids, sampling_params=GREEDY, lora_path=["huge", None, "huge"]
            )
            assert good["output_ids"] == alone
            assert good["meta_info"]["finish_reason"]["type"] == "length"
            for reply in (bad, other):
                reason = reply["meta_info"]["finish_reason"]
                assert (reason["type"], reason["status_code"]) == ("abort", 500)
                assert "not finite" in reason["message"]
                assert "adapter 'huge'" in reason["message"]
            assert bad["meta_info"]["cached_tokens"] == 0, "what it computed is not found again"
            with pytest.raises(EngineFault, match="adapter 'huge'"):
                llm.generate(input_ids=ids[0], sampling_params=GREEDY, lora_path="huge")
        llm._core.check_integrity()


def test_min_new_tokens_with_every_token_forbidden(tmp_path: Path) -> None:
    # A request may name as many stop tokens as the model has besides these.
    model = make_tiny_model(tmp_path, vocab_size=259, eos_token_id=[256, 257, 258])
    with LLM(str(model), max_total_tokens=512) as llm:
        params = {"min_new_tokens": 1, "stop_token_ids": [*range(256)]}
        with pytest.raises(RequestError, match="all 259 tokens: none may come first"):
            llm.generate(input_ids=[5], sampling_params=params)
        most = llm.generate(
            input_ids=[5], sampling_params=params | {"stop_token_ids": [*range(1, 256)]}
        )
        assert most["output_ids"][0] == 0


@pytest.mark.parametrize("place", ["plan", "commit"])
def test_an_interrupted_call_leaves_the_engine_usable(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Ctrl-C comes when a step is planned and not submitted, or computed and not committed."""
    llm = make_llm("qv")
    greedy = {"temperature": 0, "max_new_tokens": 8}
    wanted = llm.generate(input_ids=[1, 2, 3], sampling_params=greedy, lora_path="qv")
    scheduler = llm._core._scheduler
    method, calls = getattr(scheduler, place), []

    def interrupted(*args: Any) -> Any:
        calls.append(place)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return method(*args)

    monkeypatch.setattr(scheduler, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(input_ids=[1, 2, 3], sampling_params=greedy, lora_path="qv")
    assert len(calls) == 3, "at the end of this step"
    again = llm.generate(input_ids=[1, 2, 3], sampling_params=greedy, lora_path="qv")
    assert again["output_ids"] == wanted["output_ids"]
    llm._core.check_integrity()


def test_a_call_is_checked_as_the_server_checks_it(make_llm: MakeLLM) -> None:
    """But for its number of prompts: whoever calls is alone."""
    llm = make_llm()
    one = {"max_new_tokens": 1}
    for options, words in (
        ({"rid": "a\nb"}, r"U\+000A"),
        ({"lora_path": "n" * 257}, "at most 256"),
        ({"sampling_params": one | {"stop": ["a"] * 33}}, "at most 32"),
        ({"sampling_params": one | {"stop_regex": "(a"}}, "is not a valid regular expression"),
        ({"sampling_params": one | {"logit_bias": dict.fromkeys(range(301), 1)}}, "at most 300"),
        (
            {"sampling_params": one | {"n": 1024}, "return_logprob": True}
            | {"logprob_start_len": 0, "top_logprobs_num": 250},
            "at most 262144",
        ),
    ):
        with pytest.raises(RequestError, match=words):
            llm.generate(input_ids=[1, 2, 3], **options)
    with pytest.raises(RequestError, match="lora_name"):
        llm.load_lora_adapter("a\nb", "/nowhere")
    assert len(llm.generate(input_ids=[[1]] * 2100, sampling_params={"max_new_tokens": 0})) == 2100
