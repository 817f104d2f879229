"""Grammars that are hard to compile, to match, or to refuse."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.support.hostile import EITHER, REFUSED, SERVED, Call, Case
from tests.support.hostile_calls import (
    SCHEMA_PLACES,
    Fields,
    chain,
    chat,
    completion,
    generate,
    nested,
    post,
    schema_in,
    tagged,
    with_tools,
)

# Names of limits differ; a reason has to be about one.
LIMIT = r"\d"
# Compiling one grammar may take 40 seconds.
COMPILING = 60.0
CRASH = "root ::= root{2}"
EVIL = "^(a+)+$"


def schema(value: object) -> Call:
    """A native request with a schema: an object, or text as it is."""
    return generate(json_schema=value if isinstance(value, str) else json.dumps(value))


def schema_n(value: object, n: int) -> Call:
    return generate(json_schema=json.dumps(value), n=n)


def alternatives(number: int) -> str:
    return "root ::= " + " | ".join(f'[a-z]{{{i}}} "x"' for i in range(1, number))


def rules(number: int) -> str:
    """Rules that lead to the next one each."""
    lines = [f'r{i} ::= "a" r{i + 1} | "b"' for i in range(number)]
    return "\n".join(["root ::= r0", *lines, f'r{number} ::= "c"'])


def linked(link: Callable[[Fields], Fields]) -> Call:
    """A chain of references, of a kind that ``link`` makes."""
    return schema(chain(6000, link))


def words(number: int) -> str:
    return "|".join(f"w{i}x" for i in range(number))


def letters(number: int) -> str:
    return "".join(chr(0x4E00 + i) for i in range(number))


def wide(number: int) -> dict[str, object]:
    return {"type": "object", "properties": {f"property{i}": {} for i in range(number)}}


def functions(number: int, suffix: str = "") -> list[Fields]:
    return [{"type": "function", "function": {"name": f"f{i}{suffix}"}} for i in range(number)]


def deep_arguments(depth: int) -> list[Fields]:
    """A conversation in which a tool was called."""
    arguments = nested(depth, '{"a":', "}")
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "1"},
    ]


# What every place that takes a schema has to stand.
EVIL_SCHEMAS: dict[str, object] = {
    "evil key": {"properties": {"a" * 40 + "!": {}}, "patternProperties": {EVIL: {}}},
    "evil pattern": {"type": "string", "pattern": EVIL},
    "ref chain": chain(6000, lambda ref: {"type": "object", "properties": {"a": ref}}),
    "type 5": {"type": 5, "enum": [1]},
    "required lists": {"type": "object", "properties": {"a": {}}, "required": [[]]},
    "huge repeat": {"properties": {"ab": {}}, "patternProperties": {"a{99999999999999999999}": {}}},
    "surrogate": {"type": "object", "properties": {"\ud800": {"not": {}}}},
    "lookahead": {"type": "string", "pattern": "^(?!a)a$"},
}
NAME_OF_255 = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,255}$"}
CIRCLE = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
DEEP = nested(1000, '{"not":', "}", "{}")
DEEP_OBJECT = '{"text":"a","sampling_params":{"json_schema":' + DEEP + "}}"
DEEP_TAG = nested(150, '{"type":"sequence","elements":[', "]}", '{"type":"any_text"}')
OLD_TAGS = {
    "structures": [{"begin": "<a>", "schema": EVIL_SCHEMAS["evil key"], "end": "</a>"}],
    "triggers": ["<a>"],
}
# Those that have a language, which may or may not be worth its price.
HARMLESS = ("evil key", "evil pattern", "surrogate")
SCHEMAS_EVERYWHERE = [
    Case(
        f"schema {name} as {place}",
        lambda p=place, s=value: schema_in(p, s),
        statuses=EITHER if name in HARMLESS else REFUSED,
    )
    for name, value in EVIL_SCHEMAS.items()
    for place in SCHEMA_PLACES
]

EBNF = [
    Case("ebnf repeats itself", lambda: generate(ebnf=CRASH), "ebnf"),
    Case("ebnf repeats itself, completions", lambda: completion(ebnf=CRASH), "ebnf"),
    Case("ebnf repeats itself, chat", lambda: chat(ebnf=CRASH), "ebnf"),
    Case("ebnf tag repeats itself", lambda: tagged({"type": "grammar", "grammar": CRASH}), "tag"),
    Case("ebnf {2,}", lambda: generate(ebnf='root ::= "a"\nr ::= (r){2,}'), "ebnf", EITHER),
    Case("ebnf {0,0}", lambda: generate(ebnf='root ::= "a"\nr ::= (r){0,0}'), "ebnf", EITHER),
    Case("ebnf {1000}", lambda: generate(ebnf='root ::= "a"\nr ::= (r){1000}'), "ebnf", EITHER),
    Case("ebnf two rules", lambda: generate(ebnf="root ::= r{2}\nr ::= root{2}"), "ebnf"),
    Case("ebnf choice", lambda: generate(ebnf='root ::= ("a" | root){3}'), "ebnf", EITHER),
    Case("ebnf nothing first", lambda: generate(ebnf='root ::= "" root{2} "a"'), "ebnf", EITHER),
    Case("ebnf star", lambda: generate(ebnf="root ::= root*"), "ebnf", EITHER),
    Case("ebnf plus", lambda: generate(ebnf="root ::= (root)+"), "ebnf", EITHER),
    Case("ebnf optional", lambda: generate(ebnf="root ::= root?"), "ebnf", EITHER),
    Case("ebnf left recursion", lambda: generate(ebnf='root ::= root "a" | "a"'), "ebnf", EITHER),
    Case("ebnf only itself", lambda: generate(ebnf="root ::= root"), "ebnf", EITHER),
    Case("ebnf two of nothing", lambda: generate(ebnf="root ::= r\nr ::= root"), "ebnf", EITHER),
    Case("ebnf lookahead", lambda: generate(ebnf='root ::= "a" (=root{2})'), "ebnf", EITHER),
    Case("ebnf a billion", lambda: generate(ebnf='root ::= "a"{1000000000}'), "ebnf", EITHER),
    Case("ebnf 10^20", lambda: generate(ebnf=f'root ::= "a"{{0,{10**20}}}'), "ebnf", EITHER),
    Case("ebnf {1000}{1000}", lambda: generate(ebnf='root ::= ("a"{1000}){1000}'), "", EITHER),
    Case("ebnf deep", lambda: generate(ebnf="root ::= " + nested(20000, "(", ")", '"a"')), "ebnf"),
    Case("ebnf open brackets", lambda: generate(ebnf="root ::= " + "[" * 50000), "ebnf"),
    Case("ebnf open parentheses", lambda: generate(ebnf="root ::= " + "(" * 50000), "ebnf"),
    Case("ebnf surrogate", lambda: generate(ebnf='root ::= "\ud800"'), "JSON"),
    Case("ebnf no rule", lambda: generate(ebnf="root ::= nothing"), "ebnf"),
    Case("ebnf empty", lambda: generate(ebnf=""), "ebnf"),
    Case("ebnf huge letter", lambda: generate(ebnf="root ::= [\\U7fffffff]"), "ebnf", EITHER),
    Case("ebnf leaves", lambda: generate(ebnf=alternatives(3000)), leaves=1.0),
    Case(
        "ebnf 50 kB",
        lambda: generate(ebnf=alternatives(3000)),
        LIMIT,
        EITHER,
        seconds=COMPILING,
        slow=True,
    ),
    Case("ebnf 5000 rules", lambda: generate(ebnf=rules(5000)), LIMIT, EITHER, slow=True),
    Case("ebnf 30000 rules", lambda: generate(ebnf=rules(30000)), LIMIT, EITHER, slow=True),
    Case("ebnf 1.8 MB", lambda: generate(ebnf=rules(80000)), LIMIT, EITHER, slow=True),
    Case("ebnf big, n", lambda: generate(ebnf=rules(9000), n=32), LIMIT, EITHER, slow=True),
]


REGEX = [
    Case("regex evil", lambda: generate(regex="(a+)+b"), "regex", EITHER),
    Case("regex open brackets", lambda: generate(regex="[" * 16000), "regex"),
    Case("regex open brackets 200 kB", lambda: generate(regex="[" * 200_000), "regex"),
    Case("regex escaped brackets", lambda: generate(regex="[\\" * 16000), "regex"),
    Case("regex open parentheses", lambda: generate(regex="(" * 16000), "regex"),
    Case("regex open braces", lambda: generate(regex="a{" * 16000), "regex", EITHER),
    Case("regex deep", lambda: generate(regex=nested(10000, "(", ")")), "regex", EITHER),
    Case("regex repeat", lambda: generate(regex="^[a-z ]{1,20000}$"), LIMIT, EITHER, slow=True),
    Case("regex repeats", lambda: generate(regex="((a{100}){100}){100}"), "", EITHER, slow=True),
    Case("regex 10^20", lambda: generate(regex=f"a{{{10**20}}}"), "regex", EITHER),
    Case("regex {2,1}", lambda: generate(regex="a{2,1}"), "regex"),
    Case("regex 60000 words", lambda: generate(regex=words(60000)), LIMIT, EITHER, slow=True),
    Case(
        "regex class", lambda: generate(regex=f"[{letters(10000)}]{{100}}"), "", EITHER, slow=True
    ),
    Case("regex 1 MB", lambda: generate(regex="a" * 10**6), LIMIT, EITHER, slow=True),
    Case("regex leaves", lambda: generate(regex=words(60000)), leaves=1.0),
    Case("regex lookahead", lambda: generate(regex="(?=a)a"), "lookahead"),
    Case("regex lookbehind", lambda: generate(regex="(?<=a)a"), "lookbehind"),
    Case("regex back reference", lambda: generate(regex=r"(a)\1"), "regex"),
    Case("regex $ inside", lambda: generate(regex="(a$)b"), "regex"),
    Case("regex surrogate", lambda: generate(regex="\ud800"), "JSON"),
    Case("regex NUL", lambda: generate(regex="\0"), "regex", EITHER),
    Case("regex tag", lambda: tagged({"type": "regex", "pattern": "[" * 16000}), "tag"),
    Case("regex tag evil", lambda: tagged({"type": "regex", "pattern": "(a+)+b"}), "tag", EITHER),
    Case("regex of {129}", lambda: generate(regex="[a-z]{1,129}"), statuses=SERVED),
]


SCHEMAS = [
    *SCHEMAS_EVERYWHERE,
    Case("schema evil names", lambda: schema({"propertyNames": {"pattern": EVIL}}), "", EITHER),
    Case("schema 305 bytes, leaves", lambda: schema_in("chat", EVIL_SCHEMAS["evil key"]), leaves=1),
    Case(
        "schema {129}", lambda: schema({"pattern": "^[a-z]{1,129}$"}), "pattern|json_schema", EITHER
    ),
    Case("schema {255}", lambda: schema_in("chat", NAME_OF_255), "pattern|format", EITHER),
    Case("schema {20000}", lambda: schema({"pattern": "^[a-z]{1,20000}$"}), "", EITHER, slow=True),
    Case("schema brackets", lambda: schema({"type": "string", "pattern": "[" * 16000}), "pattern"),
    Case("schema pattern 5", lambda: schema({"type": "string", "pattern": 5}), "pattern"),
    Case("schema look", lambda: schema({"type": "string", "pattern": "^(?=.*[A-Z])a$"}), "look"),
    Case("schema anyOf []", lambda: schema({"anyOf": []}), "anyOf"),
    Case("schema oneOf []", lambda: schema({"oneOf": []}), "oneOf"),
    Case("schema enum []", lambda: schema({"enum": []}), "enum"),
    Case("schema enum 5", lambda: schema({"enum": 5}), "enum"),
    Case("schema type [5]", lambda: schema({"type": ["string", 5]}), "type"),
    Case("schema required {}", lambda: schema({"properties": {"a": {}}, "required": [{}]}), "req"),
    Case("schema properties []", lambda: schema({"properties": []}), "properties"),
    Case("schema $ref 5", lambda: schema({"$ref": 5}), "ref"),
    Case("schema $ref away", lambda: schema({"$ref": "http://x/y"}), "ref"),
    Case("schema $ref nowhere", lambda: schema({"$ref": "#/$defs/x"}), "ref"),
    Case("schema $ref to itself", lambda: schema({"$ref": "#"}), "ref|no output", EITHER),
    Case("schema $ref in circles", lambda: schema(CIRCLE), "ref|no output", EITHER),
    Case("schema $ref bare", lambda: linked(lambda ref: ref), "", EITHER),
    Case(
        "schema $ref arrays",
        lambda: linked(lambda ref: {"type": "array", "items": ref}),
        "",
        EITHER,
    ),
    Case("schema $ref allOf", lambda: linked(lambda ref: {"allOf": [ref]}), "", EITHER),
    Case("schema $ref tuple", lambda: linked(lambda ref: {"prefixItems": [ref]}), "", EITHER),
    Case(
        "schema $ref others", lambda: linked(lambda ref: {"additionalProperties": ref}), "", EITHER
    ),
    Case(
        "schema $ref anyOf", lambda: linked(lambda ref: {"anyOf": [ref, {}]}), "", EITHER, slow=True
    ),
    Case("schema deep", lambda: schema(nested(1000, '{"items":', "}", "{}")), "deep|nest|level"),
    Case("schema deeper", lambda: schema(nested(10**6, '{"items":', "}", "{}")), "json_schema"),
    Case("schema deep object", lambda: post("/generate", DEEP_OBJECT), "deep|nest|level"),
    Case("schema brackets only", lambda: schema("[" * 10**6), "json_schema"),
    Case("schema wide", lambda: schema(wide(5000)), LIMIT, EITHER, seconds=COMPILING, slow=True),
    Case("schema wide, n", lambda: schema_n(wide(1500), 64), LIMIT, EITHER, slow=True),
    Case("schema wide, leaves", lambda: schema(wide(5000)), leaves=1.0),
    Case("schema enum 20k", lambda: schema({"enum": list(range(20000))}), "", EITHER, slow=True),
    Case("schema enum 200k", lambda: schema({"enum": list(range(200_000))}), "", EITHER, slow=True),
    Case("schema minLength", lambda: schema({"type": "string", "minLength": 10**18}), "", EITHER),
    Case("schema maxLength", lambda: schema({"type": "string", "maxLength": 10**5}), "", EITHER),
    Case("schema minItems", lambda: schema({"type": "array", "minItems": 10**9}), "", EITHER),
    Case("schema 1e300", lambda: schema({"type": "number", "minimum": 1e300}), "", EITHER),
    Case("schema 1e400", lambda: schema('{"type":"number","minimum":1e400}'), "", EITHER),
    Case("schema NaN", lambda: schema('{"type":"number","minimum":NaN}'), "json_schema"),
    Case("schema 10^4000", lambda: schema(f'{{"minimum":{10**4000}}}'), "", EITHER),
    Case("schema 10^4000 const", lambda: schema(f'{{"const":{10**4000}}}'), "", EITHER),
    Case(
        "schema same key", lambda: schema('{"type":"string","type":5}'), "type|json_schema", EITHER
    ),
    Case("schema true", lambda: schema("true"), "json_schema", EITHER),
    Case("schema false", lambda: schema("false"), "json_schema"),
    Case("schema no JSON", lambda: schema("{"), "json_schema"),
    Case("tag deep", lambda: tagged(json.loads(DEEP_TAG)), "tag", EITHER),
    Case("tag 5", lambda: tagged(5), "tag"),
    Case("tag token", lambda: tagged({"type": "token", "token": "a"}), "", EITHER),
    Case("tags, old form", lambda: generate(structural_tag=json.dumps(OLD_TAGS)), "tag", EITHER),
    Case("tools 10k", lambda: with_tools({"tools": functions(10_000)}), "tool|context", EITHER),
    Case(
        "tools 10k required",
        lambda: with_tools({"tools": functions(9999), "tool_choice": "required"}),
        "tool|context",
        EITHER,
        slow=True,
    ),
    Case("tool surrogate", lambda: with_tools({"tools": functions(1, "\ud800")}), "JSON"),
    Case(
        "tool arguments deep",
        lambda: with_tools({"messages": deep_arguments(500)}),
        "deep|nest|arguments",
        EITHER,
    ),
]
