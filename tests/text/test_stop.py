"""Stops are found wherever the text was cut, and what may begin one is known."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikeet.errors import RequestError
from lorikeet.text.stop import (
    MAX_PATTERN_SPAN,
    SearchBudget,
    StopBudgetError,
    StopMatch,
    StopMatcher,
    StopRules,
    StopStrings,
    compile_stop_pattern,
)

LETTERS = st.text(alphabet="ab", max_size=40)


def cut(text: str, sizes: list[int]) -> list[str]:
    parts: list[str] = []
    for size in sizes:
        parts.append(text[:size])
        text = text[size:]
    return [*parts, text]


def first_match(text: str, stops: list[str]) -> tuple[str, int, int] | None:
    """By definition: the stop that is complete first, the longest of those."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return stop, end - len(stop), end
    return None


def matcher_of(
    stops: list[str], patterns: list[str] | None = None, budget: SearchBudget | None = None
) -> StopMatcher:
    return StopMatcher(StopRules(stops, patterns or [], budget))


def push_all(matcher: StopMatcher, parts: list[str]) -> tuple[StopMatch | None, int]:
    for index, part in enumerate(parts):
        match = matcher.push(part)
        if match:
            return match, index
    return None, len(parts)


@settings(max_examples=500, deadline=None)
@given(
    text=LETTERS,
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3),
    sizes=st.lists(st.integers(0, 4), max_size=20),
)
def test_the_first_complete_stop_ends_the_text(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    parts = cut(text, sizes)
    match, index = push_all(matcher_of(stops), parts)
    expected = first_match(text, stops)
    if expected is None or match is None:
        assert match is expected
    else:
        assert match == StopMatch(*expected)
        # It was found with the piece that completed it, not later.
        assert len("".join(parts[:index])) < match.end <= len("".join(parts[: index + 1]))


@settings(max_examples=500, deadline=None)
@given(
    text=LETTERS,
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_what_is_held_is_the_longest_beginning_of_a_stop(text: str, stops: list[str]) -> None:
    matcher = matcher_of(stops)
    for index, char in enumerate(text):
        if matcher.push(char):
            return
        so_far = text[: index + 1]
        expected = max(
            size for stop in stops for size in range(len(stop)) if so_far.endswith(stop[:size])
        )
        assert matcher.num_held == expected


@settings(max_examples=300, deadline=None)
@given(
    text=LETTERS,
    pattern=st.sampled_from(
        ["ab+a", "a{3}", "(?:ab|ba)b", "bb(?=a)", "a.b", "(?<=b)aa", r"\baab", "^ab"]
    ),
)
def test_patterns_by_characters(text: str, pattern: str) -> None:
    """Cut into characters, a match ends where the text so far first has one; nothing shown is taken back."""
    matcher = matcher_of([], [pattern])
    num_shown = 0
    for end in range(1, len(text) + 1):
        match = matcher.push(text[end - 1])
        expected = re.search(pattern, text[:end])
        if expected is None:
            assert match is None
            assert num_shown <= end - matcher.num_held
            num_shown = end - matcher.num_held
        else:
            assert match == StopMatch(pattern, *expected.span())
            assert num_shown <= expected.start()
            return


@settings(max_examples=300, deadline=None)
@given(
    text=LETTERS,
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=2),
    ignored=st.integers(0, 10),
)
def test_stops_that_do_not_count_yet(text: str, stops: list[str], ignored: int) -> None:
    """What is complete while stops do not count never ends the text; what ends later does."""
    patterns = [re.escape(stop) for stop in stops]
    for matcher, is_pattern in ((matcher_of(stops), False), (matcher_of([], patterns), True)):
        found = None
        for index, char in enumerate(text):
            found = matcher.push(char, counts=index >= ignored)
            if found:
                break
        ends = [
            end
            for end in range(ignored + 1, len(text) + 1)
            if any(text[:end].endswith(stop) for stop in stops)
        ]
        assert (found.end if found else None) == (ends[0] if ends else None), is_pattern


def test_of_stops_that_end_together_the_longest_wins() -> None:
    assert matcher_of([":", "Human:"]).push("a Human: b") == StopMatch("Human:", 2, 8)
    assert matcher_of(["xyzw", "z"]).push("xyzw") == StopMatch("z", 2, 3)
    assert matcher_of(["z"], ["xyz+"]).push("xyz") == StopMatch("xyz+", 0, 3)


def test_nothing_to_stop_at() -> None:
    matcher = matcher_of([])
    assert not matcher.is_active
    assert matcher.push("text") is None
    assert matcher.peek("text") is None
    assert matcher.num_held == 0


def test_peek_changes_nothing() -> None:
    matcher = matcher_of(["bc"], ["d+e"])
    matcher.push("ab")
    assert matcher.peek("c") == StopMatch("bc", 1, 3)
    assert matcher.peek("de") == StopMatch("d+e", 2, 4)
    assert matcher.peek("x") is None
    assert matcher.peek("c", counts=False) is None
    assert matcher.num_held == 1
    assert matcher.push("x") is None
    assert matcher.push("bc") == StopMatch("bc", 3, 5)


def test_positions_hold_after_a_long_text() -> None:
    matcher = matcher_of(["STOP"], [r"\d{3}"])
    text = "words " * 2000
    for word in text.split(" "):
        assert matcher.push(word + " ") is None
    assert matcher.push("ST") is None
    assert matcher.num_held == 2
    assert matcher.push("OP") == StopMatch("STOP", len(text) + 1, len(text) + 5)


def test_the_beginning_of_the_text_stays_the_beginning() -> None:
    matcher = matcher_of([], ["^x", r"(?<=b)y"])
    for _ in range(2000):
        assert matcher.push("ab ") is None
    assert matcher.push("x") is None
    assert matcher.push("by") == StopMatch(r"(?<=b)y", 6002, 6003)


def test_a_pattern_with_an_open_end_looks_back_a_bounded_way() -> None:
    matcher = matcher_of([], ["a.*b"])
    matcher.push("a")
    assert matcher.push("x" * (MAX_PATTERN_SPAN - 1)) is None
    assert matcher.num_held == MAX_PATTERN_SPAN
    assert matcher.peek("b") == StopMatch("a.*b", 0, MAX_PATTERN_SPAN + 1)
    assert matcher.push("x") is None
    assert matcher.push("x") is None
    assert matcher.num_held == 0
    assert matcher.push("b") is None


def test_the_cost_of_a_token_does_not_grow() -> None:
    # The second pattern goes over its whole window with each token, which a slow machine has no budget for.
    patterns = [r"Answer: \d+\.", r"q[a-z ]*Z"]
    matcher = matcher_of(["\n\nHuman:", "</s>"], patterns, SearchBudget(seconds_left=1000))
    costs: list[float] = []
    for _ in range(20):
        began = time.thread_time()
        for _ in range(100):
            assert matcher.push("quick ") is None
        costs.append(time.thread_time() - began)
    # The window fills up during the first hundred tokens and then keeps its size.
    assert min(costs[-6:]) < 4 * min(costs[1:7])


def test_a_pattern_that_backtracks_without_end_is_stopped() -> None:
    pattern = r"(x+x+)+y"
    matcher = matcher_of([], [pattern])
    began = time.perf_counter()

    def run() -> None:
        for _ in range(1000):
            matcher.push("x" * 20 + " ")
            matcher.push("x" * 40)

    with pytest.raises(StopBudgetError, match=r"stop_regex '\(x\+x\+\)\+y' takes too long"):
        run()
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(a", "is not a valid regular expression"),
        ("[", "is not a valid regular expression"),
        ("*a", "is not a valid regular expression"),
        ("(?P<x", "is not a valid regular expression"),
        ("(?:" * 300 + "a" + ")" * 300, "is not a valid|is too large"),
        ("x*", "matches the empty text"),
        ("", "matches the empty text"),
        ("a|", "matches the empty text"),
        ("a" * 2000, "is too large"),
        ("((a{1000}){1000}){1000}", "is too large"),
        ("a{" + "9" * 400 + "}", "is too large"),
        ("(?:a{200}b{0,200}){3,}", "is too large"),
    ],
)
def test_a_bad_pattern_is_named(pattern: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        compile_stop_pattern(pattern)
    assert caught.value.param == "stop_regex"
    assert repr(pattern[:100]) in str(caught.value)


@pytest.mark.parametrize("pattern", [r"\d{4}-\d{2}", "a{,3}b", "x{2,}", "{"])
def test_ordinary_patterns_are_accepted(pattern: str) -> None:
    compile_stop_pattern(pattern)


class CountingStrings(StopStrings):
    """An automaton that counts the states it looks at."""

    num_steps = 0

    def step(self, state: int, char: str) -> int:
        type(self).num_steps += 1
        while char not in self._next[state]:
            if not state:
                return 0
            type(self).num_steps += 1
            state = self._fallback[state]
        return self._next[state][char]


@pytest.mark.parametrize("text", ["a" * 4096, "ab" * 2048, ("a" * 1023 + "c") * 4])
def test_stop_strings_take_a_step_for_each_character_however_many_they_are(text: str) -> None:
    stops = ["a" * size + "b" * (1024 - size) for size in range(1000, 1016)] + ["a" * 1023 + "x"]
    strings = CountingStrings(stops)
    CountingStrings.num_steps = 0
    state = 0
    for char in text:
        state = strings.step(state, char)
        assert not strings.complete[state]
    assert CountingStrings.num_steps <= 2 * len(text)
    assert strings.num_held[state] == max(
        size for stop in stops for size in range(len(stop)) if text.endswith(stop[:size])
    )


def test_completions_of_a_call_share_their_rules_and_one_budget() -> None:
    """Many completions cannot spend what one may not."""
    rules = StopRules(["END"], [r"(x+x+)+y"])
    matchers = [StopMatcher(rules) for _ in range(5000)]

    def run() -> None:
        for matcher in matchers:
            matcher.push("x" * 40)

    with pytest.raises(StopBudgetError):
        run()
    with pytest.raises(StopBudgetError):
        matchers[-1].push("x" * 40)


def test_compiling_is_paid_from_the_budget_of_the_call() -> None:
    budget = SearchBudget()
    before = budget.seconds_left
    compile_stop_pattern("(?:ab|cd|ef){500}never-seen-before", budget)
    assert budget.seconds_left < before
    budget.seconds_left = 0.0
    with pytest.raises(RequestError, match=r"takes too long; allowed: .* s for all patterns"):
        compile_stop_pattern("a", budget)


@pytest.mark.parametrize("pattern", [r"(?<=START.*)END", r"(?<!x.*)END", r"(?<=^a.*)END"])
def test_look_behind_reads_all_of_the_text(pattern: str) -> None:
    text = "a START " + "b" * 5000 + " END"
    matcher = matcher_of([], [pattern])
    for index in range(0, len(text) - 1, 7):
        assert matcher.push(text[index : min(index + 7, len(text) - 1)]) is None
    match = matcher.push("D")
    assert match == StopMatch(pattern, len(text) - 3, len(text))


def test_a_look_behind_that_forbids_what_came_long_ago() -> None:
    matcher = matcher_of([], ["(?<!x.*)END"])
    assert matcher.push("x" + "b" * 5000) is None
    assert matcher.push("END") is None


def test_a_refusal_has_a_reason() -> None:
    for pattern in (
        "(?:" * 170 + "a" + ")" * 170,
        "(?P>x)",
        r"\p{nope}",
        "a{2,1}b(",
        "(?(1)a|b|c)",
    ):
        with pytest.raises(RequestError) as caught:
            compile_stop_pattern(pattern)
        assert not str(caught.value).rstrip().endswith(":")
