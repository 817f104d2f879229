from __future__ import annotations

import pytest

from lorikeet.core.failure import Failure
from lorikeet.core.request import FinishReason, Request, SamplingParams
from lorikeet.core.sequence import Sequence
from lorikeet.errors import RequestError
from lorikeet.kv.manager import KVManager
from lorikeet.scheduler.limits import SchedulerLimits, failure, finish_reason, prepare

EOS = 2


def prepared(
    num_prompt: int, *, context: int = 20, num_pages: int = 8, **sampling: object
) -> Sequence:
    request = Request(
        prompt_token_ids=[9] * num_prompt,
        sampling=SamplingParams(**sampling),  # pyright: ignore[reportArgumentType]
    )
    limits = SchedulerLimits(
        max_running=1,
        max_step_tokens=1,
        max_prefill_tokens=1,
        context_length=context,
        max_loras_per_batch=1,
        eos_token_ids=frozenset({EOS}),
    )
    seq = Sequence(0, request, 0, 0)
    prepare(seq, limits, KVManager(4, num_pages, radix=True))
    return seq


def reason(seq: Sequence, *tokens: int) -> FinishReason | None:
    for token in tokens:
        seq.append(token)
    return finish_reason(seq, tokens[-1])


@pytest.mark.parametrize(
    ("num_prompt", "max_new", "expected"),
    [(5, 3, 8), (5, 0, 5), (5, 100, 20), (5, None, 20), (19, None, 20), (20, 0, 20)],
)
def test_length_at_which_it_ends(num_prompt: int, max_new: int | None, expected: int) -> None:
    assert prepared(num_prompt, max_new_tokens=max_new).max_tokens == expected


def test_no_limit_means_as_many_as_the_pool_holds() -> None:
    assert prepared(5, context=1000, max_new_tokens=None).max_tokens == 33
    assert prepared(32, context=1000, max_new_tokens=None).max_tokens == 33


@pytest.mark.parametrize("num_prompt", [20, 21, 500])
def test_longer_than_the_context(num_prompt: int) -> None:
    with pytest.raises(RequestError, match=f"{num_prompt} tokens; the context holds 20"):
        prepared(num_prompt, max_new_tokens=1)


@pytest.mark.parametrize(
    ("num_prompt", "max_new", "param"),
    [(33, 0, "input_ids"), (33, None, "input_ids"), (30, 4, "max_new_tokens")],
)
def test_longer_than_the_pool(num_prompt: int, max_new: int | None, param: str) -> None:
    with pytest.raises(RequestError, match=r"holds 32 tokens \(8 pages of 4\)") as caught:
        prepared(num_prompt, context=1000, max_new_tokens=max_new)
    assert caught.value.param == param
    assert str(num_prompt) in str(caught.value)


def test_the_last_token_needs_no_page() -> None:
    assert prepared(30, context=1000, max_new_tokens=3).max_tokens == 33


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        prepared(0)


def test_end_of_sequence() -> None:
    assert reason(prepared(3), 7) is None
    assert reason(prepared(3), 7, EOS) == FinishReason(kind="stop", matched=EOS)
    assert reason(prepared(3, ignore_eos=True), EOS) is None


def test_stop_token_ids_count_even_if_eos_is_ignored() -> None:
    seq = prepared(3, ignore_eos=True, stop_token_ids=(7,))
    assert reason(seq, 7) == FinishReason(kind="stop", matched=7)


def test_min_new_tokens() -> None:
    seq = prepared(3, min_new_tokens=3)
    assert reason(seq, EOS) is None
    assert reason(seq, EOS) is None
    assert reason(seq, EOS) == FinishReason(kind="stop", matched=EOS)


def test_length() -> None:
    seq = prepared(3, max_new_tokens=2)
    assert reason(seq, 7) is None
    assert reason(seq, 7) == FinishReason(kind="length", length=2)
    assert reason(prepared(3, max_new_tokens=1), EOS) == FinishReason(kind="stop", matched=EOS)


def test_context_ends_it() -> None:
    assert reason(prepared(18, max_new_tokens=50), 7, 7) == FinishReason(kind="length", length=2)


def test_failure_is_ours() -> None:
    assert failure("x") == FinishReason(kind="abort", failure=Failure("failed", "x"))
