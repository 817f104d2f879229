"""One option and its value: what it may be, and how it is read from text, YAML or Python.

The command line (text), a YAML file and the keywords of ``LLM`` are read by the same :func:`read_value`, so a value is
refused in the same words wherever it comes from.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, cast, get_args, get_origin

from lorikeet.config.lora_paths import LoRAPath, parse_lora_path
from lorikeet.errors import ConfigError, Field, RequestError
from lorikeet.fields import read_flag, read_integer, read_number, refused


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value.

    Attributes:
        noun: what it is called where another value is refused.
        summary: what it is called in the table of options.
        read: makes a value of this kind of what was given, of each item if it is a list; raises RequestError or
            ValueError if it cannot.
    """

    noun: str
    summary: str
    read: Callable[[object, Field], object]
    is_list: bool = False


def _read_text(value: object, field: Field) -> str:
    if isinstance(value, str) and value.strip():
        return value
    raise refused(field, value, "text")


def _read_integer(value: object, field: Field) -> int:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value.strip()):
        return int(value)
    return read_integer(value, field)


def _read_number(value: object, field: Field) -> float:
    return float(value) if isinstance(value, str) else read_number(value, field)


def _read_lora_path(value: object, _field: Field) -> LoRAPath:
    return parse_lora_path(value)


_KINDS: dict[object, Kind] = {
    str: Kind("text", "text", _read_text),
    int: Kind("an integer", "integer", _read_integer),
    float: Kind("a number", "number", _read_number),
    bool: Kind("true or false", "flag", read_flag),
    tuple[str, ...]: Kind("a list of names", "names", _read_text, is_list=True),
    tuple[int, ...]: Kind("a list of integers", "integers", _read_integer, is_list=True),
    tuple[LoRAPath, ...]: Kind(
        "a list of PATH, NAME=PATH or JSON",
        "`PATH`, `NAME=PATH` or JSON; any number",
        _read_lora_path,
        is_list=True,
    ),
}
_BOUNDS: tuple[tuple[str, str, Callable[[Any, float], bool]], ...] = (
    ("least", "at least", operator.ge),
    ("most", "at most", operator.le),
    ("above", "above", operator.gt),
    ("below", "below", operator.lt),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option as the help, the readers and the documentation need it.

    Attributes:
        meaning: one line for the help.
        auto: in words, what None stands for.
        choices: the allowed values; also taken from a ``Literal`` type.
        least, most: inclusive bounds; ``above`` and ``below`` are exclusive ones.
        secret: never shown in a representation.
        name, type, default, required: filled in from the dataclass field.
    """

    meaning: str
    auto: str | None = None
    aliases: tuple[str, ...] = ()
    choices: tuple[object, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    secret: bool = False
    name: str = ""
    type: Any = str
    default: object = None
    required: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def flags(self) -> tuple[str, ...]:
        return (self.flag, *("--" + alias for alias in self.aliases))

    @property
    def value_type(self) -> Any:
        """The type without ``| None``, and ``str`` for a Literal of strings."""
        kind = self.type
        if get_origin(kind) is UnionType:
            kind = next(part for part in get_args(kind) if part is not NoneType)
        return str if get_origin(kind) is Literal else kind

    @property
    def kind(self) -> Kind:
        return _KINDS[self.value_type]

    @property
    def allowed_values(self) -> tuple[object, ...]:
        return get_args(self.type) if get_origin(self.type) is Literal else self.choices

    @property
    def allows_none(self) -> bool:
        return NoneType in get_args(self.type)

    @property
    def default_text(self) -> str:
        """The default as the help and the documentation show it."""
        default = self.default
        if self.required:
            return "required"
        if default is None:
            return self.auto or "none"
        if isinstance(default, bool):
            return "on" if default else "off"
        if isinstance(default, tuple):
            return " ".join(map(str, cast("tuple[object, ...]", default))) or "none"
        return str(default)

    @property
    def bounds(self) -> list[tuple[str, float, Callable[[Any, float], bool]]]:
        """Each bound: in words, its number, and the comparison that holds for what is allowed."""
        found = [(words, getattr(self, name), holds) for name, words, holds in _BOUNDS]
        return [bound for bound in found if bound[1] is not None]


def read_value(option: Option, value: object) -> object:
    """Turn what was given into the option's type and check its range. A value of the right type stays as it is, and a
    lone value of a list is a list of one, as a YAML file may write it.

    Raises:
        ConfigError: names the option, the value and what is allowed.
    """
    if value is None and option.allows_none:
        return None
    if not option.kind.is_list:
        return _read_one(option, value)
    items = cast("Iterable[object]", value) if isinstance(value, list | tuple) else [value]
    return tuple(_read_one(option, item) for item in items)


def _read_one(option: Option, given: object) -> object:
    try:
        value = option.kind.read(given, (option.name,))
    except (RequestError, ValueError):
        raise _refuse(option, given) from None
    if option.allowed_values and value not in option.allowed_values:
        raise _refuse(option, given)
    if not all(holds(value, bound) for _, bound, holds in option.bounds):
        raise _refuse(option, given)
    return value


def _refuse(option: Option, given: object) -> ConfigError:
    if option.secret and isinstance(given, str):  # a key may be any other text
        return ConfigError(f"{option.flag} is empty; allowed: a key, or no such option")
    shown = "***" if option.secret else given if isinstance(given, int | float) else repr(given)
    return ConfigError(f"{option.flag} is {shown}; allowed: {_allowed(option)}")


def _allowed(option: Option) -> str:
    if option.allowed_values:
        return ", ".join(str(choice) for choice in option.allowed_values)
    bounds = " and ".join(f"{words} {bound}" for words, bound, _ in option.bounds)
    return f"{option.kind.noun} {bounds}".strip()
