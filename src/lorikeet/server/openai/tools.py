"""``tools``, ``tool_choice`` and ``parallel_tool_calls`` of a chat: checked, and what follows from them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import orjson

from lorikeet.errors import RequestError
from lorikeet.server.openai.bodies import ChatBody
from lorikeet.server.openai.objects import read_field, read_function, refusal
from lorikeet.server.openai.tool_forms import ToolForm, find_form
from lorikeet.server.protocol import quote

Schema = dict[str, Any]

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_NAMES = "1 to 64 letters, digits, dots, dashes or underscores"
_CHOICES = ("none", "auto", "required")
_NO_PARAMETERS: Schema = {"type": "object", "properties": {}}
_ANY_ARGUMENTS: Schema = {"type": "object"}
_EXCLUDED = ("response_format", "regex", "ebnf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One function.

    Attributes:
        prompt: as chat templates show it to the model.
        schema: of its arguments.
        strict: its arguments obey the schema, also if the model is free to call it or not.
    """

    name: str
    prompt: dict[str, Any]
    schema: Schema
    strict: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What a call may do with tools.

    Attributes:
        prompt: the tools as chat templates show them.
        names: that the model may call.
        grammar: structural tag that the output obeys; None if the model writes what it likes.
    """

    prompt: list[dict[str, Any]]
    names: frozenset[str]
    form: ToolForm
    grammar: str | None


def read_tools(body: ChatBody, parser: str | None, template: str) -> ToolUse | None:
    """What a body says of tools; None if it has none, or they may not be called.

    Args:
        parser: the value of ``--tool-call-parser``.
        template: that renders the messages.

    Raises:
        RequestError: names the field and what is allowed.
    """
    tools = _read_list(body.tools or [])
    choice = _read_choice(body.tool_choice, tools)
    if choice == "none":
        return None
    for name in _EXCLUDED:
        value = getattr(body, name)
        if value is not None and not (name == "response_format" and value.get("type") == "text"):
            raise RequestError(f"{name} and tools exclude each other; give one", name)
    form = find_form(parser, template)
    if form is None:
        raise RequestError(
            "tools: the form of this model's tool calls cannot be told from its chat template; the server must be "
            "started with --tool-call-parser",
            "tools",
        )
    parallel = body.parallel_tool_calls is not False
    return ToolUse(
        prompt=[tool.prompt for tool in tools.values()],
        names=frozenset(tools),
        form=form,
        grammar=_grammar(tools, choice, form, parallel=parallel),
    )


def _grammar(
    tools: Mapping[str, Tool], choice: str | Tool, form: ToolForm, *, parallel: bool
) -> str | None:
    """Calls that must come obey their schemas; those that may come do so for strict tools."""
    if isinstance(choice, Tool):
        return form.grammar({choice.name: choice.schema}, must_call=True, parallel=False)
    if choice == "required":
        schemas = {name: tool.schema for name, tool in tools.items()}
        return form.grammar(schemas, must_call=True, parallel=parallel)
    if parallel and not any(tool.strict for tool in tools.values()):
        return None
    schemas = {name: tool.schema if tool.strict else _ANY_ARGUMENTS for name, tool in tools.items()}
    return form.grammar(schemas, must_call=False, parallel=parallel)


def _read_list(values: list[Any]) -> dict[str, Tool]:
    tools: dict[str, Tool] = {}
    for index, value in enumerate(values):
        where = f"tools[{index}]"
        tool = _read_tool(value, where)
        if tool.name in tools:
            raise RequestError(
                f"{where}.function.name is {quote(tool.name)} like that of another tool; allowed: different names",
                f"{where}.function.name",
            )
        tools[tool.name] = tool
    return tools


def _read_tool(value: object, where: str) -> Tool:
    keys = ("name", "description", "parameters", "strict")
    _, fields = read_function(value, where, keys, form="an object with type and function")
    where = f"{where}.function"
    name = read_field(fields, "name", where, str | None, _NAMES)
    if name is None or not _NAME.fullmatch(name):
        raise refusal(f"{where}.name", name, _NAMES)
    read_field(fields, "description", where, str | None, "a string")
    strict = read_field(fields, "strict", where, bool | None, "true or false")
    shown = {key: item for key, item in fields.items() if item is not None and key != "strict"}
    return Tool(
        name=name,
        prompt={"type": "function", "function": shown},
        schema=_read_schema(fields.get("parameters"), f"{where}.parameters"),
        strict=bool(strict),
    )


def _read_schema(value: object, where: str) -> Schema:
    """The schema of a tool's arguments, which are an object. What else is in it is checked if it is to be obeyed."""
    if value is None or value == {}:
        return _NO_PARAMETERS
    if not isinstance(value, dict):
        raise refusal(where, value, "a JSON schema")
    schema = cast(Schema, value)
    if schema.get("type") != "object":
        raise refusal(f"{where}.type", schema.get("type"), '"object"')
    read_field(schema, "properties", where, dict | None, "an object of JSON schemas")
    read_field(schema, "required", where, list | None, "a list of names")
    try:
        orjson.dumps(schema)  # has a bound on depth, which templates and grammars have not
    except orjson.JSONEncodeError as error:
        raise RequestError(f"{where} cannot be used: {error}", where) from error
    return schema


def _read_choice(value: object, tools: Mapping[str, Tool]) -> str | Tool:
    """One of ``_CHOICES``, or the tool to be called."""
    if value is None:
        return "auto" if tools else "none"
    if value != "none" and not tools:
        raise RequestError("tool_choice: is only allowed with tools", "tool_choice")
    if isinstance(value, str) and value in _CHOICES:
        return value
    where = "tool_choice"
    form = f'{", ".join(_CHOICES)} or {{"type": "function", "function": {{"name": ...}}}}'
    _, inner = read_function(value, where, ("name",), form=form)
    tool = tools.get(str(inner.get("name")))
    if tool is None:
        allowed = f"the name of a tool: {', '.join(tools)}"
        raise refusal(f"{where}.function.name", inner.get("name"), allowed)
    return tool
