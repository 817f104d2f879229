"""Checks the messages of a chat and brings them into the form that chat templates read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import orjson

from lorikeet.errors import RequestError
from lorikeet.server.openai.bodies import check_keys, read_field, read_function, refusal
from lorikeet.server.reading import check_values
from lorikeet.text.chat import TemplateFacts

Message = dict[str, Any]

_FIELDS = ("role", "content", "name")
_MORE_FIELDS = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}


def plain_messages(messages: list[dict[str, Any]], facts: TemplateFacts) -> list[Message]:
    """Check messages and prepare them for a template: contents become strings, arguments of calls what it can write.

    Parts of a content are joined by line breaks. A developer is called system where the template knows no developer.

    Args:
        facts: about the template that they are for.

    Raises:
        RequestError: a field or a part that is not supported, or that the template would leave out.
    """
    call_ids: set[str] = set()
    if not facts.joins_arguments:
        # They are parsed, too. What follows one that is no JSON, and may be miscounted, is never reached.
        arguments = "".join(_arguments(messages)).encode()
        check_values(arguments, "messages: the arguments of tool_calls have", "messages")
    plain = [
        _plain_message(item, f"messages[{i}]", call_ids, facts) for i, item in enumerate(messages)
    ]
    if not facts.knows("developer"):
        plain = [
            item | {"role": "system"} if item["role"] == "developer" else item for item in plain
        ]
    return plain


def _plain_message(
    message: Mapping[str, Any], where: str, call_ids: set[str], facts: TemplateFacts
) -> Message:
    """One message; ``call_ids`` are those of the calls before it, its own are added."""
    given = {name: value for name, value in message.items() if value is not None}
    role = given.get("role")
    check_keys(given, (*_FIELDS, *_MORE_FIELDS.get(str(role), ())), where)
    calls: list[Message] = []
    if given.get("tool_calls"):
        calls = _read_calls(given["tool_calls"], f"{where}.tool_calls", facts)
        call_ids.update(call["id"] for call in calls)
        given.setdefault("content", "")
    for name in ("role", "content"):
        if name not in given:
            raise RequestError(f"{where}.{name}: is required", f"{where}.{name}")
    for name in ("role", "name"):
        read_field(given, name, where, str | None, "a string")
    if role == "function":
        raise refusal(f"{where}.role", role, "tool, for the result of a call")
    if role == "tool":
        _check_result(given, where, call_ids, facts)
    plain = {name: value for name, value in given.items() if name != "tool_calls"}
    plain["content"] = _text_of(given["content"], f"{where}.content")
    return plain | {"tool_calls": calls} if calls else plain


def _check_result(message: Message, where: str, call_ids: set[str], facts: TemplateFacts) -> None:
    if not facts.knows("tool"):
        raise refusal(f"{where}.role", "tool", "roles that the model's chat template reads")
    allowed = "the id of one of the tool_calls before it"
    if read_field(message, "tool_call_id", where, str, allowed) not in call_ids:
        raise refusal(f"{where}.tool_call_id", message["tool_call_id"], allowed)


def _read_calls(value: object, where: str, facts: TemplateFacts) -> list[Message]:
    if not facts.knows("tool_calls"):
        raise RequestError(f"{where}: the model's chat template does not read tool_calls", where)
    if not isinstance(value, list):
        raise refusal(where, value, "a list of tool calls")
    items = enumerate(cast(list[object], value))
    return [_read_call(item, f"{where}[{index}]", facts) for index, item in items]


def _read_call(value: object, where: str, facts: TemplateFacts) -> Message:
    form = "an object with id, type and function"
    outer, function = read_function(value, where, ("name", "arguments"), "id", form=form)
    read_field(outer, "id", where, str, "a string")
    where = f"{where}.function"
    read_field(function, "name", where, str, "a string")
    arguments = read_field(function, "arguments", where, str, "a string")
    if not facts.joins_arguments:
        arguments = _read_arguments(arguments, f"{where}.arguments")
    return {**outer, "function": {**function, "arguments": arguments}}


def _arguments(messages: list[dict[str, Any]]) -> Iterator[str]:
    """The arguments of all well-formed calls."""
    for message in messages:
        calls = message.get("tool_calls")
        for call in cast(list[Any], calls) if isinstance(calls, list) else []:
            match call:
                case {"function": {"arguments": str(text)}}:
                    yield text
                case _:
                    pass


def _read_arguments(text: str, where: str) -> object:
    """Most templates write arguments as JSON themselves: a string would come out as a string of JSON."""
    try:
        arguments: object = orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        raise refusal(where, text, "the JSON of an object")
    return cast(object, arguments)


def _text_of(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refusal(where, content, "a string or a list of text parts")
    texts: list[str] = []
    for index, item in enumerate(cast(list[dict[str, object]], content)):
        match item:
            case {"type": "text", "text": str(text), **others} if not others:
                texts.append(text)
            case _:
                raise refusal(f"{where}[{index}]", item, '{"type": "text", "text": a string}')
    return "\n".join(texts)
