"""Checks ``tools``, ``tool_choice`` and ``parallel_tool_calls`` of a chat, and says what the model may write.

Models write calls in different forms: the second half says which parser reads a form, and which grammar admits nothing else.
"""

from __future__ import annotations

import json
import re
import secrets
import string
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import orjson

from lorikeet.errors import RequestError
from lorikeet.server.openai.bodies import ChatBody, read_field, read_function, refusal
from lorikeet.server.openai.tool_parsers import (
    HermesParser,
    Llama3Parser,
    MistralParser,
    ToolCallParser,
)
from lorikeet.server.protocol import quote

Schema = dict[str, Any]
Format = dict[str, Any]
"""A format of a structural tag."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_NAMES = "1 to 64 letters, digits, dots, dashes or underscores"
_CHOICES = ("none", "auto", "required")
_NO_PARAMETERS: Schema = {"type": "object", "properties": {}}
_ANY_ARGUMENTS: Schema = {"type": "object"}
_EXCLUDED = ("response_format", "regex", "ebnf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One function that the model may call.

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
    """The tools of a chat, and how its model may call them.

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
    """Read the tools of a body; None if it has none, or they may not be called.

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
    """The grammar of the output. Calls that must come obey their schemas; others do so if their tool is strict."""
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


# A model that writes white space for ever would never come to its arguments.
_MAX_WHITESPACE = 64
_ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolForm:
    """A form in which models write calls.

    Attributes:
        begin, end: what surrounds the arguments; ``%s`` stands for the tool's name.
        separator: between two calls.
        opening, closing: around all calls.
        is_bare: calls are the first thing of an output, without a marker.
        id_length: of the ids that the model's template accepts; None: any.
    """

    parser: type[ToolCallParser]
    begin: str
    end: str = "}"
    separator: str
    opening: str = ""
    closing: str = ""
    is_bare: bool = False
    id_length: int | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens, and have to be seen all the same."""
        return (*self.parser.markers, *self.parser.other_markers)

    def make_id(self) -> str:
        """An id for a call."""
        if self.id_length is None:
            return f"call_{uuid.uuid4().hex}"
        return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(self.id_length))

    def grammar(self, schemas: Mapping[str, Format], *, must_call: bool, parallel: bool) -> str:
        """The structural tag of outputs whose calls are of these tools.

        Args:
            schemas: name -> JSON schema of its arguments.
            must_call: nothing but calls, at least one; else text may come first, or alone.
            parallel: several calls are allowed.
        """
        calls = self._calls(schemas, parallel=parallel)
        return json.dumps(
            {"type": "structural_tag", "format": calls if must_call else self._or_text(calls)}
        )

    def _calls(self, schemas: Mapping[str, Format], *, parallel: bool) -> Format:
        tags = [
            {
                "type": "tag",
                "begin": self.begin % name,
                "content": {
                    "type": "json_schema",
                    "json_schema": schema,
                    "max_whitespace_cnt": _MAX_WHITESPACE,
                },
                "end": self.end,
            }
            for name, schema in schemas.items()
        ]
        calls: Format = {
            "type": "tags_with_separator",
            "tags": tags,
            "separator": self.separator,
            "at_least_one": True,
            "stop_after_first": not parallel,
        }
        if not self.opening:
            return calls
        return _sequence(_constant(self.opening), calls, _constant(self.closing))

    def _or_text(self, calls: Format) -> Format:
        text: Format = {"type": "any_text", "excludes": list(self.parser.markers)}
        if not self.is_bare:
            return _either(text, _sequence(text, calls))
        # Where the first character decides, text begins with one that no call begins with.
        first: Format = {"type": "regex", "pattern": r"[^{<\s]"}
        marked = [_sequence(_constant(marker), calls) for marker in self.parser.markers]
        return _either(_sequence(first, text), calls, *marked)


def _constant(value: str) -> Format:
    return {"type": "const_string", "value": value}


def _sequence(*elements: Format) -> Format:
    return {"type": "sequence", "elements": list(elements)}


def _either(*elements: Format) -> Format:
    return {"type": "or", "elements": list(elements)}


_HERMES = ToolForm(
    parser=HermesParser,
    begin='<tool_call>\n{"name": "%s", "arguments": ',
    end="}\n</tool_call>",
    separator="\n",
)
_LLAMA3 = ToolForm(
    parser=Llama3Parser, begin='{"name": "%s", "parameters": ', separator="; ", is_bare=True
)
_MISTRAL = ToolForm(
    parser=MistralParser,
    begin='{"name": "%s", "arguments": ',
    separator=", ",
    opening="[TOOL_CALLS] [",
    closing="]",
    id_length=9,
)
_MISTRAL_ARGS = ToolForm(
    parser=MistralParser, begin="[TOOL_CALLS]%s[ARGS]", end="", separator="", id_length=9
)

# Names of --tool-call-parser.
_FORMS = {
    "hermes": _HERMES,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
    "qwen": _HERMES,
    "qwen25": _HERMES,
}
# Jinja strings may have escaped quotes.
_ARGUMENTS_KEY = re.compile(r'\\?"arguments\\?":')
_NAME_KEY = re.compile(r'\{\\?"name\\?":')
_PARAMETERS_KEY = re.compile(r'\\?"parameters\\?":')


def find_form(parser: str | None, template: str) -> ToolForm | None:
    """The form of a model's calls; None if it cannot be told.

    Args:
        parser: the value of ``--tool-call-parser``; None: the template decides.
        template: Jinja source that writes calls as the model does.
    """
    name = parser or _detect(template)
    if name == "mistral" and "[ARGS]" in template:
        return _MISTRAL_ARGS
    return None if name is None else _FORMS[name]


def _detect(template: str) -> str | None:
    if "[TOOL_CALLS]" in template:
        return "mistral"
    # Others put XML between these tags.
    if "<tool_call>" in template:
        return "hermes" if _ARGUMENTS_KEY.search(template) else None
    if "<|python_tag|>" in template or _has_both(template):
        return "llama3"
    return None


def _has_both(template: str) -> bool:
    """A name, and parameters somewhere behind it. In one expression it would be quadratic."""
    name = _NAME_KEY.search(template)
    return name is not None and _PARAMETERS_KEY.search(template, name.end()) is not None
