"""Readers of values that somebody else wrote. They return a value of the right type or raise an error that names the field.

Types are strict: a string is no number, a boolean is no integer. An integer does where a number is wanted.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, cast

from lorikeet.errors import Field, RequestError

# Characters of a wrong value in a message.
MAX_SHOWN = 80
_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxstring = 3, 8, 8, MAX_SHOWN


def shown(value: object) -> str:
    """A value as a message quotes it: its beginning, in one line, however large or deeply nested it is."""
    if isinstance(value, str):
        return f"{value[:MAX_SHOWN]!r:.{MAX_SHOWN}}"
    if isinstance(value, int):
        # The digits of a long integer take a time that is quadratic, and are refused by the interpreter.
        return repr(value) if value.bit_length() <= 256 else "an integer of many digits"
    return f"{_short.repr(value):.{MAX_SHOWN}}"


def refused(field: Field, value: object, allowed: str) -> RequestError:
    """The error of a value that is not ``allowed``."""
    return RequestError.about(field, f" is {shown(value)}; allowed: {allowed}")


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def read_integer(value: object, field: Field) -> int:
    if not is_integer(value):
        raise refused(field, value, "an integer")
    return value


def read_number(value: object, field: Field) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refused(field, value, "a number")
    try:
        return float(value)
    except OverflowError as error:
        raise refused(field, value, "a finite number") from error


def read_flag(value: object, field: Field) -> bool:
    if not isinstance(value, bool):
        raise refused(field, value, "true or false")
    return value


def read_text(value: object, field: Field, allowed: str = "a string") -> str:
    """A string; half of a surrogate pair, which JSON can spell but no text holds, is refused."""
    if not isinstance(value, str):
        raise refused(field, value, allowed)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise refused(field, value, "valid Unicode") from error
    return value


def read_list(value: object, field: Field, allowed: str) -> Sequence[Any]:
    if not is_list(value):
        raise refused(field, value, allowed)
    return value


def read_mapping(value: object, field: Field, allowed: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise refused(field, value, allowed)
    return cast("Mapping[Any, Any]", value)


def check_length(num: int, field: Field, most: float) -> None:
    """Refuse more than ``most`` entries of a list or an object."""
    if num > most:
        raise RequestError.about(field, f" has {num} entries; allowed: at most {most}")
