"""Sampling parameters: every accepted spelling, and a named error for everything else."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lorikeet.client.params import parse_sampling
from lorikeet.core.sampling import MAX_STOPS, SamplingParams
from lorikeet.errors import RequestError


def test_every_field_of_sampling_params_can_be_given() -> None:
    names = {field.name for field in msgspec.structs.fields(SamplingParams)}
    with pytest.raises(RequestError) as caught:
        parse_sampling({"nope": 1})
    listed = str(caught.value).split("allowed: ")[1].split(", ")
    assert set(listed) == names


def test_nothing_is_all_defaults() -> None:
    assert parse_sampling(None) == parse_sampling({}) == SamplingParams()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 1.5, "top_k": 5, "min_p": 0}, {"temperature": 1.5, "top_k": 5}),
        ({"max_new_tokens": None}, {"max_new_tokens": None}),
        ({"max_new_tokens": 0}, {"max_new_tokens": 0}),
        ({"temperature": None, "n": None, "stop": None, "sampling_seed": None}, {}),
        ({"stop": "a"}, {"stop": ("a",)}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop": ("a",)}, {"stop": ("a",)}),
        ({"stop_regex": "a+"}, {"stop_regex": ("a+",)}),
        ({"stop_regex": ["a+", "b"]}, {"stop_regex": ("a+", "b")}),
        ({"stop_token_ids": [1, 2]}, {"stop_token_ids": (1, 2)}),
        ({"stop_token_ids": 3}, {"stop_token_ids": (3,)}),
        ({"stop_token_ids": [2, 1] * 9999}, {"stop_token_ids": (2, 1)}),
        ({"logit_bias": {"15": 2, "7": -0.5}}, {"logit_bias": {15: 2.0, 7: -0.5}}),
        ({"logit_bias": {15: 1.0}}, {"logit_bias": {15: 1.0}}),
        ({"json_schema": {"type": "object"}}, {"json_schema": '{"type": "object"}'}),
        ({"json_schema": '{"type":"object"}'}, {"json_schema": '{"type":"object"}'}),
        ({"structural_tag": {"a": [1]}}, {"structural_tag": '{"a": [1]}'}),
        ({"regex": "a*"}, {"regex": "a*"}),
        ({"ebnf": 'root ::= "a"'}, {"ebnf": 'root ::= "a"'}),
        ({"ignore_eos": True, "no_stop_trim": True}, {"ignore_eos": True, "no_stop_trim": True}),
        (
            {"skip_special_tokens": False, "spaces_between_special_tokens": False},
            {"skip_special_tokens": False, "spaces_between_special_tokens": False},
        ),
    ],
)
def test_accepted_spellings(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert parse_sampling(given) == SamplingParams(**expected)


def test_a_number_stays_a_float() -> None:
    assert isinstance(parse_sampling({"temperature": 0}).temperature, float)


def test_a_struct_is_checked_like_an_object() -> None:
    params = SamplingParams(stop=("a",), temperature=0.5, logit_bias={3: 1.0})
    assert parse_sampling(params) == params
    with pytest.raises(RequestError, match=r"sampling_params.temperature is 'hot'"):
        parse_sampling(SamplingParams(temperature="hot"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": "0"}, "sampling_params.temperature is '0'; allowed: a number"),
        ({"temperature": True}, "sampling_params.temperature is True; allowed: a number"),
        ({"temperature": 10**400}, "allowed: a finite number"),
        ({"top_k": 1.0}, "sampling_params.top_k is 1.0; allowed: an integer"),
        ({"top_k": True}, "sampling_params.top_k is True; allowed: an integer"),
        ({"max_new_tokens": "9"}, "sampling_params.max_new_tokens is '9'; allowed: an integer"),
        ({"ignore_eos": 1}, "sampling_params.ignore_eos is 1; allowed: true or false"),
        ({"ignore_eos": "true"}, "sampling_params.ignore_eos is 'true'; allowed: true or false"),
        ({"stop": 3}, "sampling_params.stop is 3; allowed: a string or a list of strings"),
        ({"stop": ["a", 3]}, "sampling_params.stop is 3; allowed: a string"),
        ({"stop": ["a\ud800"]}, "sampling_params.stop is .*; allowed: valid Unicode"),
        ({"stop": ["a"] * (MAX_STOPS + 1)}, "has 33 entries; allowed: at most 32"),
        ({"stop": "a" * 2000}, "sampling_params.stop has an entry of 2000 characters"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids is .*; allowed: a list of token ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids is .*; allowed: a list of token ids"),
        ({"stop_regex": ["a"] * 9}, "stop_regex has 9 entries; allowed: at most 8"),
        ({"stop_token_ids": list(range(257))}, "more than 256 different ids; allowed: at most 256"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "has 301 entries; allowed: at most 300"),
        ({"logit_bias": [1]}, "allowed: an object from token ids to numbers"),
        ({"logit_bias": {"x": 1}}, "logit_bias: key is 'x'; allowed: an object from token ids"),
        ({"logit_bias": {"1.5": 1}}, "logit_bias: key is '1.5'"),
        ({"logit_bias": {"٣": 1}}, "logit_bias: key is"),
        ({"logit_bias": {"3": "1"}}, r"logit_bias\[3\] is '1'; allowed: a number"),
        ({"json_schema": "{"}, "sampling_params.json_schema is not valid JSON"),
        ({"json_schema": 3}, "json_schema is 3; allowed: an object, or its JSON as a string"),
        ({"json_schema": {"a": b"x"}}, "json_schema is .*; allowed: an object of JSON values"),
        ({"structural_tag": []}, "structural_tag is .*; allowed: an object, or its JSON"),
        ({"regex": ["a"]}, "sampling_params.regex is .*; allowed: a string"),
        ({"ebnf": {}}, "sampling_params.ebnf is .*; allowed: a string"),
        ({"beam": 1, "apple": 2}, "has unknown keys: 'apple', 'beam'; allowed: ebnf, freq"),
        ("fast", "sampling_params is 'fast'; allowed: an object"),
        (3, "sampling_params is 3; allowed: an object"),
    ],
)
def test_refused(given: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        parse_sampling(given)


def test_the_error_names_the_field_and_its_place() -> None:
    with pytest.raises(RequestError, match=r"sampling_params\[2\].n is 'x'") as caught:
        parse_sampling({"n": "x"}, ("sampling_params", 2))
    assert caught.value.param == "n"
    with pytest.raises(RequestError) as caught:
        parse_sampling({"beam": 1})
    assert caught.value.param == "beam"
    with pytest.raises(RequestError) as caught:
        parse_sampling({"logit_bias": {"x": 1}})
    assert caught.value.param == "logit_bias"


def test_a_long_value_is_quoted_in_part() -> None:
    with pytest.raises(RequestError) as caught:
        parse_sampling({"temperature": "x" * 10_000})
    assert len(str(caught.value)) < 250
