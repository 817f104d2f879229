"""Calls in a text that grows: found wherever it is cut, and nothing of it lost."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from lorikeet.server.openai.tool_parsers import (
    Arguments,
    Begin,
    Broken,
    End,
    Event,
    HermesParser,
    Llama3Parser,
    MistralParser,
    Text,
    ToolCallParser,
)

Parser = type[ToolCallParser]
NAMES = {"f", "g", "get-weather_2.x"}

AGAIN = '{"a": "é\\"}]</tool_call>", "b": [1, {"c": -2.5e3}], "d": null}'


def read(parser: Parser, text: str, cuts: Iterable[int] = ()) -> list[Event]:
    """The events of a text that arrives up to each of the cuts, then whole; neighbours of one kind are joined."""
    made = parser(NAMES)
    found = [event for cut in cuts for event in made.advance(text[:cut], is_over=False)]
    found += made.advance(text, is_over=True)
    joined: list[Event] = []
    for event in found:
        last = joined[-1] if joined else None
        if isinstance(event, Text) and isinstance(last, Text):
            joined[-1] = Text(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments):
            joined[-1] = Arguments(last.text + event.text)
        else:
            joined.append(event)
    return joined


def call(name: str, arguments: str) -> list[Event]:
    return [Begin(name), Arguments(arguments), End()]


def hermes(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


F = '{"name": "f", "arguments": {"a": 1}}'
CALLS: list[tuple[Parser, str, list[Event]]] = [
    (HermesParser, hermes(F), call("f", '{"a": 1}')),
    (HermesParser, f"<tool_call>{F}</tool_call>", call("f", '{"a": 1}')),
    (HermesParser, "Wait.\n\n" + hermes(F), [Text("Wait."), *call("f", '{"a": 1}')]),
    (HermesParser, " \n" + hermes(F) + "\n ", call("f", '{"a": 1}')),
    (
        HermesParser,
        hermes('{"arguments": {}, "id": "x", "name": "g"}') + "\n" + hermes(F),
        [*call("g", "{}"), *call("f", '{"a": 1}')],
    ),
    (HermesParser, hermes(F) + "\nDone.", [*call("f", '{"a": 1}'), Text("\nDone.")]),
    # The output ends where the tag should be closed.
    (HermesParser, f"<tool_call>\n{F}\n", call("f", '{"a": 1}')),
    (
        HermesParser,
        hermes('{"name": "get-weather_2.x", "arguments": ' + AGAIN + "}"),
        call("get-weather_2.x", AGAIN),
    ),
    # A function without parameters.
    (HermesParser, hermes('{"name": "f"}'), call("f", "{}")),
    (
        HermesParser,
        hermes('{"id": "x", "name": "f"}') + hermes(F),
        call("f", "{}") + call("f", '{"a": 1}'),
    ),
    (HermesParser, 'So: <tool_call>{"name": "f"}', [Text("So:"), *call("f", "{}")]),
    (HermesParser, hermes('{"name": "f", "parameters": {"a": 1}}'), call("f", '{"a": 1}')),
    (Llama3Parser, '{"name": "f"}', call("f", "{}")),
    (Llama3Parser, '<|python_tag|>{"name": "f"}; {"name": "g"}', call("f", "{}") + call("g", "{}")),
    (Llama3Parser, '{"name": "f"} is it', [*call("f", "{}"), Text(" is it")]),
    (
        MistralParser,
        '[TOOL_CALLS] [{"name": "f"}, {"name": "g"}]',
        call("f", "{}") + call("g", "{}"),
    ),
    (Llama3Parser, '{"name": "f", "parameters": {"a": 1}}', call("f", '{"a": 1}')),
    (Llama3Parser, "\n" + F, call("f", '{"a": 1}')),
    (
        Llama3Parser,
        f'{F}; {{"type": "function", "name": "g", "parameters": {AGAIN}}}',
        [*call("f", '{"a": 1}'), *call("g", AGAIN)],
    ),
    (Llama3Parser, f"<|python_tag|>{F};{F}", call("f", '{"a": 1}') * 2),
    (Llama3Parser, f"So: <|python_tag|> {F}", [Text("So:"), *call("f", '{"a": 1}')]),
    (MistralParser, f"[TOOL_CALLS] [{F}]", call("f", '{"a": 1}')),
    (
        MistralParser,
        f'Hi [TOOL_CALLS][{F}, {{"name": "g", "arguments": {AGAIN}, "id": "123456789"}}]',
        [Text("Hi"), *call("f", '{"a": 1}'), *call("g", AGAIN)],
    ),
    (
        MistralParser,
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get-weather_2.x[ARGS] {}',
        [*call("f", '{"a": 1}'), *call("get-weather_2.x", "{}")],
    ),
]

TEXTS: list[tuple[Parser, str]] = [
    (HermesParser, ""),
    (HermesParser, "Hello, 東京 \n"),
    (HermesParser, "a < b <tool_cal"),
    (HermesParser, hermes('{"name": "unknown", "arguments": {}}')),
    (HermesParser, hermes('{"id": "x"}')),
    (HermesParser, hermes('{"arguments": {}}')),
    (HermesParser, '<tool_call>{"name": "f"} and so on'),
    (HermesParser, hermes('{"name": "f"')),
    (HermesParser, hermes('{"name": "f", "arguments": "{}"}')),
    (HermesParser, hermes('{"name": "f", "arguments": [1]}')),
    (HermesParser, hermes('{"name": 5, "arguments": {}}')),
    (HermesParser, hermes('{"x": 1, "name": "f", "arguments": {}}')),
    (HermesParser, hermes("{'name': 'f', 'arguments': {}}")),
    (HermesParser, hermes('{"arguments": {"a": x}, "name": "f"}')),
    (HermesParser, '<tool_call>\n{"name": "f", "argu'),
    (HermesParser, F),
    (Llama3Parser, '{"name": "Bob", "age": 5}'),
    (Llama3Parser, '{"name": "f", "age": 5}'),
    (Llama3Parser, f"Use {F}"),
    (Llama3Parser, "<|python_tag|>print(1)"),
    (Llama3Parser, "{"),
    (MistralParser, "[TOOL_CALLS] []"),
    (MistralParser, '[TOOL_CALLS] [{"name": "unknown"}]'),
    (MistralParser, "[TOOL_CALLS]f[ARGS]"),
    (MistralParser, '[TOOL_CALLS]unknown[ARGS]{"a": 1}'),
    (MistralParser, '[TOOL_CALLS]f{"a": 1}'),
    (MistralParser, "[TOOL_CALLS"),
]

# What is told of a call stays, what comes after its arguments is text.
BROKEN: list[tuple[Parser, str, str, str]] = [
    (HermesParser, '<tool_call>{"name": "f", "arguments": ', '{"a": x}', "}</tool_call> ok"),
    (HermesParser, '<tool_call>{"name": "f", "arguments": ', '{"a": NaN}', "}</tool_call>"),
    (HermesParser, '<tool_call>{"name": "f", "arguments": ', '{"a": "\n"}', "}</tool_call>"),
    (HermesParser, '<tool_call>{"name": "f", "arguments": ', "{}", "</tool_call>"),
    (HermesParser, '<tool_call>{"name": "f", "arguments": ', "{}", ', "x": 1}</tool_call>'),
    (HermesParser, '<tool_call>{"name": "f", "arguments": ', '{"a": "b', ""),
    (HermesParser, '<tool_call>{"name": "f", "arguments": ', '{"a": "b\\', ""),
    (HermesParser, '<tool_call>{"name": "f", "arguments": ', "{", ""),
    (Llama3Parser, '{"name": "f", "parameters": ', "{}", ', "age": 3} years'),
    (Llama3Parser, '<|python_tag|>{"name": "f", "parameters": ', '{"a": ', ""),
    (MistralParser, "[TOOL_CALLS]f[ARGS]", "{]", "} x"),
    (MistralParser, '[TOOL_CALLS] [{"name": "f", "arguments": ', '{"a": [', ""),
]


def all_texts() -> list[tuple[Parser, str]]:
    calls = [(parser, text) for parser, text, _ in CALLS]
    broken = [(parser, before + args + rest) for parser, before, args, rest in BROKEN]
    return [*calls, *TEXTS, *broken]


@pytest.mark.parametrize(("parser", "text", "events"), CALLS)
def test_calls(parser: Parser, text: str, events: list[Event]) -> None:
    assert read(parser, text) == events


@pytest.mark.parametrize(("parser", "text"), TEXTS)
def test_what_is_no_call_is_text(parser: Parser, text: str) -> None:
    assert read(parser, text) == ([Text(text)] if text else [])


@pytest.mark.parametrize(("parser", "before", "arguments", "rest"), BROKEN)
def test_a_call_that_breaks(parser: Parser, before: str, arguments: str, rest: str) -> None:
    begun = [Begin("f"), Arguments(arguments), Broken()]
    assert read(parser, before + arguments + rest) == begun + ([Text(rest)] if rest else [])


def test_a_call_after_one_that_breaks() -> None:
    text = hermes('{"name": "f", "arguments": {"a": x}}') + hermes(F)
    assert read(HermesParser, text)[-3:] == call("f", '{"a": 1}')
    assert read(HermesParser, "<tool_call>" + hermes(F)) == [
        Text("<tool_call>"),
        *call("f", '{"a": 1}'),
    ]
    assert read(MistralParser, f"[TOOL_CALLS] [{F}, 5]") == [*call("f", '{"a": 1}'), Text(", 5]")]
    assert read(Llama3Parser, f"{F}; then") == [*call("f", '{"a": 1}'), Text("; then")]


@pytest.mark.parametrize(("parser", "text"), all_texts())
def test_it_does_not_matter_where_the_text_is_cut(parser: Parser, text: str) -> None:
    whole = read(parser, text)
    for cut in range(len(text)):
        assert read(parser, text, [cut]) == whole, cut
    assert read(parser, text, range(len(text) + 1)) == whole
    draw = random.Random(len(text))
    for _ in range(50):
        cuts = sorted(draw.choices(range(len(text) + 1), k=4))
        assert read(parser, text, cuts) == whole, cuts


def test_any_text_is_read_the_same_in_pieces() -> None:
    parts = [
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|python_tag|>",
        "{",
        "}",
        ";",
    ]
    parts += [
        "[",
        "]",
        ",",
        '"',
        "\\",
        " ",
        "\n",
        '{"name": "f", ',
        '"arguments": ',
        "{}",
        "f",
        "é",
        F,
    ]
    draw = random.Random(0)
    for _ in range(1500):
        text = "".join(draw.choices(parts, k=draw.randrange(1, 12)))
        for parser in (HermesParser, Llama3Parser, MistralParser):
            assert read(parser, text, range(len(text) + 1)) == read(parser, text), (parser, text)


def test_arguments_come_as_they_are_written() -> None:
    """Each character of them is told with the text that has it, but for an escape's backslash."""
    text = hermes('{"name": "f", "arguments": {"a": "bcd\\n", "e": 1}}')
    made, told = HermesParser(NAMES), ""
    start, end = text.index('{"a"'), text.index("}}") + 1
    for cut in range(len(text) + 1):
        for event in made.advance(text[:cut], is_over=False):
            told += event.text if isinstance(event, Arguments) else ""
        if start < cut <= end and text[cut - 1] != "\\":
            assert told == text[start:cut]


def test_text_comes_as_it_is_written() -> None:
    """Only what may begin a call, and white space before it, is kept back."""
    made = HermesParser(NAMES)
    told = [
        "".join(
            e.text for e in made.advance("Hello <b> "[:n], is_over=False) if isinstance(e, Text)
        )
        for n in range(11)
    ]
    assert told == ["", "H", "e", "l", "l", "o", "", "", " <b", ">", ""]


def test_deep_arguments() -> None:
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    text = hermes('{"name": "f", "arguments": ' + deep + "}")
    assert read(HermesParser, text)[1] == Arguments(deep)
