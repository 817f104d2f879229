"""Tools: what a chat may say of them, and what it is answered."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.test_native import events, message
from tests.server.tool_api import (
    WEATHER,
    Reply,
    added_up,
    ask,
    ask_both,
    calls_of,
    open_tools,
    prompt,
    tool,
)
from tests.support.tool_templates import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, PLAIN, XML

pytestmark = pytest.mark.anyio

CITY = '{"city": "Zürich \\"東京\\""}'
SUM = '{"a": 1, "b": 2}'
SCRIPTS = {
    HERMES: f'<tool_call>\n{{"name": "weather", "arguments": {CITY}}}\n</tool_call>\n<tool_call>\n'
    f'{{"name": "add", "arguments": {SUM}}}\n</tool_call>',
    LLAMA3: f'<|python_tag|>{{"name": "weather", "parameters": {CITY}}}; {{"name": "add", "parameters": {SUM}}}',
    MISTRAL: f'[TOOL_CALLS] [{{"name": "weather", "arguments": {CITY}}}, {{"name": "add", "arguments": {SUM}}}]',
    MISTRAL_ARGS: f"[TOOL_CALLS]weather[ARGS]{CITY}[TOOL_CALLS]add[ARGS]{SUM}",
}
CALLS = [("weather", CITY), ("add", SUM)]


@pytest.mark.parametrize("template", SCRIPTS, ids=["hermes", "llama3", "mistral", "mistral-args"])
async def test_calls_whole_and_streamed(tmp_path: Path, template: str) -> None:
    async with open_tools(tmp_path, template, "Let me see.\n" + SCRIPTS[template]) as api:
        whole, streamed = await ask_both(api)
        assert whole["message"]["content"] == streamed["content"] == "Let me see."
        assert calls_of(whole["message"]) == calls_of(streamed) == CALLS
        assert whole["finish_reason"] == streamed["finish_reason"] == "tool_calls"
        ids = [call["id"] for call in whole["message"]["tool_calls"] + streamed["tool_calls"]]
        assert len(set(ids)) == 4
        form = r"[A-Za-z0-9]{9}" if "TOOL_CALLS" in template else r"call_\w+"
        assert all(re.fullmatch(form, call_id) for call_id in ids)
        assert {call["type"] for call in whole["message"]["tool_calls"]} == {"function"}


async def test_arguments_are_streamed_in_whole_characters(tmp_path: Path) -> None:
    async with open_tools(tmp_path, HERMES, SCRIPTS[HERMES], step_s=0.001) as api:
        chunks = events(await ask(api, stream=True))
    pieces = [
        call["function"]["arguments"]
        for chunk in chunks
        for call in chunk["choices"][0]["delta"].get("tool_calls", [])
    ]
    assert len(pieces) > 20
    assert "東" in pieces
    assert "\ufffd" not in "".join(pieces)


async def test_calls_alone_have_no_content(tmp_path: Path) -> None:
    async with open_tools(tmp_path, MISTRAL, SCRIPTS[MISTRAL]) as api:
        whole, streamed = await ask_both(api)
        assert whole["message"]["content"] is None
        assert streamed["content"] == ""


async def test_an_answer_without_a_call(tmp_path: Path) -> None:
    async with open_tools(tmp_path, HERMES, "Hello <b>!\n") as api:
        whole, streamed = await ask_both(api)
        assert whole["message"] == {"role": "assistant", "refusal": None, "content": "Hello <b>!\n"}
        assert streamed["content"] == "Hello <b>!\n"
        assert whole["finish_reason"] == streamed["finish_reason"] == "stop"


async def test_malformed_calls(tmp_path: Path) -> None:
    bad = '<tool_call>\n{"name": "add", "arguments": {"a": one}}\n</tool_call>'
    async with open_tools(tmp_path, HERMES, bad) as api:
        whole, streamed = await ask_both(api)
        # What a stream has told cannot be taken back; the whole reply is the same.
        assert calls_of(whole["message"]) == calls_of(streamed) == [("add", '{"a": one}')]
        assert whole["message"]["content"] == streamed["content"] == "}\n</tool_call>"
        assert whole["finish_reason"] == streamed["finish_reason"] == "stop"
    unknown = '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>'
    async with open_tools(tmp_path, HERMES, unknown) as api:
        whole, streamed = await ask_both(api)
        assert whole["message"]["content"] == streamed["content"] == unknown
        assert not streamed["tool_calls"]


async def test_a_call_that_is_cut_off(tmp_path: Path) -> None:
    async with open_tools(tmp_path, LLAMA3, SCRIPTS[LLAMA3].removeprefix("<|python_tag|>")) as api:
        whole, streamed = await ask_both(api, max_tokens=50)
        assert whole["finish_reason"] == streamed["finish_reason"] == "length"
        [(name, arguments)] = calls_of(whole["message"])
        assert name == "weather"
        assert calls_of(streamed) == [(name, arguments)]
        assert CITY.startswith(arguments)
        assert len(arguments) > 3
        # Likewise by a stop string.
        whole, streamed = await ask_both(api, stop=["rich"])
        assert whole["finish_reason"] == streamed["finish_reason"] == "stop"
        assert calls_of(whole["message"]) == calls_of(streamed) == [("weather", '{"city": "Zü')]


async def test_special_tokens(tmp_path: Path) -> None:
    """Those of calls are seen by the parser, others are left out of the content as ever."""
    script = "a<|other|>b" + SCRIPTS[MISTRAL]
    async with open_tools(tmp_path, MISTRAL, script) as api:
        whole, streamed = await ask_both(api)
        assert whole["message"]["content"] == streamed["content"] == "ab"
        assert calls_of(whole["message"]) == CALLS
        whole, _ = await ask_both(api, skip_special_tokens=False)
        assert whole["message"]["content"] == "a<|other|>b"
        # Without tools they are left out like the others.
        whole, _ = await ask_both(api, tool_choice="none")
        assert "[TOOL_CALLS]" not in whole["message"]["content"]
        assert whole["message"]["content"].startswith('ab [{"name": "weather"')


async def test_logprobs_are_those_of_all_tokens(tmp_path: Path) -> None:
    async with open_tools(tmp_path, MISTRAL_ARGS, SCRIPTS[MISTRAL_ARGS]) as api:
        whole, streamed = await ask_both(api, logprobs=True)
        told = [item["token"] for item in whole["logprobs"]["content"]]
        assert [item["token"] for item in streamed["logprobs"]] == told
        assert told[0] == "[TOOL_CALLS]"
        assert len(told) == len(api.knobs.scripts[0]) + 1


async def test_several_choices(tmp_path: Path) -> None:
    async with open_tools(tmp_path, HERMES, SCRIPTS[HERMES], "No.") as api:
        reply = (await ask(api, n=2)).json()
        first, second = reply["choices"]
        assert calls_of(first["message"]) == CALLS
        assert second["message"]["content"] == "No."
        assert [choice["finish_reason"] for choice in reply["choices"]] == ["tool_calls", "stop"]
        streamed = added_up(events(await ask(api, n=2, stream=True)))
        assert calls_of(streamed[0]) == CALLS
        assert streamed[1]["content"] == "No."


async def test_tools_are_shown_to_the_model(tmp_path: Path) -> None:
    async with open_tools(tmp_path, HERMES, "x") as api:
        await ask(
            api, tools=[tool("f", strict=True), {"type": "function", "function": {"name": "g"}}]
        )
        shown = prompt(api)
        assert '"name": "f", "description": "does f"' in shown
        assert '{"type": "function", "function": {"name": "g"}}' in shown
        assert "strict" not in shown
        for body in ({"tools": []}, {"tools": None}, {"tool_choice": "none"}):
            await ask(api, **body)
            assert prompt(api) == "<|user|>\n?<|end|>\n<|assistant|>\n"
            assert api.engine.seen[-1].sampling.structural_tag is None


async def test_a_template_for_tools(tmp_path: Path) -> None:
    """Where a model has one of its own for tools, it is taken if there are tools."""
    names = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": HERMES}]
    async with open_tools(tmp_path, None, "x") as api:
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(config | {"chat_template": names})
        )
        api.client.tokenizer = type(api.client.tokenizer).load(tmp_path)
        assert (await ask(api)).status_code == 200
        assert "does weather" in prompt(api)
        await ask(api, tools=None)
        assert prompt(api) == "?"


# -- what the model may write ------------------------------------------------------------------------------------------


def names_in(grammar: str | None) -> set[str]:
    return set(re.findall(r'"name\\+": \\+"(\w+)', grammar or ""))


NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("body", "names", "free", "several"),
    [
        ({}, set(), True, True),
        ({"tool_choice": "auto"}, set(), True, True),
        ({"tool_choice": "required"}, {"weather", "add"}, False, True),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            {"weather", "add"},
            False,
            False,
        ),
        ({"tool_choice": NAMED}, {"add"}, False, False),
        ({"parallel_tool_calls": False}, {"weather", "add"}, True, False),
        ({"parallel_tool_calls": True}, set(), True, True),
        ({"tools": [WEATHER, tool("add", strict=True)]}, {"weather", "add"}, True, True),
        (
            {"tool_choice": "required", "response_format": {"type": "text"}},
            {"weather", "add"},
            False,
            True,
        ),
    ],
)
async def test_grammars(
    tmp_path: Path, body: Reply, names: set[str], free: bool, several: bool
) -> None:
    async with open_tools(tmp_path, HERMES, "x") as api:
        reply = await ask(api, **body)
        assert reply.status_code == 200, reply.text
        grammar = api.engine.seen[-1].sampling.structural_tag
    assert names_in(grammar) == names
    if grammar is None:
        return
    assert ("any_text" in grammar) == free
    assert f'"stop_after_first": {json.dumps(not several)}' in grammar
    # The arguments of a call that must come obey its schema, of one that may come only if it is strict.
    strict = [
        each["function"]["name"] for each in body.get("tools", []) if each["function"].get("strict")
    ]
    for name in names:
        schema = f'"begin": "<tool_call>\\n{{\\"name\\": \\"{name}\\", \\"arguments\\": ", "content": {{"type": "json_schema", "json_schema": {{"type": "object"'
        assert schema in grammar
        has_schema = not free or name in strict
        assert (schema + "}" in grammar) == (not has_schema)


REFUSALS: list[tuple[Reply, str, str]] = [
    ({"tools": ["f"]}, "tools[0]", "an object with type and function"),
    (
        {"tools": [{"type": "custom", "custom": {}}]},
        "tools[0].type",
        '"custom"; allowed: "function"',
    ),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "an object with name"),
    ({"tools": [WEATHER | {"x": 1}]}, "tools[0].x", "not supported"),
    (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools[0].function.name",
        '"a b"',
    ),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "null"),
    ({"tools": [tool("f" * 65)]}, "tools[0].function.name", "1 to 64"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name", "different names"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "description": 5}}]},
        "tools[0].function.description",
        "a string",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]},
        "tools[0].function.strict",
        "true or false",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        "tools[0].function.parameters",
        "a JSON schema",
    ),
    (
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}
            ]
        },
        "tools[0].function.parameters.type",
        '"object"',
    ),
    (
        {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": {"type": "object", "properties": 1}},
                }
            ]
        },
        "tools[0].function.parameters.properties",
        "JSON schemas",
    ),
    (
        {
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": {"type": "object", "required": "a"}},
                }
            ]
        },
        "tools[0].function.parameters.required",
        "a list of names",
    ),
    ({"tool_choice": "any"}, "tool_choice", "none, auto, required"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "allowed_tools"),
    ({"tool_choice": {"type": "function", "name": "add"}}, "tool_choice.name", "not supported"),
    (
        {"tool_choice": {"type": "function", "function": {}}},
        "tool_choice.function.name",
        "weather, add",
    ),
    (
        {"tool_choice": {"type": "function", "function": {"name": "rm"}}},
        "tool_choice.function.name",
        '"rm"; allowed: the name of a tool: weather, add',
    ),
    ({"tools": None, "tool_choice": "required"}, "tool_choice", "only allowed with tools"),
    ({"regex": "a", "tool_choice": NAMED}, "regex", "regex and tools exclude each other"),
    ({"ebnf": 'root ::= "a"', "tool_choice": "required"}, "ebnf", "exclude each other"),
    ({"response_format": {"type": "json_object"}}, "response_format", "exclude each other"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls", "true or false"),
]


@pytest.mark.parametrize(("body", "param", "words"), REFUSALS)
async def test_refusals(tmp_path: Path, body: Reply, param: str, words: str) -> None:
    async with open_tools(tmp_path, HERMES, "x") as api:
        for stream in (False, True):
            reply = await ask(api, stream=stream, **body)
            assert reply.status_code == 400, reply.text
            assert words in message(reply)
            assert reply.json()["error"]["param"] == param
        assert not api.engine.seen


async def test_a_template_that_does_not_read_tools(tmp_path: Path) -> None:
    async with open_tools(tmp_path, PLAIN, "x", parser="hermes") as api:
        reply = await ask(api)
        assert reply.status_code == 400
        assert message(reply) == "tools: the model's chat template does not read tools"
        assert reply.json()["error"]["param"] == "tools"
        assert (await ask(api, tool_choice="none")).status_code == 200


async def test_the_parser_of_the_command_line(tmp_path: Path) -> None:
    for template in (XML, "{{ tools }}"):
        async with open_tools(tmp_path, template, "x") as api:
            reply = await ask(api)
            assert reply.status_code == 400
            assert "--tool-call-parser" in message(reply)
    for parser in ("hermes", "qwen", "qwen25"):
        async with open_tools(tmp_path, "{{ tools }}", SCRIPTS[HERMES], parser=parser) as api:
            assert calls_of((await ask_both(api))[0]["message"]) == CALLS
    # It wins over the template.
    async with open_tools(tmp_path, HERMES, SCRIPTS[LLAMA3], parser="llama3") as api:
        assert calls_of((await ask_both(api))[0]["message"]) == CALLS


@pytest.mark.parametrize("depth", [100, 250, 300, 2000])
async def test_deep_schemas(tmp_path: Path, depth: int) -> None:
    inner = '{"items":' * depth + "{}" + "}" * depth
    schema = f'{{"type": "object", "properties": {{"a": {inner}}}}}'
    tools = f'[{{"type": "function", "function": {{"name": "f", "parameters": {schema}}}}}]'
    data = f'{{"model": "base", "messages": [{{"role": "user", "content": "?"}}], "tools": {tools}, "tool_choice": "required"}}'
    async with open_tools(tmp_path, HERMES, "x") as api:
        reply = await api.http.post("/v1/chat/completions", content=data)
        assert reply.status_code in (200, 400), reply.text


async def test_a_schema_that_the_engine_refuses(tmp_path: Path) -> None:
    async with open_tools(tmp_path, HERMES, "x", refuse_grammar="#: not is not supported") as api:
        reply = await ask(api, tool_choice="required")
        assert reply.status_code == 400
        assert message(reply) == "tools: #: not is not supported"
        assert reply.json()["error"]["param"] == "tools"


# -- messages ----------------------------------------------------------------------------------------------------------


def history(arguments: str = SUM, call_id: str = "abcdefghi", **result: Any) -> list[Reply]:
    call = {"id": call_id, "type": "function", "function": {"name": "add", "arguments": arguments}}
    return [
        {"role": "user", "content": "1+2"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": call_id, "content": "3"} | result,
    ]


async def test_calls_and_results_in_messages(tmp_path: Path) -> None:
    wanted = {
        HERMES: '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|end|>\n<|tool|>\n'
        "<tool_response>3</tool_response>",
        LLAMA3: '{"name": "add", "parameters": {"a": 1, "b": 2}}<|ipython|>3',
        MISTRAL: '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}}][TOOL_RESULTS]3abcdefghi',
        # It joins the arguments to text, so they stay the string that they are.
        MISTRAL_ARGS: f"1+2[TOOL_CALLS]add[ARGS]{SUM}[TOOL_RESULTS]3",
    }
    for template, text in wanted.items():
        async with open_tools(tmp_path, template, "x") as api:
            reply = await ask(api, messages=history())
            assert reply.status_code == 200, reply.text
            assert text in prompt(api)
            parts = [{"type": "text", "text": "3"}]
            assert (await ask(api, messages=history(content=parts), tools=None)).status_code == 200
            assert text in prompt(api)


async def test_a_developer(tmp_path: Path) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "?"}]
    for template, role in (
        (HERMES, "system"),
        (HERMES + "{% if x == 'developer' %}{% endif %}", "developer"),
    ):
        async with open_tools(tmp_path, template, "x") as api:
            await ask(api, messages=messages, tools=None)
            assert prompt(api).startswith(f"<|{role}|>\nBe brief.<|end|>\n")


Edit = Callable[[list[Reply]], object]
BAD_MESSAGES: list[tuple[Edit, str, str]] = [
    (lambda m: m[2].pop("tool_call_id"), "messages[2].tool_call_id", "is null; allowed: the id"),
    (lambda m: m[2].update(tool_call_id=[]), "messages[2].tool_call_id", "is []"),
    (lambda m: m[2].update(tool_call_id="x"), "messages[2].tool_call_id", "tool_calls before it"),
    (lambda m: m[2].pop("content"), "messages[2].content", "is required"),
    (lambda m: m[1].update(tool_calls=5), "messages[1].tool_calls", "a list of tool calls"),
    (lambda m: m[1].update(tool_calls=[5]), "messages[1].tool_calls[0]", "an object with id"),
    (lambda m: m[1]["tool_calls"][0].pop("id"), "messages[1].tool_calls[0].id", "a string"),
    (
        lambda m: m[1]["tool_calls"][0].update(type="x"),
        "messages[1].tool_calls[0].type",
        '"function"',
    ),
    (lambda m: m[1]["tool_calls"][0].update(x=1), "messages[1].tool_calls[0].x", "not supported"),
    (lambda m: m[1]["tool_calls"][0].pop("function"), "messages[1].tool_calls[0].function", "name"),
    (
        lambda m: m[1]["tool_calls"][0]["function"].update(arguments={}),
        "messages[1].tool_calls[0].function.arguments",
        "a string",
    ),
    (
        lambda m: m[1]["tool_calls"][0]["function"].update(arguments="[1]"),
        "messages[1].tool_calls[0].function.arguments",
        "the JSON of an object",
    ),
    (lambda m: m[0].update(tool_calls=[]), "messages[0].tool_calls", "not supported"),
    (lambda m: m[1].update(tool_calls=[]), "messages[1].content", "is required"),
    (lambda m: m[1].update(tool_call_id="x"), "messages[1].tool_call_id", "not supported"),
]


@pytest.mark.parametrize(
    ("edit", "param", "words"),
    BAD_MESSAGES,
    ids=[f"{param}-{words}" for _, param, words in BAD_MESSAGES],
)
async def test_bad_messages(tmp_path: Path, edit: Edit, param: str, words: str) -> None:
    messages = history()
    edit(messages)
    async with open_tools(tmp_path, HERMES, "x") as api:
        reply = await ask(api, messages=messages)
        assert reply.status_code == 400, reply.text
        assert words in message(reply)
        assert reply.json()["error"]["param"] == param


async def test_messages_that_a_template_would_leave_out(tmp_path: Path) -> None:
    async with open_tools(tmp_path, PLAIN, "x") as api:
        reply = await ask(api, messages=history(), tools=None)
        assert "does not read tool_calls" in message(reply)
        assert reply.json()["error"]["param"] == "messages[1].tool_calls"
    reads_calls = PLAIN + "{{ messages[0].tool_calls }}"
    async with open_tools(tmp_path, reads_calls, "x") as api:
        reply = await ask(api, messages=history(), tools=None)
        assert "roles that the model's chat template reads" in message(reply)
    async with open_tools(tmp_path, MISTRAL, "x") as api:
        reply = await ask(api, messages=history(call_id="short"))
        assert reply.status_code == 400
        assert "ids have 9 characters" in message(reply)
