"""Every case that is let through is enforced by the compiler, every case that it would ignore is refused."""

from __future__ import annotations

import json

import pytest
import xgrammar

from lorikeet.worker.grammar.check import checked_json_schema, checked_structural_tag
from lorikeet.worker.grammar.patterns import checked_regex
from tests.support.grammar_tokenizer import EOS_ID, save_byte_level_tokenizer


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> xgrammar.GrammarCompiler:
    tokenizer = save_byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    vocab = [text for text, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    info = xgrammar.TokenizerInfo(
        vocab, xgrammar.VocabType.BYTE_LEVEL, stop_token_ids=[EOS_ID], add_prefix_space=False
    )
    return xgrammar.GrammarCompiler(info, max_threads=1)


def obj(**keywords) -> dict:
    return {"type": "object", **keywords}


INT, STR = {"type": "integer"}, {"type": "string"}

# (schema, JSON that obeys it, JSON that does not)
ENFORCED = [
    ({"type": "integer", "multipleOf": 3}, "3", "4"),
    ({"anyOf": [INT, STR]}, "1", "true"),
    ({"oneOf": [INT, STR]}, '"a"', "true"),
    ({"oneOf": [obj(properties={"a": INT}), obj(properties={"b": INT})]}, '{"b": 1}', '{"c": 1}'),
    ({"items": {"$ref": "#/x/y"}, "x": {"y": {"oneOf": [INT, STR]}}}, '[1, "a"]', "[true]"),
    ({"allOf": [INT]}, "1", '"a"'),
    ({"type": "number", "minimum": 0.5}, "0.6", "0.4"),
    ({"type": "string", "minLength": 2}, '"ab"', '"a"'),
    ({"type": ["string", "null"], "maxLength": 1}, "null", '"aa"'),
    ({"type": "string", "format": "date"}, '"2020-01-02"', '"2020-13-45x"'),
    ({"type": "string", "format": "uuid"}, '"123e4567-e89b-12d3-a456-426614174000"', '"no"'),
    ({"type": "string", "format": "email"}, '"a@b.co"', '"no"'),
    ({"type": "string", "pattern": '^[^"]+x$'}, '"ax"', '"a"x"'),
    ({"properties": {"a": INT}, "required": ["a"]}, '{"a": 1}', "{}"),
    ({"items": INT, "minItems": 2}, "[1, 2]", "[1]"),
    ({"type": "array", "prefixItems": [INT], "items": False}, "[1]", '["a"]'),
    (obj(properties={"a": INT, "b": STR}), '{"b": "x"}', '{"c": 1}'),
    (obj(properties={"a": INT}, additionalProperties=STR), '{"a": 1, "c": "x"}', '{"c": 1}'),
    (
        obj(properties={"a": INT}, maxProperties=1, additionalProperties=True),
        '{"a": 1}',
        '{"a": 1, "b": 2}',
    ),
    (obj(properties={"a": INT, "b": INT}, minProperties=1), '{"b": 1}', "{}"),
    (obj(patternProperties={"^a$": INT}, additionalProperties=False), '{"a": 1}', '{"a": "x"}'),
    (obj(propertyNames={"enum": ["a", "b"]}), '{"a": 3}', '{"c": 3}'),
    ({"$defs": {"n": INT}, "$ref": "#/$defs/n"}, "1", '"a"'),
    ({"$defs": {"n": INT}, "items": {"$ref": "#/$defs/n", "description": "x"}}, "[1]", '["a"]'),
    ({"const": {"a": [1, "x"]}}, '{"a":[1,"x"]}', '{"a":[2,"x"]}'),
    ({"enum": [1, "a", None]}, "null", "2"),
    ({"type": "string", "enum": ["a"], "title": "t"}, '"a"', '"b"'),
    ({"type": "array", "items": INT, "uniqueItems": False}, "[1, 1]", '["a"]'),
]


@pytest.mark.parametrize(("schema", "good", "bad"), ENFORCED)
def test_what_passes_is_enforced(compiler, schema, good, bad):
    compiled = compiler.compile_json_schema(json.dumps(checked_json_schema(schema)))

    def accepts(text: str) -> bool:
        matcher = xgrammar.GrammarMatcher(compiled)
        return matcher.accept_string(text) and matcher.is_completed()

    assert accepts(good)
    assert not accepts(bad)


REFUSED = [
    ({"not": STR}, "not is not supported"),
    ({"if": STR, "then": {}}, "if is not supported"),
    ({"type": "array", "contains": INT}, "contains"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    (obj(properties={"a": INT}, dependentRequired={"a": ["b"]}), "dependentRequired"),
    (obj(properties={"a": INT}, dependentSchemas={"a": {}}), "dependentSchemas"),
    (obj(properties={"z": STR}, anyOf=[{"required": ["z"]}]), "anyOf beside type"),
    ({"allOf": [INT, {"type": "integer", "minimum": 3}]}, "allOf with more than one"),
    ({"anyOf": [INT], "oneOf": [INT]}, "anyOf beside oneOf"),
    ({"$ref": "#/$defs/n", "minimum": 3, "$defs": {"n": INT}}, r"\$ref beside minimum"),
    ({"$ref": "#n"}, r"\$ref '#n'"),
    ({"$dynamicRef": "#n"}, r"\$dynamicRef"),
    ({"minimum": 5}, "minimum needs a type"),
    ({"maxLength": 5}, "maxLength needs a type"),
    ({"required": ["a"], "properties": {}}, "required names 'a'"),
    ({"minItems": 2}, "minItems needs a type"),
    ({"patternProperties": {"^a$": INT}}, "patternProperties needs a type"),
    ({"type": "string", "pattern": "^a+$", "maxLength": 2}, "pattern beside maxLength"),
    ({"type": "string", "format": "date", "maxLength": 2}, "format beside maxLength"),
    ({"type": "string", "pattern": "^a+$", "format": "date"}, "pattern beside format"),
    ({"type": "number", "multipleOf": 0.5}, "multipleOf"),
    ({"type": "integer", "multipleOf": 7, "minimum": 0}, "multipleOf"),
    ({"type": "integer", "minimum": 1, "enum": [0, 1]}, "enum beside minimum"),
    ({"type": "integer", "const": "a"}, "the value 'a' is not of type integer"),
    ({"type": ["integer", "string"], "enum": [1.5]}, "1.5 is not of type integer or string"),
    ({"type": "string", "pattern": '^a"c$'}, "quote, backslash"),
    ({"type": "string", "pattern": r"^\\$"}, "quote, backslash"),
    ({"type": "string", "pattern": r"^\n$"}, "quote, backslash"),
    ({"type": "string", "pattern": r"^\x22$"}, "quote, backslash"),
    ({"type": "string", "pattern": r'^x["\\]y$'}, "quote, backslash"),
    ({"type": "string", "pattern": "a^b"}, "in the middle"),
    (obj(patternProperties={'^a"$': INT}), "quote, backslash"),
    (obj(patternProperties={"^a": STR}, properties={"ab": INT}), "also matches the property 'ab'"),
    (obj(patternProperties={"(": STR}, properties={"a": STR}), "not a Python regular"),
    ({"type": "string", "format": "json-pointer"}, "format json-pointer"),
    (obj(propertyNames={"maxLength": 3}, properties={"a": INT}), "propertyNames"),
    (obj(additionalProperties=INT, minProperties=2), "minProperties"),
]


@pytest.mark.parametrize(("schema", "reason"), REFUSED)
def test_what_would_be_ignored_is_refused(schema, reason):
    with pytest.raises(ValueError, match=reason):
        checked_json_schema(schema)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: obj(properties={"x": s}),
        lambda s: {"type": "array", "items": s},
        lambda s: {"type": "array", "prefixItems": [INT, s]},
        lambda s: {"anyOf": [INT, s]},
        lambda s: obj(additionalProperties=s),
        lambda s: obj(patternProperties={"^a$": s}),
        lambda s: {"$defs": {"x": s}, "$ref": "#/$defs/x"},
        lambda s: {"definitions": {"x": s}, "$ref": "#/definitions/x"},
    ],
)
def test_subschemas_are_checked_and_named(wrap):
    checked_json_schema(wrap(INT))
    with pytest.raises(ValueError, match=r"^#/.+: not is not supported"):
        checked_json_schema(wrap({"not": {}}))


