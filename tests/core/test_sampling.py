"""The table of sampling parameters, and that whatever else names them follows from it."""

from __future__ import annotations

import pytest

from lorikeet.core.sampling import PARAMS, SamplingParams
from lorikeet.errors import RequestError
from lorikeet.server.openai.bodies import OpenAIBody
from lorikeet.server.openai.calls import given_sampling

VOCAB = 100


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("n", [1, 1024], [0, 1025, 10**400]),
        ("max_new_tokens", [0, 10**9, None], [-1]),
        ("temperature", [0, 5.5], [-0.1, float("inf"), float("nan")]),
        ("top_p", [0.001, 1], [0, 1.01]),
        ("top_k", [-1, 1, 10**9], [0, -2]),
        ("repetition_penalty", [0.1, 2], [0, 2.1]),
        ("sampling_seed", [0, 2**63 - 1, None], [-1, 2**63]),
    ],
)
def test_ranges(name: str, allowed: list[float], refused: list[float]) -> None:
    for value in allowed:
        SamplingParams(**{name: value}).validate(VOCAB)
    for value in refused:
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: value}).validate(VOCAB)
        assert caught.value.param == name
        assert str(caught.value).endswith(f"allowed: {PARAMS[name].allowed}")


def test_ranges_in_words() -> None:
    assert PARAMS["top_k"].allowed == "-1 (all tokens) or an integer >= 1"
    assert PARAMS["top_p"].allowed == "a number in (0, 1]"
    assert PARAMS["temperature"].allowed == "a finite number >= 0"
    assert PARAMS["stop"].allowed == "a string or a list of strings, at most 32"


def test_every_parameter_is_documented() -> None:
    assert [name for name, param in PARAMS.items() if not param.about] == []


def test_the_openai_api_has_every_parameter_that_it_should() -> None:
    names = {param.openai for param in PARAMS.values()} - {None}
    assert names <= OpenAIBody.model_fields.keys()
    body = OpenAIBody.model_validate({"model": "m", "seed": 3, "min_tokens": 2, "top_k": None})
    assert given_sampling(body) == {"sampling_seed": 3, "min_new_tokens": 2}


def test_other_fields_are_named_as_the_api_calls_them() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(min_new_tokens=3, max_new_tokens=2).validate(VOCAB)
    assert str(caught.value).endswith("min_new_tokens is 3; allowed: at most max_new_tokens (2)")
    caught.value.rename({"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"})
    assert str(caught.value) == "min_tokens is 3; allowed: at most max_tokens (2)"
