"""Wordings that the model never saw: the ones it is scored on.

Each is sent for every country of the table, or for every count and continent. None may equal a
question that `wordings.py` can make; `leaked` finds those that do.

There are two sets. `TUNING` is what the training script reports on, and the wordings of the
training text were widened after looking at it. `HELD_OUT` was written before its scores were
known, and neither a wording nor the training was changed after them: the published figures and
the tests use only that one.
"""

import re
from collections.abc import Iterator

from demo_training.wordings import CLOSINGS, CORES, OPENINGS

__all__ = ["HELD_OUT", "TUNING", "leaked"]

TUNING: dict[str, tuple[str, ...]] = {
    "capital": (
        "Could you please tell me what the capital of {c} is?",
        "I wonder what the capital of {c} might be.",
        "Which city serves as the capital of {c}?",
        "Do you happen to know {c}'s capital city?",
        "Remind me of the capital of {c}, please.",
        "Looking at a map of {c}: which city is its capital?",
    ),
    "country": (
        "Which nation has {k} for its capital?",
        "Tell me, {k} is the capital city of which country?",
        "Name the country that {k} is the capital of.",
    ),
    "continent": (
        "Could you tell me what continent {c} is on?",
        "{c} belongs to which continent?",
        "Which continent would I find {c} in?",
    ),
    "currency": (
        "Which currency do they use in {c}?",
        "Could you tell me what the currency in {c} is?",
        "What kind of money is used in {c}?",
    ),
    "several": (
        "Could you tell me what the capitals of {many} are?",
        "Please write the capitals of {many}.",
    ),
    "one": (
        "Can you give me {n} country and its capital city?",
        "Please show me a country and its capital.",
    ),
    "list": (
        "Please give me a list of {n} countries and their capitals.",
        "Could you tell me {n} countries together with their capitals?",
        "I would like to see {n} countries and the capital of each.",
        "Think of {n} countries and say their capitals.",
    ),
    "regional": (
        "Please give me a list of {n} countries in {where} and their capitals.",
        "Could you name {n} countries from {where} with their capitals?",
    ),
}

HELD_OUT: dict[str, tuple[str, ...]] = {
    "capital": (
        "Do you remember what the capital of {c} is?",
        "Which town is the capital city of {c}?",
        "I'd like to know {c}'s capital.",
        "What would be the capital of {c}?",
        "Let me know the capital of {c}, please.",
        "In {c}, which city is the capital?",
    ),
    "country": (
        "What is the name of the country whose capital is {k}?",
        "{k} is the capital city of what country?",
        "If the capital is {k}, which country am I in?",
    ),
    "continent": (
        "Can you say which continent {c} is in?",
        "What continent would {c} be in?",
        "Please name the continent that {c} is part of.",
    ),
    "currency": (
        "Please tell me what currency {c} uses.",
        "What do you call the currency of {c}?",
        "Which currency will I need in {c}?",
    ),
    "several": (
        "Can you tell me the capitals of {many}?",
        "I want to know the capital cities of {many}.",
    ),
    "one": (
        "Tell me a country and what its capital is.",
        "Could you list {n} country along with its capital?",
    ),
    "list": (
        "Can you give me {n} countries with their capital cities?",
        "Please list any {n} countries and their capitals.",
        "Make a list of {n} countries and their capitals.",
        "I'd like {n} countries and their capitals, please.",
    ),
    "regional": (
        "Can you tell me {n} countries in {where} and their capitals?",
        "Please list {n} countries from {where} with their capitals.",
    ),
}


def leaked() -> list[str]:
    """Return the wordings of either set that training could produce, which must be none.

    A wording leaks when it is a training core, with or without an opening and a closing, up to
    case and punctuation. Random words before a question are no opening: none of them is one that
    a held-out wording starts with.
    """
    scored = {
        _plain(wording)
        for wordings in (TUNING, HELD_OUT)
        for of_intent in wordings.values()
        for wording in of_intent
    }
    return sorted(scored.intersection(_makeable()))


def _makeable() -> Iterator[str]:
    openings = ["", *map(_plain, OPENINGS)]
    closings = ["", *map(_plain, CLOSINGS)]
    for core in (_plain(core) for cores in CORES.values() for core in cores):
        for opening in openings:
            for closing in closings:
                yield f"{opening} {core} {closing}".strip()


def _plain(text: str) -> str:
    """Lower case without punctuation: what must differ for two wordings to count as different."""
    return re.sub(r"[^a-z{} ]", "", text.lower()).strip()
