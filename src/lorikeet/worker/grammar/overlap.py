"""Whether branches of ``oneOf`` certainly have a value in common.

XGrammar enforces ``oneOf`` exactly where it can prove that the branches exclude each other, as those of a union with a
discriminator do, and means ``anyOf`` elsewhere. Where both branches of a pair certainly admit the same value, that would
be wrong for sure.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["overlap"]

# Keywords that say nothing about which values are right.
_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$id", "$schema")
)  # fmt: skip

_TYPES = ("string", "number", "boolean", "null", "array", "object")
_PARTS = {"number": ("integer", "number")}


def overlap(branches: list[Any]) -> str | None:
    """Two branches that certainly admit the same value, in words; None if none are known to.

    Takes time in proportion to the branches.
    """
    types: dict[str, int] = {}
    constants: dict[str, tuple[str, int]] = {}
    for index, branch in enumerate(branches):
        own_types, own_constants = _admitted(branch)
        for name in own_types:
            if name in types:
                return f"the branches {types[name]} and {index} both admit every {name}"
        for text, name in own_constants.items():
            other = types.get(name, constants.get(text, ("", None))[1])
            if other is not None:
                return f"the branches {other} and {index} both admit {text[:100]}"
        for text, (name, other) in constants.items() if own_types else ():
            if name in own_types:
                return f"the branches {other} and {index} both admit {text[:100]}"
        types |= dict.fromkeys(own_types, index)
        constants |= {text: (name, index) for text, name in own_constants.items()}
    return None


def _admitted(branch: Any) -> tuple[list[str], dict[str, str]]:
    """What a branch certainly admits: types of which it admits every value, and constants (JSON text -> type)."""
    said = _said(branch)
    if said is None:
        return [], {}
    if "const" in said or "enum" in said:
        values = [said["const"]] if "const" in said else said["enum"]
        return [], {json.dumps(value, sort_keys=True): _type(value) for value in values}
    names = said.get("type", _TYPES)
    names = [names] if isinstance(names, str) else names
    return list(dict.fromkeys(part for name in names for part in _PARTS.get(name, (name,)))), {}


def _said(branch: Any) -> dict[str, Any] | None:
    """The keywords of a branch; None if there are others than a type and constants."""
    if branch is True:
        return {}
    if not isinstance(branch, dict):
        return None
    said = {key: value for key, value in branch.items() if key not in _ANNOTATIONS}
    allowed = ({}, {"type"}, {"const"}, {"enum"}, {"const", "type"}, {"enum", "type"})
    return said if set(said) in map(set, allowed) else None


def _type(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"
