"""What one call may ask for is decided before anything is made of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lorikeet.client.intake import (
    MAX_COMPLETIONS,
    MAX_TEXT,
    MAX_TEXTS,
    OWN,
    SERVED,
    CallLimits,
    Intake,
    num_prompt_logprobs,
)
from lorikeet.core.request import Request, SamplingParams
from lorikeet.errors import ContextLengthError, RequestError, UnavailableError
from lorikeet.text.tokenizer import Tokenizer
from tests.support.byte_tokenizer import save_byte_tokenizer

VOCAB, CONTEXT = 257, 64


class CountingTokenizer:
    """A tokenizer that counts what it is asked for."""

    def __init__(self, inner: Tokenizer) -> None:
        self.inner = inner
        self.num_encoded = 0

    def encode(self, text: str) -> list[int]:
        self.num_encoded += 1
        return self.inner.encode(text)

    def least_tokens(self, text: str) -> int:
        return self.inner.least_tokens(text)


class UnboundedTokenizer(CountingTokenizer):
    """One that may make one token of a text of any length."""

    def least_tokens(self, text: str) -> int:
        return 0


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return CountingTokenizer(Tokenizer.load(save_byte_tokenizer(tmp_path)))


def make(tokenizer: Any, **limits: Any) -> Intake:
    return Intake(tokenizer, vocab_size=VOCAB, context_length=CONTEXT, limits=CallLimits(**limits))


@pytest.mark.parametrize(
    ("num_prompts", "n", "is_taken"),
    [(1, 1024, True), (2, 1024, True), (3, 1024, False), (2048, 1, True), (2049, 1, False)],
)
def test_completions_of_a_call(tokenizer: Any, num_prompts: int, n: int, is_taken: bool) -> None:
    body = {"text": ["a"] * num_prompts, "sampling_params": {"n": n}}
    if is_taken:
        assert make(tokenizer).make_requests(body).num_completions == num_prompts * n
        return
    with pytest.raises(RequestError, match=f"{num_prompts} prompts.*at most 2048 completions"):
        make(tokenizer).make_requests(body)
    assert tokenizer.num_encoded == 0, "nothing was done for it"


def test_a_call_that_is_too_large_is_refused_from_its_length_alone(tokenizer: Any) -> None:
    """Not even its parameters are looked at, of which there may be one set per prompt."""
    num = MAX_COMPLETIONS + 1
    body = {"input_ids": [[1]] * num, "sampling_params": [{"stop": 5}] * num}
    with pytest.raises(RequestError, match="allowed: at most 2048 completions in one call"):
        make(tokenizer).make_requests(body)


def test_room_is_asked_for_before_anything_is_made(tokenizer: Any) -> None:
    asked: list[int] = []

    def check_room(num: int) -> None:
        asked.append(num)
        raise UnavailableError("the queue is full")

    intake = Intake(tokenizer, vocab_size=VOCAB, context_length=CONTEXT, check_room=check_room)
    with pytest.raises(UnavailableError):
        intake.make_requests({"text": ["a"] * 30, "sampling_params": {"n": 10}})
    assert asked == [300]
    assert tokenizer.num_encoded == 0


@pytest.mark.parametrize("field", ["text", "input_ids"])
def test_tokens_of_all_prompts(tokenizer: Any, field: str) -> None:
    prompt: Any = "a" * 50 if field == "text" else [1] * 50
    intake = make(tokenizer, max_tokens=500)
    assert len(intake.make_requests({field: [prompt] * 10}).requests) == 10
    tokenizer.num_encoded = 0
    with pytest.raises(RequestError, match=f"{field}: the prompts .* more than 500 tokens"):
        intake.make_requests({field: [prompt] * 1000})
    assert tokenizer.num_encoded in (0, 11), "what follows is not looked at"
    # One prompt that the context holds is no call that is too large.
    assert make(tokenizer, max_tokens=10).make_requests({field: prompt})


@pytest.mark.parametrize(
    ("prompts", "name", "least"),
    [
        ("a" * 260, "text", 65),  # the longest token of this vocabulary is the 4 bytes of </s>
        (["a", "a" * 257], "text[1]", 65),
        (["a" * 10_000] * 5, "text[0]", 2500),
    ],
    ids=["one", "list", "long"],
)
def test_a_text_that_cannot_fit_is_refused_by_its_length(
    tokenizer: Any, prompts: Any, name: str, least: int
) -> None:
    words = f"{name} has at least {least} tokens; allowed: at most 64"
    for limits in (SERVED, OWN):
        intake = Intake(tokenizer, vocab_size=VOCAB, context_length=CONTEXT, limits=limits)
        with pytest.raises(ContextLengthError, match=re.escape(words)):
            intake.make_requests({"text": prompts})
    assert tokenizer.num_encoded == 0


def test_characters_of_a_prompt_and_of_all_prompts(tokenizer: Any) -> None:
    unbounded = UnboundedTokenizer(tokenizer)
    intake = make(unbounded, max_text=20, max_texts=50)
    assert len(intake.make_requests({"text": ["a" * 20, "a" * 20, "a" * 10]}).requests) == 3
    unbounded.num_encoded = 0
    for text, words in [
        ("a" * 21, "text has 21 characters; allowed: 20 in one prompt"),
        (["a", "a" * 21], r"text\[1\] has 21 characters; allowed: 20 in one prompt"),
        (["a" * 17] * 3, "text has 51 characters in 3 prompts; allowed: 50 in one call"),
    ]:
        with pytest.raises(RequestError, match=words) as caught:
            intake.make_requests({"text": text})
        assert caught.value.param == "text"
    with pytest.raises(RequestError, match="text has 21 characters; allowed: 20 in one prompt"):
        intake.encode_rendered("a" * 21)
    assert unbounded.num_encoded == 0


def test_a_server_has_limits_that_an_engine_of_ones_own_has_not() -> None:
    assert (SERVED.max_text, SERVED.max_texts) == (MAX_TEXT, MAX_TEXTS)
    assert (OWN.max_completions, OWN.max_tokens, OWN.max_text, OWN.max_texts) == (None,) * 4
    assert OWN.max_logprobs == SERVED.max_logprobs


def test_without_limits_any_call_is_taken(tokenizer: Any) -> None:
    class OneToken(UnboundedTokenizer):
        def encode(self, text: str) -> list[int]:
            return [len(text) % VOCAB]

    def made(limits: CallLimits) -> Intake:
        one: Any = OneToken(tokenizer)
        return Intake(one, vocab_size=VOCAB, context_length=CONTEXT, limits=limits)

    for body in (
        {"text": "a" * (MAX_TEXT + 1)},
        {"text": ["a" * MAX_TEXT] * 3},
        {"text": ["a"] * (MAX_COMPLETIONS + 1)},
    ):
        assert made(OWN).make_requests(body)
        with pytest.raises(RequestError, match="allowed: "):
            made(SERVED).make_requests(body)


def logprobs(text: str | list[str], **fields: Any) -> dict[str, Any]:
    return {"text": text, "return_logprob": True} | fields


@pytest.mark.parametrize(
    ("body", "num"),
    [
        (logprobs("a" * 40, logprob_start_len=0, top_logprobs_num=4), 200 + 5),
        (logprobs("a" * 40, logprob_start_len=30, top_logprobs_num=20), 210 + 21),
        (logprobs(["a" * 40] * 3, logprob_start_len=0), 120 + 3),
        (
            logprobs("a" * 40, logprob_start_len=0, sampling_params={"n": 3, "max_new_tokens": 1}),
            3 * 41,
        ),
        (
            logprobs("ab", top_logprobs_num=5, sampling_params={"n": 2, "max_new_tokens": 9}),
            2 * 9 * 6,
        ),
        # Only what the context holds counts.
        (logprobs("a" * 60, top_logprobs_num=9, sampling_params={"max_new_tokens": 10**9}), 40),
    ],
)
def test_log_probabilities_of_a_call(tokenizer: Any, body: dict[str, Any], num: int) -> None:
    body.setdefault("sampling_params", {"max_new_tokens": 1})
    assert make(tokenizer, max_logprobs=num).make_requests(body)
    with pytest.raises(RequestError, match=f"asks for {num} log-probabilities.*at most {num - 1}"):
        make(tokenizer, max_logprobs=num - 1).make_requests(body)
    assert make(tokenizer, max_logprobs=1).make_requests(body | {"return_logprob": False})


def test_a_completion_without_an_end_ends_where_its_log_probabilities_do(tokenizer: Any) -> None:
    open_ended = {"max_new_tokens": None, "n": 2}
    body = logprobs(["ab", "abcd"], top_logprobs_num=4, sampling_params=open_ended)
    requests = make(tokenizer, max_logprobs=400).make_requests(body).requests
    assert {request.sampling.max_new_tokens for request in requests} == {20}, "2 x 2 x 5 values"
    assert requests[0].sampling is requests[1].sampling
    mixed = make(tokenizer, max_logprobs=400).make_requests(body | {"return_logprob": [True, None]})
    assert [request.sampling.max_new_tokens for request in mixed.requests] == [40, CONTEXT]
    with pytest.raises(RequestError, match="at most 19"):
        make(tokenizer, max_logprobs=19).make_requests(body)


def test_values_of_a_prompt() -> None:
    request = Request(prompt_token_ids=[1] * 10, sampling=SamplingParams())
    assert num_prompt_logprobs(request) == 0
    request.return_logprob, request.top_logprobs_num = True, 3
    assert num_prompt_logprobs(request) == 0
    request.logprob_start_len = 4
    assert num_prompt_logprobs(request) == 24