def test_names_of_properties_are_not_keywords():
    checked_json_schema(obj(properties={"not": INT, "if": STR, "pattern": STR}, required=["not"]))


@pytest.mark.parametrize("value", [3, "a", None, [{}]])
def test_a_schema_is_an_object_or_a_boolean(value):
    with pytest.raises(ValueError, match="object or a boolean"):
        checked_json_schema(value)


@pytest.mark.parametrize(
    "pattern",
    ["^abc$", "^a|b$", "(^a)", "(a$)", r"\$5\^2", "[$^]", r"[^$]+", r"\d\w\s\.", r"[\]a]", "é$"],
)
def test_ordinary_patterns_pass(pattern):
    checked_regex(pattern)


@pytest.mark.parametrize("pattern", ["a^b", "a$b", "$a", r"\Aabc", r"abc\Z", r"[\q]"])
def test_patterns_with_ignored_parts_are_refused(pattern):
    with pytest.raises(ValueError, match="not supported"):
        checked_regex(pattern)


def test_structural_tags_are_searched():
    inner = {
        "type": "tag",
        "begin": "<",
        "content": {"type": "json_schema", "json_schema": {"not": {}}},
        "end": ">",
    }
    with pytest.raises(ValueError, match="not is not supported"):
        checked_structural_tag({"format": {"type": "sequence", "elements": [inner]}})
    with pytest.raises(ValueError, match="in the middle"):
        checked_structural_tag({"format": {"type": "regex", "pattern": "a^b"}})
    checked_structural_tag({"format": {"type": "const_string", "value": "a^b"}})
