"""Fields of a call become requests in order, or an error that names the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikeet.client.intake import Intake
from lorikeet.core.messages import Submit, decode_to_engine, encode
from lorikeet.core.request import Request
from lorikeet.core.sampling import MAX_SEED
from lorikeet.errors import RequestError
from lorikeet.text.tokenizer import Tokenizer
from tests.support.tokenizers import make_tokenizer

VOCAB, CONTEXT = 400, 32


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer.load(make_tokenizer(directory))


@pytest.fixture(scope="module")
def intake(tokenizer: Tokenizer) -> Intake:
    return Intake(tokenizer, vocab_size=VOCAB, context_length=CONTEXT)


def make(intake: Intake, **body: Any) -> list[Request]:
    return intake.make_requests(body).requests


def refused(intake: Intake, **body: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        intake.make_requests(body)
    return caught.value


def test_one_text(intake: Intake, tokenizer: Tokenizer) -> None:
    batch = intake.make_requests({"text": "hi there"})
    [request] = batch.requests
    assert not batch.is_list
    assert not batch.return_text_in_logprobs
    assert request.prompt_token_ids == tokenizer.encode("hi there")
    assert request.adapter is None
    assert (request.return_logprob, request.logprob_start_len, request.top_logprobs_num) == (
        False,
        -1,
        0,
    )
    assert request.sampling.max_new_tokens == CONTEXT
    [rid] = batch.rids
    assert len(rid) == 32
    assert [rid] != intake.make_requests({"text": "hi"}).rids


def test_one_list_of_ids(intake: Intake) -> None:
    batch = intake.make_requests({"input_ids": [1, 2, 3]})
    assert not batch.is_list
    assert batch.requests[0].prompt_token_ids == [1, 2, 3]


def test_batches_keep_their_order(intake: Intake, tokenizer: Tokenizer) -> None:
    batch = intake.make_requests({"text": ["b", "a"], "lora_path": ["sql", None]})
    assert batch.is_list
    assert [request.adapter for request in batch.requests] == ["sql", None]
    assert [tokenizer.decode(r.prompt_token_ids) for r in batch.requests] == ["b", "a"]
    ids = intake.make_requests({"input_ids": [[1], [2, 3]], "lora_path": "json"})
    assert ids.is_list
    assert [r.prompt_token_ids for r in ids.requests] == [[1], [2, 3]]
    assert [r.adapter for r in ids.requests] == ["json", "json"]
    assert intake.make_requests({"text": ["a"]}).is_list
    assert intake.make_requests({"input_ids": [[1]]}).is_list


def test_n_completions_stand_side_by_side(intake: Intake) -> None:
    params = {"n": 2, "sampling_seed": MAX_SEED}
    single = intake.make_requests({"text": "a", "sampling_params": params, "rid": "r"})
    assert single.is_list
    assert single.rids == ["r_0", "r_1"]
    [request] = single.requests
    assert request.num_samples == 2
    assert [request.seed(0), request.seed(1)] == [MAX_SEED, 0]
    batch = intake.make_requests(
        {"text": ["a", "b"], "sampling_params": {"n": 2}, "lora_path": ["x", "y"]}
        | {"rid": ["p", "q"]}
    )
    assert batch.rids == ["p_0", "p_1", "q_0", "q_1"]
    assert [batch.request_of(index).adapter for index in range(4)] == ["x", "x", "y", "y"]
    assert batch.labels == {
        "p_0": [0],
        "p_1": [1],
        "q_0": [2],
        "q_1": [3],
        "p": [0, 1],
        "q": [2, 3],
    }
    assert [batch.requests[0].seed(sample) for sample in (0, 1)] == [None, None]
    random = intake.make_requests({"text": ["a", "b"], "sampling_params": {"n": 3}})
    assert len(set(random.rids)) == random.num_completions == 6


def test_prompts_share_their_parameters_here_and_on_the_way(intake: Intake) -> None:
    """A megabyte of a grammar crosses once, however many prompts have it."""
    requests = make(intake, text=["a"] * 50, sampling_params={"regex": "a" * 10_000, "n": 20})
    assert len({id(request.sampling) for request in requests}) == 1
    data = encode(Submit.of(5, requests))
    assert len(data) < 20_000
    arrived = decode_to_engine(data)
    assert isinstance(arrived, Submit)
    assert arrived.first_id == 5
    assert arrived.requests() == requests
    assert len({id(request.sampling) for request in arrived.requests()}) == 1


def test_parameters_by_prompt(intake: Intake) -> None:
    requests = make(
        intake,
        text=["a", "b"],
        sampling_params=[{"max_new_tokens": 1}, {"max_new_tokens": 2}],
        return_logprob=[True, False],
        logprob_start_len=[0, 0],
        top_logprobs_num=[3, 3],
    )
    assert [r.sampling.max_new_tokens for r in requests] == [1, 2]
    # Without return_logprob the other two have nothing to say.
    assert [(r.return_logprob, r.logprob_start_len, r.top_logprobs_num) for r in requests] == [
        (True, 0, 3),
        (False, -1, 0),
    ]


def test_one_value_for_all_and_nulls(intake: Intake) -> None:
    requests = make(
        intake,
        text=["a", "b"],
        sampling_params=None,
        lora_path=None,
        rid=None,
        return_logprob=True,
        logprob_start_len=None,
        top_logprobs_num=2,
        input_ids=None,
    )
    assert [(r.return_logprob, r.logprob_start_len, r.top_logprobs_num) for r in requests] == [
        (True, -1, 2)
    ] * 2
    mixed = make(intake, text=["a", "b"], return_logprob=[True, None])
    assert [r.return_logprob for r in mixed] == [True, False]


def test_keys_of_other_servers_are_ignored(intake: Intake) -> None:
    assert make(intake, text="a", image_data=None, stream=True, session_params={"x": 1})


def test_ids_of_a_batch_from_one_rid(intake: Intake) -> None:
    both = intake.make_requests({"text": ["a", "b"], "rid": "r"})
    assert both.rids == ["r_0", "r_1"]
    assert both.labels == {"r_0": [0], "r_1": [1], "r": [0, 1]}
    for rid in ("r", ["r"]):
        one = intake.make_requests({"text": "a", "rid": rid})
        assert (one.rids, one.labels) == (["r"], {"r": [0]})


def test_new_tokens_are_limited_by_the_context(intake: Intake) -> None:
    # What it holds after each prompt is the scheduler's to say: the parameters are shared.
    for wanted, expected in ((None, CONTEXT), (100, CONTEXT), (10**30, CONTEXT), (1, 1), (0, 0)):
        [request] = make(intake, input_ids=[1, 2], sampling_params={"max_new_tokens": wanted})
        assert request.sampling.max_new_tokens == expected


def test_numbers_that_fit_no_message_are_brought_into_range(intake: Intake) -> None:
    [request] = make(intake, text="a", sampling_params={"top_k": 10**30, "max_new_tokens": 10**30})
    assert request.sampling.top_k == VOCAB
    sent = decode_to_engine(encode(Submit.of(0, [request])))
    assert isinstance(sent, Submit)
    assert sent.requests() == [request]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "text", "exactly one of text and input_ids is needed; got neither"),
        ({"text": "a", "input_ids": [1]}, "text", "exactly one of .*; got both"),
        ({"text": 3}, "text", "text is 3; allowed: a string or a list of strings"),
        ({"text": []}, "text", "text is an empty list"),
        ({"text": ["a", 3]}, "text", r"text\[1\] is 3; allowed: a string or a list"),
        ({"text": ["a", None]}, "text", r"text\[1\] is None"),
        ({"text": [["a"]]}, "text", r"text\[0\] is"),
        ({"text": ""}, "text", "text is '', which has no tokens; allowed: at least one character"),
        ({"text": ["a", ""]}, "text", r"text\[1\] is '', which has no tokens"),
        ({"text": "a\ud800"}, "text", "text is .*; allowed: valid Unicode"),
        ({"input_ids": []}, "input_ids", "input_ids is an empty list"),
        ({"input_ids": [[1], []]}, "input_ids", r"input_ids\[1\] is an empty list"),
        ({"input_ids": "1"}, "input_ids", "allowed: a list of token ids or a list of such lists"),
        ({"input_ids": 1}, "input_ids", "allowed: a list of token ids or a list of such lists"),
        ({"input_ids": [1, "2"]}, "input_ids", r"input_ids\[1\] is '2'; allowed: an integer"),
        ({"input_ids": [1, True]}, "input_ids", r"input_ids\[1\] is True"),
        ({"input_ids": [1.0]}, "input_ids", r"input_ids\[0\] is 1.0"),
        ({"input_ids": [1, [2]]}, "input_ids", r"input_ids\[1\] is \[2\]"),
        (
            {"input_ids": [[1], 2]},
            "input_ids",
            r"input_ids\[1\] is 2; allowed: a list of token ids",
        ),
        ({"input_ids": [[1], [2, None]]}, "input_ids", r"input_ids\[1\]\[1\] is None"),
        (
            {"input_ids": [1, VOCAB]},
            "input_ids",
            r"token id 400 at position 1; allowed: .*\[0, 399\]",
        ),
        (
            {"input_ids": [[1], [-1]]},
            "input_ids",
            r"input_ids\[1\] has the token id -1 at position 0",
        ),
        ({"input_ids": [10**40]}, "input_ids", "has the token id 1000"),
        ({"input_ids": [1] * CONTEXT}, "text", "prompt has 32 tokens; allowed: at most 31.* is 32"),
        ({"text": ["a", "b" * 99]}, "text", "prompt 1: the prompt has 99 tokens"),
        ({"text": "a", "lora_path": 3}, "lora_path", "lora_path is 3; allowed: an adapter's name"),
        (
            {"text": "a", "lora_path": ""},
            "lora_path",
            "lora_path is ''; allowed: an adapter's name",
        ),
        (
            {"text": "a", "lora_path": ["x", "y"]},
            "lora_path",
            "lora_path has 2 entries for 1 prompt;",
        ),
        (
            {"text": ["a", "b"], "lora_path": ["x"]},
            "lora_path",
            "has 1 entries for 2 prompts; allowed",
        ),
        ({"text": ["a", "b"], "lora_path": ["x", 1]}, "lora_path", r"lora_path\[1\] is 1"),
        (
            {"text": "a", "sampling_params": [{}, {}]},
            "sampling_params",
            "has 2 entries for 1 prompt",
        ),
        ({"text": ["a"], "sampling_params": []}, "sampling_params", "has 0 entries for 1 prompt"),
        (
            {"text": ["a"], "sampling_params": ["x"]},
            "sampling_params",
            r"sampling_params\[0\] is 'x'",
        ),
        ({"text": "a", "sampling_params": {"x": 1}}, "x", "unknown keys: 'x'; allowed: ebnf"),
        (
            {"text": "a", "sampling_params": {"top_p": 2}},
            "top_p",
            "sampling_params.top_p is 2.0; all",
        ),
        (
            {"text": ["a", "b"], "sampling_params": [{}, {"top_p": 2}]},
            "top_p",
            r"^sampling_params\[1\].top_p is 2.0; allowed: a number in \(0, 1\]$",
        ),
        (
            {"text": "a", "sampling_params": {"n": 0}},
            "n",
            r"n is 0; allowed: an integer in \[1, 1024\]",
        ),
        (
            {"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]},
            "n",
            r"sampling_params.n differs between prompts: \[1, 2\]",
        ),
        (
            {"text": "a", "sampling_params": {"stop_token_ids": [VOCAB]}},
            "stop_token_ids",
            r"allowed: token ids in \[0, 399\]",
        ),
        (
            {"text": "a", "sampling_params": {"regex": "a", "ebnf": "b"}},
            "ebnf",
            "regex and ebnf exclude each other",
        ),
        (
            {"text": "a", "sampling_params": {"min_new_tokens": 40, "max_new_tokens": None}},
            "min_new_tokens",
            "min_new_tokens is 40; allowed: at most 31, which the context of 32",
        ),
        ({"text": "a", "rid": 3}, "rid", "rid is 3; allowed: a non-empty string"),
        ({"text": "a", "rid": ""}, "rid", "rid is empty; allowed: 1 to 128 characters"),
        ({"text": ["a", "b"], "rid": ["x"]}, "rid", "rid has 1 entries for 2 prompts"),
        ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid", "rid 'x' is given twice"),
        (
            {
                "text": ["a", "b"],
                "rid": ["x", "x_0"],
                "sampling_params": {"n": 1},
                "lora_path": [1, 1],
            },
            "lora_path",
            "lora_path",
        ),
        (
            {"text": "a", "return_logprob": 1},
            "return_logprob",
            "return_logprob is 1; allowed: true or",
        ),
        ({"text": "a", "return_logprob": [True, True]}, "return_logprob", "has 2 entries for 1"),
        (
            {"text": "a", "logprob_start_len": "0"},
            "logprob_start_len",
            "is '0'; allowed: an integer",
        ),
        (
            {"text": "a", "return_logprob": True, "logprob_start_len": 1},
            "logprob_start_len",
            r"logprob_start_len is 1; allowed: -1 \(nothing of the prompt\) or .* \[0, 0\]",
        ),
        ({"text": "a", "logprob_start_len": -2}, "logprob_start_len", "logprob_start_len is -2"),
        (
            {"text": "a", "top_logprobs_num": True},
            "top_logprobs_num",
            "is True; allowed: an integer",
        ),
        ({"text": "a", "top_logprobs_num": -1}, "top_logprobs_num", r"is -1; .* in \[0, 400\]"),
        (
            {"text": ["a"], "top_logprobs_num": 401},
            "top_logprobs_num",
            "prompt 0: top_logprobs_num is 401",
        ),
        ({"text": "a", "return_text_in_logprobs": "x"}, "return_text_in_logprobs", "true or false"),
    ],
)
def test_refused(intake: Intake, body: dict[str, Any], param: str, words: str) -> None:
    error = refused(intake, **body)
    assert error.param == param
    with pytest.raises(RequestError, match=words):
        raise error


def test_a_prompt_of_special_tokens_beyond_the_model_is_refused(tokenizer: Tokenizer) -> None:
    small = Intake(tokenizer, vocab_size=3, context_length=8)
    error = refused(small, text="a")
    assert error.param == "text"
    assert "allowed: token ids in [0, 2]" in str(error)


def test_ids_made_by_suffixes_do_not_collide(intake: Intake) -> None:
    error = refused(intake, text=["a", "b"], rid=["x", "x"], sampling_params={"n": 2})
    assert "rid 'x_0' is given twice" in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=6,
)
FIELDS = (
    "text",
    "input_ids",
    "sampling_params",
    "lora_path",
    "rid",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_text_in_logprobs",
)
PARAMS = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_k",
    "stop",
    "stop_token_ids",
    "stop_regex",
    "logit_bias",
    "json_schema",
    "n",
)


@settings(max_examples=400, deadline=None)
@given(
    body=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3),
    params=st.dictionaries(st.sampled_from(PARAMS), json_values, max_size=2),
    has_text=st.booleans(),
)
def test_any_json_is_requests_or_a_named_error(
    intake: Intake, body: dict[str, Any], params: dict[str, Any], has_text: bool
) -> None:
    if has_text:
        body = {"text": "a", "sampling_params": params, **body}
    problem: RequestError | None = None
    requests: list[Request] = []
    try:
        requests = intake.make_requests(body).requests
    except RequestError as error:
        problem = error
    if problem is not None:
        assert problem.param
        assert len(str(problem)) < 1000
        return
    assert requests
    decode_to_engine(encode(Submit.of(0, requests)))
