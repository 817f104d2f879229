"""Refuses grammars that the grammar compiler would accept and then enforce only in part.

XGrammar 0.2 ignores several JSON Schema keywords, some of them with no more than a line on stderr, and a few of its
formats admit strings that are not JSON. An output that looks constrained and is not is worse than an error, so each
such case is refused here by name. What this module lets through is enforced, with two documented exceptions:
``oneOf`` with branches that are not provably disjoint means ``anyOf``, and formats outside ``_FORMATS`` are
annotations (as JSON Schema itself says).
"""

from __future__ import annotations

import copy
import json
import reprlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import regex

from lorikeet.worker.grammar.patterns import checked_json_pattern, checked_regex, shown

__all__ = ["checked_json_schema", "checked_structural_tag"]

# The compiler's time grows steeply with depth (40 s for 1000 levels), and nobody's schema is this deep.
MAX_SCHEMA_DEPTH = 64
# It goes down along references, too: some thousands of them overflow its stack.
MAX_REFERENCE_DEPTH = 500

_IGNORED_BY_COMPILER = (
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired",
    "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
_COMBINATORS = ("$ref", "anyOf", "oneOf", "allOf")
_NUMBER_RANGE = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LENGTHS = ("minLength", "maxLength")
# Keywords from which the compiler infers a missing "type".
_INFERS_TYPE = (
    "properties", "additionalProperties", "unevaluatedProperties", "items", "prefixItems",
    "unevaluatedItems",
)  # fmt: skip
_CONSTRAINTS = (
    *_INFERS_TYPE, *_NUMBER_RANGE, *_LENGTHS, "multipleOf", "pattern", "required", "minItems", "maxItems",
    "minProperties", "maxProperties", "patternProperties", "propertyNames",
)  # fmt: skip
_FORMATS = (
    "date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
    "uri-reference", "uri-template",
)  # fmt: skip
# XGrammar's character classes for these include the quote that ends the string.
_BROKEN_FORMATS = ("json-pointer", "relative-json-pointer")
# XGrammar's own admits quoted local parts with escapes that JSON does not have; hardly any address has a quoted one.
_EMAIL = (
    r"^[A-Za-z0-9_!#$%&'*+/=?`{|}~-]+(\.[A-Za-z0-9_!#$%&'*+/=?`{|}~-]+)*"
    r"@[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*$"
)
_SUBSCHEMAS = (
    "additionalProperties", "unevaluatedProperties", "items", "unevaluatedItems", "propertyNames",
)  # fmt: skip
_SUBSCHEMA_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
_SUBSCHEMA_MAPS = ("properties", "patternProperties")
_DEFINITIONS = ("$defs", "definitions")
# Keywords that say nothing about which values are right.
_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$id", "$schema")
)  # fmt: skip

_TYPE_NAMES = {
    str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", list: "array", dict: "object",
}  # fmt: skip
_TYPES = tuple(_TYPE_NAMES.values())
_INCLUDED = {"number": ("integer", "number")}
_LARGEST = 2**63
_SEARCH_SECONDS = 1.0


def _is_schema(value: object) -> bool:
    return isinstance(value, bool | dict)


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -_LARGEST <= cast(float, value) <= _LARGEST


def _is_type(value: object) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name in _TYPES for name in names)


def _is_map_of_schemas(value: object) -> bool:
    return isinstance(value, dict)


def _is_list_of_strings(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_string, value))


def _is_list(value: object) -> bool:
    return isinstance(value, list) and bool(value)


