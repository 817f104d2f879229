"""Reads objects inside bodies of the OpenAI API, field by field; errors name the path to what is wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import UnionType
from typing import Any, cast

from lorikeet.errors import RequestError
from lorikeet.server.protocol import quote

Fields = dict[str, Any]


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
