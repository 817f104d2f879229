"""The bodies of the OpenAI API.

Every field is one of three kinds: it does something, it is *neutral* (it can change nothing about the reply, so it is
accepted), or the body is refused and the field named. Null counts as not given, whatever the field. What pydantic does not
read, objects inside of a body, is read field by field with the functions at the end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import islice
from types import UnionType
from typing import Any, Literal, cast

from pydantic import ConfigDict, Field, model_validator

from lorikeet.core.sampling import PARAMS
from lorikeet.errors import RequestError
from lorikeet.server.protocol import Body, Many, param_schema, quote

Fields = dict[str, Any]


class StrictBody(Body):
    """A body in which a field that nobody knows is an error."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        fields = cast(dict[str, object], value)
        given = {name: item for name, item in fields.items() if item is not None}
        unknown = (name for name in given if name not in cls.model_fields)
        # The first one is reported; there is no use in an error for each of a million.
        for name in list(islice(unknown, 1, None)):
            del given[name]
        return given


class NeutralFields(StrictBody):
    """Fields that are accepted because they change nothing, with the values for which that is true."""

    user: str | None = Field(None, description="a string")
    safety_identifier: str | None = Field(None, description="a string")
    prompt_cache_key: str | None = Field(None, description="a string")
    store: bool | None = Field(None, description="true or false")
    metadata: dict[str, Any] | None = Field(None, description="an object")
    service_tier: str | None = Field(None, description="a string")
    best_of: int | None = Field(None, description="the value of n (1 unless given)")


class StreamOptions(StrictBody):
    """``stream_options``."""

    include_usage: bool | None = Field(None, description="true or false")
    include_obfuscation: Literal[False] | None = Field(
        None, description="false: there is no padding"
    )
    continuous_usage_stats: Literal[False] | None = Field(
        None, description="false: usage comes once, in the last chunk"
    )


OPENAI_PARAMS = [param for param in PARAMS.values() if param.openai is not None]

_TYPES: Mapping[Any, Any] = {
    dict[int, float]: dict[str, Any],
    tuple[int, ...]: int | Many[int],
    tuple[str, ...]: str | Many[str],
}
"""Kind of a sampling parameter -> type of its field in a body, where they differ."""


def add_sampling_fields(body: dict[str, Any]) -> None:
    """Declare a field for each sampling parameter that the OpenAI API has.

    Args:
        body: the names of the class that is being defined.
    """
    for param in OPENAI_PARAMS:
        kind, words = _TYPES.get(param.kind, param.kind), param.words
        schema: dict[str, Any] = param_schema(param)
        if param.openai == "response_format":
            kind, schema = dict[str, Any], {}
            words = "an object whose type is text, json_object or json_schema"
        body["__annotations__"][param.openai] = kind | None
        body[str(param.openai)] = Field(None, description=words, json_schema_extra=schema)


class OpenAIBody(NeutralFields):
    """The fields that completions and chats share. Their values are checked by ``client/intake.py``."""

    model: str = Field(description="the base's name, BASE:ADAPTER or an adapter's name")
    lora_path: str | None = Field(None, description="an adapter's name or null")
    stream: bool | None = Field(None, description="true or false")
    stream_options: StreamOptions | None = Field(
        None, description="an object with include_usage, true or false"
    )
    add_sampling_fields(locals())


class EmbeddingBody(StrictBody):
    """``POST /v1/embeddings``."""

    model: str = Field(description="the base's name, BASE:ADAPTER or an adapter's name")
    input: str | Many[Any] = Field(
        description="a string, a list of strings, a list of token ids or a list of such lists"
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float or base64 (of little-endian float32)"
    )
    dimensions: int | None = Field(None, description="an integer")
    user: str | None = Field(None, description="a string")
    lora_path: str | None = Field(None, description="an adapter's name or null")
    pooling: Literal["last", "mean"] | None = Field(
        None, description="last (the last token's state) or mean (over all tokens)"
    )
    normalize: bool | None = Field(None, description="true or false")


class CompletionBody(OpenAIBody):
    """``POST /v1/completions``."""

    prompt: str | Many[Any] = Field(
        description="a string, a list of strings, a list of token ids or a list of such lists"
    )
    logprobs: int | None = Field(None, description="an integer")
    echo: bool | None = Field(None, description="true or false")
    suffix: Literal[""] | None = Field(None, description="empty: filling in is not supported")


class ChatBody(OpenAIBody):
    """``POST /v1/chat/completions``."""

    messages: Many[dict[str, Any]] = Field(description="a list of objects with role and content")
    max_completion_tokens: int | None = Field(None, description="an integer")
    logprobs: bool | None = Field(None, description="true or false")
    top_logprobs: int | None = Field(None, description="an integer")
    modalities: Many[Literal["text"]] | None = Field(None, description='["text"]')
    parallel_tool_calls: bool | None = Field(None, description="true or false")
    tools: Many[Any] | None = Field(None, description="a list of functions")
    tool_choice: str | dict[str, Any] | None = Field(
        None, description="none, auto, required or an object that names a function"
    )


def refusal(where: str, value: object, allowed: str) -> RequestError:
    """The error of a value that is not ``allowed``."""
    return RequestError(f"{where} is {quote(value)}; allowed: {allowed}", where)


def check_keys(value: Mapping[str, Any], allowed: Collection[str], where: str) -> None:
    """Refuse keys of an object that are not ``allowed``, unless they are null.

    Raises:
        RequestError: names the key.
    """
    for name, item in value.items():
        if item is not None and name not in allowed:
            raise RequestError(
                f"{where}.{name}: is not supported; allowed: {', '.join(sorted(allowed))}",
                f"{where}.{name}",
            )


def read_field(
    fields: Mapping[str, Any], name: str, where: str, kind: type | UnionType, allowed: str
) -> Any:
    """The value of a field of an object; null if it is missing.

    Raises:
        RequestError: it is not of this kind.
    """
    value = fields.get(name)
    if not isinstance(value, kind):
        raise refusal(f"{where}.{name}", value, allowed)
    return value


def read_function(
    value: object, where: str, keys: Collection[str], *more: str, form: str
) -> tuple[Fields, Fields]:
    """An object ``{"type": "function", "function": {...}}`` and the inner object.

    Args:
        keys: of the inner object.
        more: keys of the outer one.
        form: what is allowed in its place, in words.

    Raises:
        RequestError: it has another form or other keys.
    """
    if not isinstance(value, dict):
        raise refusal(where, value, form)
    outer = cast(Fields, value)
    if outer.get("type") != "function":
        raise refusal(f"{where}.type", outer.get("type"), '"function"')
    check_keys(outer, ("type", "function", *more), where)
    wanted = f"an object with {' and '.join(keys)}"
    inner = cast(Fields, read_field(outer, "function", where, dict, wanted))
    check_keys(inner, keys, f"{where}.function")
    return outer, inner
