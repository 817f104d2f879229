"""Grammars of tool calls, as the engine follows them: what they admit is what the parsers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorikeet.core.request import SamplingParams
from lorikeet.server.openai.tool_parsers import Arguments, Begin, End, Event, Text
from lorikeet.server.openai.tools import ToolForm, find_form
from lorikeet.worker.grammar.compiler import GrammarCompiler
from tests.support.grammar_tokenizer import EOS_ID, save_byte_level_tokenizer
from tests.support.sampling import accepts
from tests.support.tool_templates import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS
from tests.worker.test_grammar import Setup

SCHEMAS: dict[str, dict[str, Any]] = {
    "add": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 8}},
        "required": ["a", "b"],
    },
    "stop": {"type": "object", "properties": {}},
}
TEMPLATES = {"hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL, "args": MISTRAL_ARGS}
ADD = {
    "hermes": '<tool_call>\n{"name": "add", "arguments": %s}\n</tool_call>',
    "llama3": '{"name": "add", "parameters": %s}',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": %s}]',
    "args": "[TOOL_CALLS]add[ARGS]%s",
}
SEVERAL = {
    "hermes": ADD["hermes"] + "\n" + ADD["hermes"],
    "llama3": ADD["llama3"] + "; " + ADD["llama3"],
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": %s}, {"name": "add", "arguments": %s}]',
    "args": ADD["args"] * 2,
}
GOOD = '{"a": 1, "b": "x"}'


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    directory: Path = tmp_path_factory.mktemp("grammars")
    return Setup(directory, save_byte_level_tokenizer(directory))


def form_of(name: str) -> ToolForm:
    form = find_form(None, TEMPLATES[name])
    assert form is not None
    return form


def admits(setup: Setup, grammar: str, text: str) -> bool:
    """Whether an output may be this text and end there."""
    compiler: GrammarCompiler = setup.compiler
    matcher = compiler.matcher(SamplingParams(structural_tag=grammar))
    tokens = [*setup.tokenizer.encode(text).ids, EOS_ID]
    return all(accepts(matcher, token) for token in tokens)


def read(form: ToolForm, text: str) -> list[Event]:
    return form.parser(SCHEMAS).advance(text, is_over=True)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("parallel", [True, False])
def test_whatever_is_written_is_calls(setup: Setup, name: str, parallel: bool) -> None:
    form = form_of(name)
    grammar = form.grammar(SCHEMAS, must_call=True, parallel=parallel)
    for seed in range(12):
        text = setup.text(setup.generate(seed, structural_tag=grammar, limit=2000))
        events = read(form, text)
        kinds = [type(event) for event in events]
        num_calls = len(kinds) // 3
        assert kinds == [Begin, Arguments, End] * num_calls, text
        assert num_calls == 1 or (parallel and num_calls > 1)
        for begin, arguments in zip(events[::3], events[1::3], strict=True):
            assert isinstance(begin, Begin)
            assert isinstance(arguments, Arguments)
            value = json.loads(arguments.text)
            assert set(value) == set(SCHEMAS[begin.name]["properties"])
            assert len(value.get("b", "")) <= 8


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_that_must_come(setup: Setup, name: str) -> None:
    form, add = form_of(name), ADD[name]
    for parallel in (True, False):
        grammar = form.grammar(SCHEMAS, must_call=True, parallel=parallel)
        assert admits(setup, grammar, add % GOOD)
        assert admits(setup, grammar, SEVERAL[name] % (GOOD, GOOD)) == parallel
        for text in ("", "Hello", "Hello" + add % GOOD, add % '{"a": "1", "b": "x"}'):
            assert not admits(setup, grammar, text), text


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_that_may_come(setup: Setup, name: str) -> None:
    form, add = form_of(name), ADD[name]
    text_before = "" if name == "llama3" else "I shall\tadd. "
    for parallel in (True, False):
        grammar = form.grammar(SCHEMAS, must_call=False, parallel=parallel)
        assert admits(setup, grammar, text_before + add % GOOD)
        assert admits(setup, grammar, SEVERAL[name] % (GOOD, GOOD)) == parallel
        assert admits(setup, grammar, "Hello <b> {\t}\n")
        assert not admits(setup, grammar, text_before + add % '{"a": "1", "b": "x"}')
        assert not admits(setup, grammar, form.parser.markers[0] + "x")
    assert read(form, text_before + add % GOOD)[-2:] == [Arguments(GOOD), End()]


def test_a_marked_call_of_llama(setup: Setup) -> None:
    form = form_of("llama3")
    grammar = form.grammar(SCHEMAS, must_call=False, parallel=False)
    assert admits(setup, grammar, "<|python_tag|>" + ADD["llama3"] % GOOD)
    # What would be read as the beginning of a call is one.
    assert not admits(setup, grammar, '{"x": 1}')
    assert read(form, "Hello {") == [Text("Hello {")]