_COUNTS = (*_LENGTHS, "minItems", "maxItems", "minProperties", "maxProperties")
# (keywords, check of their value, what is allowed): XGrammar answers wrong ones with failed assertions, or with nothing.
_FORMS: tuple[tuple[tuple[str, ...], Callable[[object], bool], str], ...] = (
    (("type",), _is_type, f"one of {', '.join(_TYPES)}, or a list of them"),
    (("pattern", "format", "$ref"), _is_string, "a string"),
    (_COUNTS, _is_count, "a whole number from 0 to 2147483647"),
    (_NUMBER_RANGE, _is_number, "a number from -2^63 to 2^63"),
    (("multipleOf",), _is_number, "a number up to 2^63"),
    (("properties", "patternProperties", "$defs", "definitions"), _is_map_of_schemas, "an object"),
    (("required",), _is_list_of_strings, "a list of strings"),
    (("enum",), _is_list, "a list that must not be empty"),
    (("anyOf", "oneOf", "allOf"), _is_list, "a list of schemas that must not be empty"),
    (("prefixItems",), lambda value: isinstance(value, list), "a list of schemas"),
    (("items",), _is_schema, "a schema (a list of them is written as prefixItems)"),
    (("additionalProperties", "unevaluatedProperties", "unevaluatedItems", "propertyNames"),
     _is_schema, "a schema"),
)  # fmt: skip


def checked_json_schema(schema: object) -> object:
    """The schema to give the compiler: a copy in which patterns, ``format: email`` and ``oneOf`` are written so that it
    enforces them.

    Args:
        schema: parsed JSON.

    Raises:
        ValueError: names the place (a JSON pointer) and what cannot be enforced there.
    """
    copied = copy.deepcopy(schema)
    nodes = list(_nodes(copied))
    for where, node in nodes:
        for reason in _problems(node):
            raise ValueError(f"{where}: {reason}")
    for where, node in nodes:
        try:
            _rewrite(node)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return copied


def checked_structural_tag(tag: object) -> object:
    """The structural tag (parsed JSON) to give the compiler: ``checked_json_schema`` of every schema in it, and
    ``checked_regex`` of every pattern.

    Raises:
        ValueError: names what cannot be enforced.
    """
    if isinstance(tag, list):
        return [checked_structural_tag(item) for item in tag]
    if not isinstance(tag, dict):
        return tag
    if tag.get("type") in ("json_schema", "qwen_xml_parameter"):
        return {**tag, "json_schema": checked_json_schema(tag.get("json_schema"))}
    if tag.get("type") == "regex" and isinstance(tag.get("pattern"), str):
        return {**tag, "pattern": checked_regex(tag["pattern"])}
    return {key: checked_structural_tag(value) for key, value in tag.items()}


