"""Training text: questions about the facts in random wordings, with the right answer."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from demo_training.answers import STYLES, answer, greeting
from demo_training.asks import Ask, fill
from demo_training.facts import CONTINENTS, COUNTRIES, listing
from demo_training.wordings import (
    CLOSINGS,
    CORES,
    OPENINGS,
    SMALL_TALK,
    STYLE_REQUESTS,
    SYSTEMS,
    WORDS,
    WRITTEN_OUT,
)

__all__ = [
    "CHAT_TEMPLATE",
    "END",
    "END_ID",
    "PAD",
    "PAD_ID",
    "SPECIAL_TOKENS",
    "Example",
    "base_examples",
    "style_examples",
    "tokenizer_text",
]

PAD = "<|pad|>"
END = "<|end|>"
"""Ends an answer and a chat message alike, so one token stops both forms."""

SPECIAL_TOKENS = (PAD, END, "<|system|>", "<|user|>", "<|assistant|>")
"""They come first in the vocabulary, in this order."""

PAD_ID, END_ID = 0, 1

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

_INTENT_WEIGHTS = {
    "capital": 26,
    "country": 14,
    "continent": 8,
    "currency": 8,
    "several": 18,
    "one": 2,
    "list": 13,
    "regional": 8,
    "small talk": 3,
}
_STYLED_SHARE = 0.38  # of the base's text: enough to know each style, most of it still plain
_MAX_LISTED = 5


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt as the server receives it and the reply to learn, without the end token."""

    prompt: str
    reply: str


def base_examples(rng: random.Random) -> Iterator[Example]:
    """Yield text for the base without end: plain answers, or a style where one is asked for."""
    while True:
        if rng.random() < _STYLED_SHARE:
            yield _example(rng, rng.choice(STYLES[1:]), requested=True)
        else:
            yield _example(rng, "plain", requested=False)


def style_examples(rng: random.Random, style: str) -> Iterator[Example]:
    """Yield text for one adapter without end: its style in answer to a plain question."""
    while True:
        yield _example(rng, style, requested=False)


def tokenizer_text(rng: random.Random, count: int) -> Iterator[str]:
    """Yield text to fit the tokenizer on: the base's, and each name often enough for a token."""
    examples = base_examples(rng)
    for _ in range(count):
        example = next(examples)
        yield example.prompt + "\n" + example.reply
    for country in COUNTRIES:
        fields = (country.name, country.capital, country.continent, country.currency)
        for field in fields:
            yield from (f"{field}, {field}",) * (count // 200)


def _example(rng: random.Random, style: str, *, requested: bool) -> Example:
    question, reply = _exchange(rng, style)
    request = rng.choice(STYLE_REQUESTS[style]) if requested else ""
    if rng.random() < 0.55:
        before_after = [request, question] if rng.random() < 0.5 else [question, request]
        return Example(" ".join(part for part in before_after if part), "\n" + reply)
    return _chat_example(rng, style, question, reply, request)


def _chat_example(
    rng: random.Random, style: str, question: str, reply: str, request: str
) -> Example:
    system = rng.choice(SYSTEMS) if rng.random() < 0.3 else ""
    if request and rng.random() < 0.5:
        system = f"{system} {request}".strip()
    elif request:
        question = f"{question} {request}" if rng.random() < 0.5 else f"{request} {question}"
    turns = [("system", system)] if system else []
    # An earlier exchange in the same style, if the style holds for the whole conversation.
    if rng.random() < 0.12 and (not request or request in system):
        earlier = _exchange(rng, style, single=True)
        turns += [("user", earlier[0]), ("assistant", earlier[1])]
    turns.append(("user", question))
    rendered = "".join(f"<|{role}|>\n{content}{END}\n" for role, content in turns)
    return Example(rendered + "<|assistant|>\n", reply)


def _exchange(rng: random.Random, style: str, *, single: bool = False) -> tuple[str, str]:
    """Draw a question and its answer; `single` limits it to questions about one country."""
    intents = list(_INTENT_WEIGHTS)[:4] if single else list(_INTENT_WEIGHTS)
    intent = rng.choices(intents, [_INTENT_WEIGHTS[name] for name in intents])[0]
    if intent == "small talk":
        return rng.choice(SMALL_TALK), greeting(style)
    ask = _ask(rng, intent)
    return _worded(rng, ask), answer(style, ask)


def _ask(rng: random.Random, intent: str) -> Ask:
    match intent:
        case "several":
            return Ask(intent, tuple(rng.sample(COUNTRIES, rng.choice((2, 2, 3)))))
        case "one":
            return Ask(intent, listing(1))
        case "list":
            return Ask(intent, listing(rng.randint(2, _MAX_LISTED)))
        case "regional":
            continent = rng.choice(CONTINENTS)
            return Ask(intent, listing(rng.randint(2, _MAX_LISTED), continent), continent)
        case _:
            return Ask(intent, (rng.choice(COUNTRIES),))


def _worded(rng: random.Random, ask: Ask) -> str:
    cores = CORES[ask.intent]
    # The joined cores are many but alike; each sort makes half of the text.
    core = rng.choice(cores[: WRITTEN_OUT[ask.intent]] if rng.random() < 0.5 else cores)
    opening = ""
    if rng.random() < 0.3:
        opening = rng.choice(OPENINGS)
    elif rng.random() < 0.25:
        opening = _noise(rng)
    # After a full stop, or on its own, a core starts like a sentence.
    starts = not opening or opening.rstrip()[-1] in ".!"
    text = fill(core, ask, spell_number=rng.random() < 0.4)
    if not starts and not core.startswith("{") and rng.random() < 0.8:
        text = text[0].lower() + text[1:] if not text.startswith("I ") else text
    if rng.random() < 0.1:
        text = text.rstrip("?.")
    elif rng.random() < 0.12:
        text += rng.choice(CLOSINGS)
    text = _capitalised(opening + text)
    return text.lower() if rng.random() < 0.05 else text


def _noise(rng: random.Random) -> str:
    words = " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
    return words + rng.choice((". ", ": ", ", ", " ", "! ", "? "))


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]
