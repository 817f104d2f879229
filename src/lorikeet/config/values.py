"""One option and its value: what it may be, and how it is read from text, YAML or Python.

The same reader serves the command line (strings), a YAML file and the keywords of ``LLM``, so that a value is refused
in the same words wherever it comes from.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, cast, get_args, get_origin

from lorikeet.errors import ConfigError
from lorikeet.masking import mask

#: Where an adapter may come from.
LORA_SOURCES = ("local", "hub", "http", "https", "s3", "gs")


@dataclass(frozen=True, slots=True)
class LoRAPath:
    """An adapter to load: its name in requests, where it is, and whether it stays on the device."""

    name: str
    path: str
    pinned: bool = False


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
        return type(get_args(kind)[0]) if get_origin(kind) is Literal else kind

    @property
    def allowed_values(self) -> tuple[object, ...]:
        return get_args(self.type) if get_origin(self.type) is Literal else self.choices

    @property
    def allows_none(self) -> bool:
        return NoneType in get_args(self.type)

    @property
    def default_text(self) -> str:
        """The default as the help and the documentation show it."""
        if self.required:
            return "required"
        if self.default is None:
            return self.auto or "none"
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        if isinstance(self.default, tuple):
            return " ".join(map(str, cast("tuple[object, ...]", self.default))) or "none"
        return str(self.default)


def read_value(option: Option, value: object) -> object:
    """Turn what was given into the option's type and check its range. A value of the right type stays as it is.

    Raises:
        ConfigError: names the option, the value and what is allowed.
    """
    if value is None and option.allows_none:
        return None
    reader = _READERS[option.value_type]
    result = reader(option, value)
    for item in cast("tuple[object, ...]", result) if isinstance(result, tuple) else (result,):
        if not _in_range(option, item):
            raise _refuse(option, value)
    return result


def _in_range(option: Option, item: object) -> bool:
    if option.allowed_values and item not in option.allowed_values:
        return False
    if isinstance(item, bool) or not isinstance(item, int | float):
        return True
    return (
        (option.least is None or item >= option.least)
        and (option.most is None or item <= option.most)
        and (option.above is None or item > option.above)
        and (option.below is None or item < option.below)
    )


def _refuse(option: Option, value: object) -> ConfigError:
    shown = "***" if option.secret else value if isinstance(value, int | float) else repr(value)
    return ConfigError(f"{option.flag} is {shown}; allowed: {_allowed(option)}")


def _allowed(option: Option) -> str:
    if option.allowed_values:
        return ", ".join(str(choice) for choice in option.allowed_values)
    noun = _NOUNS[option.value_type]
    bounds = [
        f"{word} {bound}"
        for word, bound in (
            ("at least", option.least),
            ("at most", option.most),
            ("above", option.above),
            ("below", option.below),
        )
        if bound is not None
    ]
    return f"{noun} {' and '.join(bounds)}".strip()


def _read_text(option: Option, value: object) -> object:
    if option.secret and isinstance(value, str) and not value.strip():
        raise ConfigError(f"{option.flag} is empty; allowed: a key, or no such option")
    if not isinstance(value, str) or not value.strip():
        raise _refuse(option, value)
    return value


def _read_integer(option: Option, value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value.strip()):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refuse(option, value)
    return value


def _read_number(option: Option, value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _refuse(option, value)
    try:
        return float(value)
    except ValueError:
        raise _refuse(option, value) from None


def _read_flag(option: Option, value: object) -> object:
    if not isinstance(value, bool):
        raise _refuse(option, value)
    return value


def _items(option: Option, value: object) -> list[object]:
    """A lone value is a list of one, as a YAML file may write it."""
    if isinstance(value, list | tuple):
        return list(cast("Iterable[object]", value))
    if isinstance(value, str | int | Mapping | LoRAPath):
        return [cast("object", value)]
    raise _refuse(option, value)


def _read_names(option: Option, value: object) -> object:
    return tuple(_read_text(option, item) for item in _items(option, value))


def _read_integers(option: Option, value: object) -> object:
    return tuple(_read_integer(option, item) for item in _items(option, value))


def _read_lora_paths(option: Option, value: object) -> object:
    return parse_lora_paths(_items(option, value))


_READERS: dict[object, Callable[[Option, object], object]] = {
    str: _read_text,
    int: _read_integer,
    float: _read_number,
    bool: _read_flag,
    tuple[str, ...]: _read_names,
    tuple[int, ...]: _read_integers,
    tuple[LoRAPath, ...]: _read_lora_paths,
}
_NOUNS = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    tuple[str, ...]: "a list of names",
    tuple[int, ...]: "a list of integers",
    tuple[LoRAPath, ...]: "a list of PATH, NAME=PATH or JSON",
}

# ---- --lora-paths ----

_KEYS = ("lora_name", "lora_path", "pinned")
_MANGLED = re.compile(r"(?:^\{|^|[{,])\s*\"?(lora_name|lora_path|pinned)\"?\s*:\s*\"?([^,}\"]*)\"?")


def parse_lora_paths(entries: Iterable[object]) -> tuple[LoRAPath, ...]:
    """Read the entries of ``--lora-paths``: ``PATH`` (its own name), ``NAME=PATH``, JSON or a mapping.

    Raises:
        ConfigError: an entry cannot be read; a shell that ate the quotes of the JSON is recognised.
    """
    try:
        return tuple(_parse_lora_path(entry) for entry in entries)
    except ConfigError as error:
        raise ConfigError(mask(str(error))) from None


def _parse_lora_path(entry: object) -> LoRAPath:
    if isinstance(entry, LoRAPath):
        return entry
    if isinstance(entry, Mapping):
        return _from_mapping(cast("Mapping[object, object]", entry), str(cast("object", entry)))
    if not isinstance(entry, str) or not entry.strip():
        raise ConfigError(f"--lora-paths has the entry {entry!r}; allowed: PATH, NAME=PATH or JSON")
    text = entry.strip()
    if text.startswith("{"):
        return _from_json(text)
    if _MANGLED.match(text):
        raise _quoting(text)
    name, separator, path = text.partition("=")
    if "://" in name and (separator or set("?#@") & set(name)):
        # The "=" of a query is no separator, and as a name the URL's keys would be seen by everybody.
        raise ConfigError("--lora-paths has a URL with a query or a password; allowed: NAME=URL")
    if not separator:
        return LoRAPath(name=text, path=text)
    if not name.strip() or not path.strip():
        raise ConfigError(f"--lora-paths has {text!r}; allowed: NAME=PATH with both of them")
    return LoRAPath(name=name.strip(), path=path.strip())


def _from_json(text: str) -> LoRAPath:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if not {'"', "'"} & set(text) and _MANGLED.search(text):
            raise _quoting(text) from None
        if meant := _from_python(text):
            raise ConfigError(
                f"--lora-paths has {text!r}, which is Python and not JSON; write it as "
                f"--lora-paths '{_example(meant.name, meant.path, pinned=meant.pinned)}'"
            ) from None
        raise ConfigError(
            f"--lora-paths has {text!r}, which is not JSON ({error.msg} at character {error.pos}); "
            f"allowed: {_example('NAME', 'PATH', pinned=False)}"
        ) from None
    return _from_mapping(cast("dict[object, object]", value), text)


def _from_python(text: str) -> LoRAPath | None:
    """What an object means that is written as in Python: ``True``, single quotes, a comma at the end."""
    try:
        value: object = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return (
        _from_mapping(cast("dict[object, object]", value), text)
        if isinstance(value, dict)
        else None
    )


def _from_mapping(value: Mapping[object, object], shown: str) -> LoRAPath:
    if unknown := [str(key) for key in value if key not in _KEYS]:
        raise ConfigError(
            f"--lora-paths has {shown}: unknown key {', '.join(unknown)}; known: {', '.join(_KEYS)}"
        )
    for key in _KEYS[:2]:
        text = value.get(key)
        if key not in value:
            raise ConfigError(f"--lora-paths has {shown}: the key {key} is missing")
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"--lora-paths has {shown}: {key} must be text that is not empty")
    pinned = value.get("pinned", False)
    if not isinstance(pinned, bool):
        raise ConfigError(f"--lora-paths has {shown}: pinned must be true or false")
    return LoRAPath(str(value["lora_name"]), str(value["lora_path"]), pinned)


def _quoting(text: str) -> ConfigError:
    """The shell has eaten the quotes: rebuild the JSON from what is left and show it quoted."""
    found = {match[1]: match[2].strip() for match in _MANGLED.finditer(text)}
    pinned = found.get("pinned", "false").lower()
    if pinned not in ("true", "false"):
        raise ConfigError(f"--lora-paths has {text!r}: pinned must be true or false")
    example = _example(
        found.get("lora_name") or "NAME",
        found.get("lora_path") or "PATH",
        pinned=pinned == "true",
    )
    return ConfigError(
        f"--lora-paths has {text!r}: the shell has removed the quotes of the JSON; put it in single quotes: "
        f"--lora-paths '{example}'"
    )


def _example(name: str, path: str, *, pinned: bool) -> str:
    return json.dumps({"lora_name": name, "lora_path": path, "pinned": pinned})