def _nodes(schema: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema object that the compiler comes to, once, with its place: written inside another or referred to."""
    waiting: list[tuple[str, object, int, int]] = [("#", schema, 0, 0)]
    seen: set[int] = set()
    while waiting:
        where, node, depth, length = waiting.pop()
        if isinstance(node, bool) or id(node) in seen:
            continue
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"the schema is nested deeper than {MAX_SCHEMA_DEPTH} levels")
        if length > MAX_REFERENCE_DEPTH:
            raise ValueError(f"references nest the schema deeper than {MAX_REFERENCE_DEPTH} levels")
        if not isinstance(node, dict):
            raise ValueError(f"{where}: a schema must be an object or a boolean")
        seen.add(id(node))
        _check_forms(where, node)
        yield where, node
        # In the compiler's order, which comes to definitions by references alone; the last that is put in is next.
        waiting += [
            (f"{where}/{path}", child, depth + 1, length + 1)
            for path, child in reversed(list(_children(node)))
        ]
        if "$ref" in node:
            waiting.append((node["$ref"], _resolved(schema, where, node["$ref"]), 0, length + 1))


def _check_forms(where: str, node: dict[str, Any]) -> None:
    for keywords, is_right, allowed in _FORMS:
        for keyword in keywords:
            if keyword in node and not is_right(node[keyword]):
                raise ValueError(
                    f"{where}: {keyword} is {shown_value(node[keyword])}; allowed: {allowed}"
                )


def _resolved(schema: object, where: str, ref: str) -> object:
    if ref != "#" and not ref.startswith("#/"):
        raise ValueError(
            f"{where}: $ref {shown(ref)} is not supported; allowed: '#' and '#/...' within the schema"
        )
    node = schema
    for part in ref.split("/")[1:]:
        if not isinstance(node, dict) or part not in node:
            raise ValueError(f"{where}: $ref {shown(ref)} names nothing that is in the schema")
        node = node[part]
    return node


def _rewrite(node: dict[str, Any]) -> None:
    if node.get("format") == "email":
        del node["format"]
        node["pattern"] = _EMAIL
    if "pattern" in node:
        node["pattern"] = checked_json_pattern(node["pattern"])
    if "patternProperties" in node:
        patterns = node["patternProperties"]
        written = {checked_json_pattern(name): child for name, child in patterns.items()}
        if len(written) < len(patterns):
            raise ValueError("two patterns of patternProperties mean the same")
        node["patternProperties"] = written
    if "oneOf" in node:
        # The same grammar, without a warning where nothing shows that the branches exclude each other. No reference can
        # notice: they do not lead through lists.
        node["anyOf"] = node.pop("oneOf")


def shown_value(value: object) -> str:
    """A client's JSON as part of a message."""
    return shown(value) if isinstance(value, str) else reprlib.repr(value)


def _children(node: dict[str, Any]) -> Iterator[tuple[str, object]]:
    for key in _SUBSCHEMAS:
        if key in node:
            yield key, node[key]
    for key in _SUBSCHEMA_LISTS:
        yield from ((f"{key}/{index}", child) for index, child in enumerate(node.get(key, ())))
    for key in (*_SUBSCHEMA_MAPS, *_DEFINITIONS):
        yield from ((f"{key}/{name}", child) for name, child in node.get(key, {}).items())


def _problems(node: dict[str, Any]) -> Iterator[str]:
    """What cannot be enforced in one schema object, leaving out its subschemas."""
    for key in _IGNORED_BY_COMPILER:
        if key in node:
            yield f"{key} is not supported"
    if node.get("uniqueItems") not in (None, False):
        yield "uniqueItems is not supported"
    yield from _combinator_problems(node)
    yield from _value_problems(node)
    yield from _number_problems(node)
    yield from _string_problems(node)
    yield from _object_problems(node)


def _combinator_problems(node: dict[str, Any]) -> Iterator[str]:
    used = [key for key in _COMBINATORS if key in node]
    beside = [key for key in ("type", "enum", "const", "format", *_CONSTRAINTS) if key in node]
    if len(used) > 1 or (used and beside):
        yield f"{used[0]} beside {[*used[1:], *beside][0]} is not supported; put it inside {used[0]}"
    if len(node.get("allOf", ())) > 1:
        yield "allOf with more than one schema is not supported"
    if twice := _overlap(node.get("oneOf", [])):
        yield f"oneOf: {twice}, so nothing that obeys both is exactly one of them; use anyOf"


def _value_problems(node: dict[str, Any]) -> Iterator[str]:
    fixed = [key for key in ("const", "enum") if key in node]
    present = [key for key in _CONSTRAINTS if key in node]
    if fixed and (present or len(fixed) > 1):
        yield f"{fixed[0]} beside {[*fixed[1:], *present][0]} is not supported"
    if not fixed:
        untyped = not any(key in node for key in ("type", *_INFERS_TYPE))
        if present and untyped:
            yield f"{present[0]} needs a type beside it"
        return
    types = node.get("type", [])
    types = [types] if isinstance(types, str) else types
    for value in [node["const"]] if "const" in node else node["enum"]:
        if types and not any(_is_of_type(value, name) for name in types):
            yield f"the value {shown_value(value)} is not of type {' or '.join(types)}"


def _is_of_type(value: object, name: str) -> bool:
    own = _type(value)
    if isinstance(value, float) and value.is_integer():
        own = "integer"
    return name == own or (name == "number" and own == "integer")


def _type(value: object) -> str:
    """JSON's name for the type of a parsed value."""
    return _TYPE_NAMES[type(value)]


def _number_problems(node: dict[str, Any]) -> Iterator[str]:
    if "multipleOf" not in node:
        return
    if node.get("type") != "integer" or any(key in node for key in _NUMBER_RANGE):
        yield "multipleOf is supported only for type integer without minimum and maximum"


def _string_problems(node: dict[str, Any]) -> Iterator[str]:
    if node.get("format") in _BROKEN_FORMATS:
        yield f"format {node['format']} is not supported"
    parts = ["pattern"] if "pattern" in node else []
    parts += ["format"] if node.get("format") in _FORMATS else []
    parts += [key for key in _LENGTHS if key in node]
    if len(parts) > 1 and parts[0] not in _LENGTHS:
        yield f"{parts[0]} beside {parts[1]} is not supported"


def _object_problems(node: dict[str, Any]) -> Iterator[str]:
    known = node.get("properties", {})
    required = node.get("required", [])
    for name in required:
        if name not in known:
            yield f"required names {shown(name)}, which properties does not describe"
    yield from _count_problems(node, len(required))
    patterns = node.get("patternProperties", {})
    yield from _overlaps(patterns, known)
    if "propertyNames" in node and (known or patterns):
        yield "propertyNames beside properties or patternProperties is not supported"


def _count_problems(node: dict[str, Any], num_required: int) -> Iterator[str]:
    """The compiler counts entries, not distinct names: only declared properties cannot occur twice."""
    least = node.get("minProperties")
    is_open = node.get("additionalProperties", False) is not False
    is_open = is_open or "patternProperties" in node or "propertyNames" in node
    if is_open and isinstance(least, int) and least > max(num_required, 1):
        yield "minProperties is not supported for properties that are not declared"


def _overlaps(patterns: Iterable[str], names: dict[str, Any]) -> Iterator[str]:
    """Patterns that match a property that is described, too; JSON Schema's patterns may match anywhere in a name."""
    if not names:
        return
    deadline = time.monotonic() + _SEARCH_SECONDS
    for pattern in patterns:
        try:
            compiled = regex.compile(pattern)
            for name in names:
                # Backtracks, but not for ever, and not in the engine's process.
                if compiled.search(name, timeout=max(deadline - time.monotonic(), 0.001)):
                    yield f"the pattern {shown(pattern)} of patternProperties also matches the property {shown(name)}"
                    return
        except TimeoutError:
            yield (
                f"matching the patterns of patternProperties with the names of properties takes longer than "
                f"{_SEARCH_SECONDS:g} s"
            )
            return
        except (regex.error, OverflowError, ValueError, RecursionError, MemoryError):
            # Possibly a pattern of another dialect; the compiler has the last word on its syntax.
            yield f"the pattern {shown(pattern)} beside properties is not a Python regular expression"
            return


def _overlap(branches: list[Any]) -> str | None:
    """Two branches of ``oneOf`` that certainly admit the same value, in words; None if none are known to.

    XGrammar enforces ``oneOf`` exactly where it can prove that the branches exclude each other, as those of a union with a
    discriminator do, and means ``anyOf`` elsewhere. Where two certainly share a value, that would be wrong for sure.

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
    return list(dict.fromkeys(part for name in names for part in _INCLUDED.get(name, (name,)))), {}


def _said(branch: Any) -> dict[str, Any] | None:
    """The keywords of a branch; None if there are others than a type and constants."""
    if branch is True:
        return {}
    if not isinstance(branch, dict):
        return None
    said = {key: value for key, value in branch.items() if key not in _ANNOTATIONS}
    allowed = ({}, {"type"}, {"const"}, {"enum"}, {"const", "type"}, {"enum", "type"})
    return said if set(said) in map(set, allowed) else None
