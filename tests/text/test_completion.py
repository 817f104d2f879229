"""Outputs of the engine become the text, tokens and reason of one completion."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikeet.core.failure import Failure
from lorikeet.core.request import (
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from lorikeet.text.completion import Completion, Snapshot
from lorikeet.text.tokenizer import Tokenizer
from tests.support.tokenizers import make_tokenizer

LENGTH = FinishReason(kind="length", length=3)
NEWLINE = 3 + 0x0A  # the byte token of "\n" in the metaspace vocabulary


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    def make(kind: Any) -> Tokenizer:
        directory: Path = tmp_path_factory.mktemp(kind)
        return Tokenizer.load(make_tokenizer(directory, kind))

    return {kind: make(kind) for kind in ("bytelevel", "metaspace")}


@pytest.fixture
def tokenizer(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["bytelevel"]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def start(
    tokenizer: Tokenizer, *, prompt: str = "Q:", clock: Clock | None = None, **sampling: Any
) -> Completion:
    request = Request(
        prompt_token_ids=tokenizer.encode(prompt),
        sampling=SamplingParams(**sampling),
    )
    return Completion(request, tokenizer, rid="r", clock=clock or Clock())


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token for each character."""
    return [token for char in text for token in tokenizer.encode(char, add_special_tokens=False)]


def out(token_ids: list[int], finish: FinishReason | None = None, **fields: Any) -> RequestOutput:
    return RequestOutput(id=0, token_ids=token_ids, finish=finish, **fields)


def stream(completion: Completion, ids: list[int]) -> list[str]:
    """Feed tokens one by one until the completion ends itself; the text after each."""
    texts: list[str] = []
    for token_id in ids:
        ended = completion.add(out([token_id]))
        texts.append(completion.text)
        if ended:
            break
    return texts


def test_text_grows_and_ends_by_length(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer)
    assert stream(completion, letters(tokenizer, "ab")) == ["a", "ab"]
    assert completion.finish is None
    assert not completion.add(out(letters(tokenizer, "c"), LENGTH))
    snapshot = completion.snapshot()
    assert (snapshot.text, snapshot.finish, snapshot.completion_tokens) == ("abc", LENGTH, 3)
    assert snapshot.output_ids == letters(tokenizer, "abc")
    assert snapshot.prompt_tokens == len(tokenizer.encode("Q:"))


def test_a_stop_string_over_several_tokens(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer, stop=("STOP",))
    texts = stream(completion, letters(tokenizer, "ab STOP more"))
    assert texts == ["a", "ab", "ab ", "ab ", "ab ", "ab ", "ab "]
    assert completion.finish == FinishReason(kind="stop", matched="STOP")
    assert completion.snapshot().output_ids == letters(tokenizer, "ab STOP")


def test_a_held_beginning_is_released_when_it_was_none(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer, stop=("STOP",))
    assert stream(completion, letters(tokenizer, "aSTx")) == ["a", "a", "a", "aSTx"]
    assert stream(completion, letters(tokenizer, "ST")) == ["aSTx", "aSTx"]
    completion.add(out([], LENGTH))
    assert completion.text == "aSTxST"


def test_a_stop_string_within_one_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("countries", add_special_tokens=False)
    word = max(ids, key=lambda token: len(tokenizer.token_text(token)))
    text = tokenizer.token_text(word)
    assert len(text) >= 3
    stop = text[1]
    completion = start(tokenizer, stop=(stop,))
    assert completion.add(out([word]))
    assert (completion.text, completion.snapshot().completion_tokens) == (text[0], 1)
    kept = start(tokenizer, stop=(stop,), no_stop_trim=True)
    assert kept.add(out([word]))
    assert kept.text == text[:2]


def test_no_stop_trim_keeps_the_stop_and_holds_nothing(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer, stop=("STOP",), no_stop_trim=True)
    texts = stream(completion, letters(tokenizer, "aSTOPb"))
    assert texts == ["a", "aS", "aST", "aSTO", "aSTOP"]


def test_the_earliest_of_several_stops_wins(tokenizer: Tokenizer) -> None:
    for batch in (1, 100):
        completion = start(tokenizer, stop=("world", "lo", "zz"))
        ids = letters(tokenizer, "hello world")
        ended = [completion.add(out(ids[i : i + batch])) for i in range(0, len(ids), batch)]
        assert any(ended)
        assert completion.text == "hel"
        assert completion.finish == FinishReason(kind="stop", matched="lo")
        assert completion.snapshot().completion_tokens == 5


def test_a_stop_pattern(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer, stop_regex=(r"\d{2}",))
    assert stream(completion, letters(tokenizer, "a1b23c")) == ["a", "a", "a1b", "a1b", "a1b"]
    assert completion.finish == FinishReason(kind="stop", matched=r"\d{2}")


def test_a_pattern_without_end_aborts_the_request(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer, stop_regex=(r"(x+x+)+y",))
    ended = False
    for _ in range(200):
        ended = ended or completion.add(out(letters(tokenizer, "x")))
    assert ended
    finish = completion.finish
    assert finish is not None
    assert (finish.kind, finish.status_code) == ("abort", 400)
    assert "takes too long" in str(finish.message)


