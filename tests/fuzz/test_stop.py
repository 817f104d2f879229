"""Stop strings and patterns against a search that looks at everything again after each piece."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import regex

from lorikeet.errors import RequestError
from lorikeet.text.stop import (
    StopBudgetError,
    StopMatch,
    StopMatcher,
    StopRules,
    compile_stop_pattern,
)
from tests.fuzz.conftest import Chance, check_reason

ALPHABET = "aab\n\u00e9"
# Parts of patterns that mean the same wherever the text is cut.
ATOMS = ["a", "b", "ab", "[ab]", "[^a]", ".", "\\w", "\\n", "\u00e9", "(?:a|b)", "(?:ab|a)"]
REPEATS = ["", "", "", "*", "+", "?", "{2}", "{1,3}", "+?", "*?"]
# What is no pattern, or a cruel one.
SCRAPS = [
    *"()[]{}*+?|\\^$.,a0-9",
    "(?:",
    "(?=",
    "(?<!",
    "(?P<x>",
    "\\p{L}",
    "{9999}",
    "(a+)+",
    "\ud800",
]


def make_matcher(stops: Sequence[str], patterns: Sequence[str] = ()) -> StopMatcher:
    return StopMatcher(StopRules(stops, patterns))


def draw_text(chance: random.Random, most: int) -> str:
    return "".join(chance.choices(ALPHABET, k=chance.randint(1, most)))


def draw_pieces(chance: random.Random) -> list[str]:
    return [draw_text(chance, 6) for _ in range(chance.randint(1, 25))]


def draw_pattern(chance: random.Random) -> str:
    parts = [chance.choice(ATOMS) + chance.choice(REPEATS) for _ in range(chance.randint(1, 4))]
    return "".join(parts)


def first_string(text: str, stops: Sequence[str], seen: int) -> StopMatch | None:
    """The match that is complete first after ``seen`` characters; of several, the longest."""
    for end in range(seen + 1, len(text) + 1):
        ending = [stop for stop in stops if text.endswith(stop, 0, end)]
        if ending:
            stop = max(ending, key=len)
            return StopMatch(stop, end - len(stop), end)
    return None


def num_held(text: str, stops: Sequence[str]) -> int:
    """Characters at the end that a stop string begins with."""
    return max(
        (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
    )


def test_stop_strings(chances: Iterator[Chance]) -> None:
    for chance in chances:
        stops = [draw_text(chance, 8) for _ in range(chance.randint(1, 6))]
        matcher, text = make_matcher(stops), ""
        for piece in draw_pieces(chance):
            counts = chance.random() < 0.8
            seen, text = len(text), text + piece
            tentative = draw_text(chance, 3)
            found = matcher.push(piece, counts=counts)
            assert found == (first_string(text, stops, seen) if counts else None)
            if found:
                break
            assert matcher.num_held == num_held(text, stops)
            peeked = matcher.peek(tentative)
            assert peeked == first_string(text + tentative, stops, len(text))


def test_stop_patterns(chances: Iterator[Chance]) -> None:
    for chance in chances:
        patterns = [draw_pattern(chance) for _ in range(chance.randint(1, 3))]
        stops = [draw_text(chance, 8) for _ in range(chance.randint(0, 2))]
        try:
            matcher = make_matcher(stops, patterns)
        except RequestError:  # one matches the empty text
            assert any(regex.match(pattern, "") for pattern in patterns)
            continue
        text = ""
        for piece in draw_pieces(chance):
            seen, text = len(text), text + piece
            matches = [(pattern, regex.search(pattern, text)) for pattern in patterns]
            right = [StopMatch(p, m.start(), m.end()) for p, m in matches if m]
            string = first_string(text, stops, seen)
            right += [string] if string else []
            try:
                found = matcher.push(piece)
            except StopBudgetError:  # the machine is busy
                break
            ends = {(match.start, match.end) for match in right}
            assert (found is None) == (not right)
            if found:
                assert (found.end, found.start) == min((end, start) for start, end in ends)
                assert found in right
                break


@pytest.mark.parametrize("most", [8, 60])
def test_any_text_is_a_pattern_or_refused(chances: Iterator[Chance], most: int) -> None:
    for chance in chances:
        pattern = "".join(chance.choices(SCRAPS, k=chance.randint(0, most)))
        try:
            compiled = compile_stop_pattern(pattern)
        except RequestError as error:
            check_reason(error)
        else:
            assert not compiled.match("")
