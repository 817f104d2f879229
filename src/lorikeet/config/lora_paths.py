"""The entries of ``--lora-paths``: an adapter's name, its path, and the spellings of both."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from lorikeet.errors import ConfigError
from lorikeet.masking import mask

_FORMS = "PATH, NAME=PATH or JSON"
_KEYS = ("lora_name", "lora_path", "pinned")
# JSON whose quotes a shell has removed; bash also expands its braces, so that each key is a word of its own.
_UNQUOTED = re.compile(
    r"(?:^\{|^|[{,])\s*\"?(lora_name|lora_path|pinned)\"?\s*:\s*\"?([^,}\"]*)\"?"
)


@dataclass(frozen=True, slots=True)
class LoRAPath:
    """An adapter to load: its name in requests, where it is, and whether it stays on the device."""

    name: str
    path: str
    pinned: bool = False


def parse_lora_path(entry: object) -> LoRAPath:
    """Read one entry: ``PATH`` (which is its own name), ``NAME=PATH``, JSON or a mapping.

    Raises:
        ConfigError: the entry cannot be read. What was probably meant is shown: JSON whose quotes a shell has removed,
            or an object written as in Python. Passwords and keys of a URL are masked.
    """
    try:
        if isinstance(entry, LoRAPath):
            return entry
        if isinstance(entry, Mapping):
            return _from_mapping(cast("Mapping[object, object]", entry), str(cast("object", entry)))
        if isinstance(entry, str) and entry.strip():
            return _from_text(entry.strip())
        raise ConfigError(f"--lora-paths is {entry!r}; allowed: {_FORMS}")
    except ConfigError as error:
        raise ConfigError(mask(str(error))) from None


def _from_text(text: str) -> LoRAPath:
    if text.startswith("{"):
        return _from_json(text)
    if _UNQUOTED.match(text):
        raise _quotes_removed(text)
    name, separator, path = (part.strip() for part in text.partition("="))
    if "://" in name and (separator or set("?#@") & set(name)):
        # The "=" of a query is no separator, and as a name the URL's keys would be seen by everybody.
        raise ConfigError("--lora-paths has a URL with a query or a password; allowed: NAME=URL")
    if not separator:
        return LoRAPath(name=text, path=text)
    if not name or not path:
        raise ConfigError(f"--lora-paths has {text!r}; allowed: NAME=PATH with both of them")
    return LoRAPath(name=name, path=path)


def _from_json(text: str) -> LoRAPath:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if not {'"', "'"} & set(text) and _UNQUOTED.search(text):
            raise _quotes_removed(text) from None
        if meant := _from_python(text):
            raise ConfigError(
                f"--lora-paths has {text!r}, which is Python and not JSON; write it as "
                f"--lora-paths '{_as_json(meant)}'"
            ) from None
        raise ConfigError(
            f"--lora-paths has {text!r}, which is not JSON ({error.msg} at character {error.pos}); "
            f"allowed: {_as_json(LoRAPath('NAME', 'PATH'))}"
        ) from None
    return _from_mapping(value, text)


def _from_python(text: str) -> LoRAPath | None:
    """The meaning of an object written as in Python: ``True``, single quotes, a comma at the end."""
    try:
        value: object = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    return _from_mapping(cast("dict[object, object]", value), text)


def _from_mapping(value: Mapping[object, object], shown: str) -> LoRAPath:
    if unknown := [str(key) for key in value if key not in _KEYS]:
        raise ConfigError(
            f"--lora-paths has {shown}: unknown key {', '.join(unknown)}; known: {', '.join(_KEYS)}"
        )
    texts: list[str] = []
    for key in _KEYS[:2]:
        if key not in value:
            raise ConfigError(f"--lora-paths has {shown}: the key {key} is missing")
        text = value[key]
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"--lora-paths has {shown}: {key} must be text that is not empty")
        texts.append(text)
    pinned = value.get("pinned", False)
    if not isinstance(pinned, bool):
        raise _not_a_flag(shown)
    return LoRAPath(texts[0], texts[1], pinned)


def _not_a_flag(shown: str) -> ConfigError:
    return ConfigError(f"--lora-paths has {shown}: pinned must be true or false")


def _quotes_removed(text: str) -> ConfigError:
    """The error for JSON without its quotes: shows the JSON that the rest was made of, quoted for a shell."""
    found = {match[1]: match[2].strip() for match in _UNQUOTED.finditer(text)}
    pinned = found.get("pinned", "false").lower()
    if pinned not in ("true", "false"):
        return _not_a_flag(repr(text))
    meant = LoRAPath(
        found.get("lora_name") or "NAME", found.get("lora_path") or "PATH", pinned == "true"
    )
    return ConfigError(
        f"--lora-paths has {text!r}: the shell has removed the quotes of the JSON; put it in single quotes: "
        f"--lora-paths '{_as_json(meant)}'"
    )


def _as_json(entry: LoRAPath) -> str:
    values = (entry.name, entry.path, entry.pinned)
    return json.dumps(dict(zip(_KEYS, values, strict=True)))