def test_min_new_tokens(tokenizer: Tokenizer) -> None:
    ids = letters(tokenizer, "aXbXcX")
    for least, num_tokens, text in ((0, 2, "a"), (2, 2, "a"), (3, 4, "aXb"), (5, 6, "aXbXc")):
        choices: list[dict[str, Any]] = [{"stop": ("X",)}, {"stop_regex": ("X",)}]
        for sampling in choices:
            completion = start(tokenizer, min_new_tokens=least, **sampling)
            stream(completion, ids)
            assert (completion.snapshot().completion_tokens, completion.text) == (num_tokens, text)


def test_tokens_after_the_stop_are_dropped_with_their_logprobs(tokenizer: Tokenizer) -> None:
    ids = letters(tokenizer, "aXbc")
    logprobs = [TokenLogprobs(-float(i), token, []) for i, token in enumerate(ids)]
    completion = start(tokenizer, stop=("X",))
    assert completion.add(out(ids, logprobs=logprobs))
    assert not completion.add(out(letters(tokenizer, "d")))
    assert not completion.add(out([], FinishReason(kind="abort", failure=Failure("aborted", "x"))))
    snapshot = completion.snapshot()
    assert snapshot.output_ids == ids[:2]
    assert list(snapshot.output_logprobs) == logprobs[:2]
    assert snapshot.finish == FinishReason(kind="stop", matched="X")


def test_a_stop_in_the_last_output_needs_no_abort(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer, stop=("X",))
    assert not completion.add(out(letters(tokenizer, "aXb"), LENGTH))
    assert completion.finish == FinishReason(kind="stop", matched="X")
    assert completion.text == "a"


def test_a_stop_token_is_in_the_ids_and_not_in_the_text(tokenizer: Tokenizer) -> None:
    ids = letters(tokenizer, "ab")
    for matched, skip in ((1, True), (1, False), (ids[-1], True)):
        finish = FinishReason(kind="stop", matched=matched)
        completion = start(tokenizer, skip_special_tokens=skip)
        assert not completion.add(out([*ids, matched], finish))
        snapshot = completion.snapshot()
        assert (snapshot.text, snapshot.output_ids) == ("ab", [*ids, matched])
        assert snapshot.finish == finish


def test_no_stop_trim_shows_the_stop_token(tokenizer: Tokenizer) -> None:
    ids = letters(tokenizer, "ab")
    for matched, skip, text in ((1, True, "ab"), (1, False, "ab<|end|>"), (ids[0], True, "aba")):
        completion = start(tokenizer, no_stop_trim=True, skip_special_tokens=skip)
        completion.add(out([*ids, matched], FinishReason(kind="stop", matched=matched)))
        assert completion.text == text


def test_eos_that_did_not_end_is_a_token_like_others(tokenizer: Tokenizer) -> None:
    """With ``ignore_eos`` the engine goes on; the special token is skipped or shown as asked."""
    ids = letters(tokenizer, "a")
    for skip, text in ((True, "aa"), (False, "a<|end|>a")):
        completion = start(tokenizer, ignore_eos=True, skip_special_tokens=skip)
        completion.add(out([*ids, 1, *ids], LENGTH))
        assert completion.text == text


def test_prompt_logprobs_and_cached_tokens_come_once(tokenizer: Tokenizer) -> None:
    prompt = [TokenLogprobs(None, 5, []), TokenLogprobs(-0.5, 6, [(-0.5, 6)])]
    completion = start(tokenizer)
    ids = letters(tokenizer, "ab")
    completion.add(out(ids[:1], prompt_logprobs=prompt, cached_tokens=1))
    completion.add(out(ids[1:], LENGTH))
    snapshot = completion.snapshot()
    assert (list(snapshot.prompt_logprobs), snapshot.cached_tokens) == (prompt, 1)


def test_a_request_without_tokens(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer, max_new_tokens=0)
    assert not completion.add(out([], FinishReason(kind="length", length=0)))
    snapshot = completion.snapshot()
    assert (snapshot.text, snapshot.output_ids, snapshot.first_token_latency) == ("", [], None)


def test_an_abort_keeps_what_there_is(tokenizer: Tokenizer) -> None:
    abort = FinishReason(kind="abort", failure=Failure("unavailable", "gone"))
    completion = start(tokenizer, stop=("bc",))
    completion.add(out(letters(tokenizer, "ab")))
    assert not completion.add(out([], abort))
    assert (completion.text, completion.finish) == ("ab", abort)


def test_times(tokenizer: Tokenizer) -> None:
    clock = Clock()
    completion = start(tokenizer, clock=clock)
    clock.now += 2
    assert completion.snapshot().first_token_latency is None
    completion.add(out(letters(tokenizer, "a")))
    clock.now += 3
    assert completion.snapshot().e2e_latency == 5
    completion.add(out(letters(tokenizer, "b"), LENGTH))
    clock.now += 10
    snapshot = completion.snapshot()
    assert (snapshot.first_token_latency, snapshot.e2e_latency) == (2, 5)


