"""Refuses grammars that the grammar compiler would accept and then enforce only in part.

XGrammar 0.2 ignores several JSON Schema keywords, some of them with no more than a line on stderr, and a few of its
formats admit strings that are not JSON. An output that looks constrained and is not is worse than an error, so each
such case is refused here by name. What this module lets through is enforced, with two documented exceptions:
``oneOf`` with branches that are not provably disjoint means ``anyOf``, and formats outside ``_FORMATS`` are
annotations (as JSON Schema itself says).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["check_regex", "checked_json_schema", "checked_structural_tag"]

# The compiler's time grows steeply with depth (40 s for 1000 levels), and nobody's schema is this deep.
MAX_SCHEMA_DEPTH = 64

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
_SUBSCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")

_REGEX_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
_KNOWN_LETTER_ESCAPES = frozenset(
    "dDwWsSnrtfv0xuc" + "bBpPk"
)  # the last five the compiler refuses itself
_JSON_ESCAPES = r'"|\\\\|\\"|\\[nrtfv0]|\\c.|\\(?:x|u00)(?:[01].|22|5[cC])|[\x00-\x1f]'
_NEEDS_JSON_ESCAPE = re.compile(_JSON_ESCAPES)
_ONLY_JSON_ESCAPES = re.compile(f"(?:{_JSON_ESCAPES})+")


def check_regex(pattern: str) -> None:
    """Raises:
    ValueError: an anchor in the middle or an escape that the compiler would ignore.
    """
    tokens = [match.group() for match in _REGEX_TOKEN.finditer(pattern)]
    for index, token in enumerate(tokens):
        if token == "^" and index > 0 and tokens[index - 1] not in ("|", "("):
            raise ValueError(f"^ in the middle of {pattern!r} is not supported")
        if token == "$" and index + 1 < len(tokens) and tokens[index + 1] not in ("|", ")"):
            raise ValueError(f"$ in the middle of {pattern!r} is not supported")
        for escape in re.findall(r"\\(.)", token, re.DOTALL):
            if escape.isascii() and escape.isalpha() and escape not in _KNOWN_LETTER_ESCAPES:
                raise ValueError(f"the escape \\{escape} in {pattern!r} is not supported")


def checked_json_schema(schema: object) -> object:
    """The schema to give the compiler: a copy in which ``format: email`` has become a pattern.

    Args:
        schema: parsed JSON.

    Raises:
        ValueError: names the place (a JSON pointer) and what cannot be enforced there.
    """
    _check_node(schema, "#", 0)
    copied = copy.deepcopy(schema)
    _replace_email(copied)
    return copied


def checked_structural_tag(tag: object) -> object:
    """The same for every schema inside a structural tag (parsed JSON), and ``check_regex`` for every pattern.

    Raises:
        ValueError: as above.
    """
    if isinstance(tag, list):
        return [checked_structural_tag(item) for item in tag]
    if not isinstance(tag, dict):
        return tag
    if tag.get("type") in ("json_schema", "qwen_xml_parameter"):
        return {**tag, "json_schema": checked_json_schema(tag.get("json_schema"))}
    if tag.get("type") == "regex" and isinstance(tag.get("pattern"), str):
        check_regex(tag["pattern"])
    return {key: checked_structural_tag(value) for key, value in tag.items()}


def _check_node(node: object, where: str, depth: int) -> None:
    if depth > MAX_SCHEMA_DEPTH:
        raise ValueError(f"the schema is nested deeper than {MAX_SCHEMA_DEPTH} levels")
    if isinstance(node, bool):
        return
    if not isinstance(node, dict):
        raise ValueError(f"{where}: a schema must be an object or a boolean")
    for reason in _problems(node):
        raise ValueError(f"{where}: {reason}")
    for path, child in _children(node):
        _check_node(child, f"{where}/{path}", depth + 1)


def _replace_email(node: object) -> None:
    if isinstance(node, dict):
        if node.get("format") == "email":
            del node["format"]
            node["pattern"] = _EMAIL
        for _, child in _children(node):
            _replace_email(child)


def _children(node: dict[str, Any]) -> Iterator[tuple[str, object]]:
    for key in _SUBSCHEMAS:
        if key in node:
            yield key, node[key]
    for key in _SUBSCHEMA_LISTS:
        if isinstance(node.get(key), list):
            yield from ((f"{key}/{index}", child) for index, child in enumerate(node[key]))
    for key in _SUBSCHEMA_MAPS:
        if isinstance(node.get(key), dict):
            yield from ((f"{key}/{name}", child) for name, child in node[key].items())


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
    if isinstance(node.get("allOf"), list) and len(node["allOf"]) > 1:
        yield "allOf with more than one schema is not supported"
    ref = node.get("$ref")
    if isinstance(ref, str) and ref != "#" and not ref.startswith("#/"):
        yield f"$ref {ref!r} is not supported; allowed: '#' and '#/...' within the schema"


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
    values = node["enum"] if fixed == ["enum"] and isinstance(node["enum"], list) else []
    for value in [node["const"]] if "const" in node else values:
        if types and not any(_is_of_type(value, name) for name in types):
            yield f"the value {value!r} is not of type {' or '.join(map(str, types))}"


def _is_of_type(value: object, name: object) -> bool:
    match value:
        case None:
            return name == "null"
        case bool():
            return name == "boolean"
        case int():
            return name in ("integer", "number")
        case float():
            return name == "number" or (name == "integer" and value.is_integer())
        case str():
            return name == "string"
        case list():
            return name == "array"
    return name == "object"


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
    if isinstance(node.get("pattern"), str):
        yield from _pattern_problems(node["pattern"])


def _pattern_problems(pattern: str) -> Iterator[str]:
    """A pattern inside a JSON string: it must not ask for a character that JSON writes as an escape."""
    try:
        check_regex(pattern)
    except ValueError as error:
        yield str(error)
    for match in _REGEX_TOKEN.finditer(pattern):
        token = match.group()
        if token.startswith("[^"):
            continue
        if token.startswith("["):
            # The compiler leaves such characters out of a class, unless nothing else is in it.
            unsafe = _ONLY_JSON_ESCAPES.fullmatch(token[1:-1].replace("-", ""))
        else:
            unsafe = _NEEDS_JSON_ESCAPE.match(pattern, match.start())
        if unsafe:
            yield f"the pattern {pattern!r} asks for a quote, backslash or control character, which is not supported"
            return


def _object_problems(node: dict[str, Any]) -> Iterator[str]:
    properties = node.get("properties")
    known = properties if isinstance(properties, dict) else {}
    required = node.get("required")
    for name in required if isinstance(required, list) else []:
        if name not in known:
            yield f"required names {name!r}, which properties does not describe"
    yield from _count_problems(node, len(required) if isinstance(required, list) else 0)
    patterns = node.get("patternProperties")
    for pattern in patterns if isinstance(patterns, dict) else {}:
        yield from _pattern_problems(pattern)
        yield from _overlaps(pattern, known)
    if "propertyNames" in node and (known or patterns):
        yield "propertyNames beside properties or patternProperties is not supported"


def _count_problems(node: dict[str, Any], num_required: int) -> Iterator[str]:
    """The compiler counts entries, not distinct names: only declared properties cannot occur twice."""
    least = node.get("minProperties")
    is_open = node.get("additionalProperties", False) is not False
    is_open = is_open or "patternProperties" in node or "propertyNames" in node
    if is_open and isinstance(least, int) and least > max(num_required, 1):
        yield "minProperties is not supported for properties that are not declared"


def _overlaps(pattern: str, names: dict[str, Any]) -> Iterator[str]:
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error:
        # Possibly a pattern of another dialect; the compiler has the last word on its syntax.
        yield f"the pattern {pattern!r} beside properties is not a Python regular expression"
        return
    if found:
        yield f"the pattern {pattern!r} of patternProperties also matches the property {found[0]!r}"
