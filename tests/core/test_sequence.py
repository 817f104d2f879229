from __future__ import annotations

import pytest

from lorikeet.core.request import Request, SamplingParams
from lorikeet.core.sequence import LEGAL_TRANSITIONS, Sequence, SequenceState

PROMPT = [5, 6, 7, 8]


def make(**fields: object) -> Sequence:
    request = Request(prompt_token_ids=PROMPT, sampling=SamplingParams())
    for name, value in fields.items():
        setattr(request, name, value)
    return Sequence(1, request, version=2, seed=3)


def test_counts_of_prompt_and_output() -> None:
    seq = make()
    seq.append(9)
    seq.append(10)
    assert (seq.num_tokens, seq.num_prompt, seq.num_output) == (6, 4, 2)


def test_samples_share_the_prompt_until_they_grow() -> None:
    request = Request(prompt_token_ids=list(PROMPT), sampling=SamplingParams(n=2))
    first, second = (Sequence(number, request, version=2, seed=3) for number in (1, 2))
    assert first.tokens is second.tokens is request.prompt_token_ids
    first.append(9)
    assert first.tokens == [*PROMPT, 9]
    assert second.tokens is request.prompt_token_ids
    assert request.prompt_token_ids == PROMPT


def test_two_sequences_of_one_request_differ() -> None:
    assert make() != make()


@pytest.mark.parametrize("before", SequenceState)
@pytest.mark.parametrize("after", SequenceState)
def test_only_legal_transitions(before: SequenceState, after: SequenceState) -> None:
    seq = make()
    seq.state = before
    if after in LEGAL_TRANSITIONS[before]:
        seq.enter(after)
        assert seq.state is after
    else:
        with pytest.raises(ValueError, match=f"{before.value} -> {after.value}"):
            seq.enter(after)


def test_every_state_has_a_row_and_can_finish() -> None:
    assert set(LEGAL_TRANSITIONS) == set(SequenceState)
    for state in set(SequenceState) - {SequenceState.FINISHED}:
        assert SequenceState.FINISHED in LEGAL_TRANSITIONS[state]
    assert not LEGAL_TRANSITIONS[SequenceState.FINISHED]


@pytest.mark.parametrize(
    ("return_logprob", "start", "num_collected", "expected"),
    [
        (False, 0, 0, -1),
        (True, -1, 0, -1),
        (True, 0, 0, 0),
        (True, 2, 0, 2),
        (True, 2, 1, 3),
        (True, 2, 2, -1),
        (True, 4, 0, -1),
    ],
)
def test_logprob_start_moves_past_what_was_collected(
    return_logprob: bool, start: int, num_collected: int, expected: int
) -> None:
    seq = make(return_logprob=return_logprob, logprob_start_len=start)
    seq.num_prompt_logprobs = num_collected
    assert seq.logprob_start == expected


@pytest.mark.parametrize(("start", "expected"), [(-1, 3), (0, 0), (1, 0), (2, 1), (3, 2)])
def test_cache_leaves_what_has_to_be_computed(start: int, expected: int) -> None:
    assert make(return_logprob=True, logprob_start_len=start).max_cacheable == expected


def test_top_logprobs_are_off_unless_logprobs_are_asked_for() -> None:
    assert make(top_logprobs_num=3).num_top_logprobs == -1
    assert make(top_logprobs_num=3, return_logprob=True).num_top_logprobs == 3