def test_a_snapshot_does_not_change(tokenizer: Tokenizer) -> None:
    completion = start(tokenizer)
    completion.add(out(letters(tokenizer, "a")))
    snapshot = completion.snapshot()
    completion.add(out(letters(tokenizer, "b")))
    assert (snapshot.text, snapshot.completion_tokens) == ("a", 1)


def test_a_broken_character_is_shown_at_the_end_only(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é", add_special_tokens=False)[:1]
    completion = start(tokenizer)
    completion.add(out(ids))
    assert completion.text == ""
    completion.add(out([], LENGTH))
    assert completion.text == "\ufffd"
    stopped = start(tokenizer, stop=("\ufffd",))
    stopped.add(out(ids, LENGTH))
    assert (stopped.text, stopped.finish) == ("", FinishReason(kind="stop", matched="\ufffd"))


def test_a_newline_that_is_a_byte_token_stops_at_once(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["metaspace"]
    ids = tokenizer.encode("Paris", add_special_tokens=False)
    completion = start(tokenizer, stop=("\n",))
    assert not completion.add(out(ids))
    assert completion.add(out([NEWLINE, NEWLINE]))
    assert completion.snapshot().completion_tokens == len(ids) + 1
    assert completion.text == " Paris"
    double = start(tokenizer, stop=("\n\n",), no_stop_trim=True)
    assert not double.add(out([*ids, NEWLINE]))
    assert double.add(out([NEWLINE]))
    assert double.text == " Paris\n\n"


def test_a_word_after_the_prompt_keeps_its_space(tokenizers: dict[str, Tokenizer]) -> None:
    """Prompt and completion written one after the other are the text of their tokens."""
    tokenizer = tokenizers["metaspace"]
    ids = tokenizer.encode("Paris", add_special_tokens=False)
    for prompt, text in (("The capital is", " Paris"), ("", "Paris")):
        completion = start(tokenizer, prompt=prompt)
        completion.add(out(ids, LENGTH))
        assert completion.text == text
        assert prompt + text == tokenizer.decode([*tokenizer.encode(prompt), *ids])


def replay(
    tokenizer: Tokenizer, ids: list[int], sizes: list[int], **sampling: Any
) -> list[Snapshot]:
    completion = start(tokenizer, **sampling)
    snapshots: list[Snapshot] = []
    begin = 0
    for size in [*sizes, len(ids)]:
        ended = completion.add(out(ids[begin : begin + size]))
        snapshots.append(completion.snapshot())
        begin += size
        if ended or begin >= len(ids):
            break
    completion.add(out([], LENGTH))
    return [*snapshots, completion.snapshot()]


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.integers(0, 383), max_size=40),
    sizes=st.lists(st.integers(0, 5), max_size=12),
    stops=st.lists(
        st.sampled_from(["a", "e ", "th", "\n", "é", "aa", "\ufffd", "is P"]), max_size=2
    ),
    patterns=st.lists(st.sampled_from(["[a-c]t", "e.?n", r"\w{6}"]), max_size=1),
    kind=st.sampled_from(["bytelevel", "metaspace"]),
    trim=st.booleans(),
    least=st.integers(0, 6),
)
def test_properties_of_random_completions(
    tokenizers: dict[str, Tokenizer],
    ids: list[int],
    sizes: list[int],
    stops: list[str],
    patterns: list[str],
    kind: str,
    trim: bool,
    least: int,
) -> None:
    tokenizer = tokenizers[kind]
    sampling: dict[str, Any] = {
        "stop": tuple(stops),
        "stop_regex": tuple(patterns),
        "no_stop_trim": not trim,
        "min_new_tokens": least,
    }
    snapshots = replay(tokenizer, ids, sizes, **sampling)
    last = snapshots[-1]
    assert last.finish is not None
    # What was shown stays shown, and how the tokens were grouped into outputs makes no difference.
    for before, after in itertools.pairwise(snapshots):
        assert after.text.startswith(before.text)
        assert after.output_ids[: before.completion_tokens] == before.output_ids
    again = replay(tokenizer, ids, [1] * len(ids), **sampling)[-1]
    assert (again.text, again.output_ids, again.finish) == (
        last.text,
        last.output_ids,
        last.finish,
    )
    # The text is that of the tokens, up to the stop.
    prompt = tokenizer.encode("Q:")
    whole = tokenizer.decode([*prompt, *last.output_ids]).removeprefix(tokenizer.decode(prompt))
    assert last.output_ids == ids[: last.completion_tokens]
    assert whole.startswith(last.text)
    if last.finish == LENGTH:
        assert last.text == whole
        if least == 0:
            assert not any(stop in whole for stop in stops)
    else:
        assert last.completion_tokens >= min(least, len(ids))
        assert last.finish.kind == "stop"
        if trim and least == 0:
            assert not any(stop in last.text for stop in stops)
