"""Random grammars: each compiles or is refused with a reason; what compiled can be followed wherever it leads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import regex
import torch

from lorikeet.core.request import SamplingParams
from lorikeet.errors import RequestError
from lorikeet.worker.grammar.compiler import GrammarCompiler
from lorikeet.worker.grammar.patterns import checked_json_pattern, checked_regex
from tests.fuzz.conftest import Chance
from tests.support.grammar_tokenizer import EOS_ID, VOCAB, save_byte_level_tokenizer
from tests.support.sampling import accepts

WALK = 60
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 5, 2**31, 2**64, 1.5, 1e300, "", "a", "\ud800", "\0", "é", [], [[]], {}, [{}], {"a": 5},
)  # fmt: skip
TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
KEYWORDS = (
    "type", "properties", "required", "items", "prefixItems", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs",
    "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "multipleOf", "minItems",
    "maxItems", "minProperties", "maxProperties", "additionalProperties", "patternProperties", "propertyNames", "not",
    "unevaluatedProperties", "definitions", "uniqueItems", "title",
)  # fmt: skip


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> Iterator[GrammarCompiler]:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_byte_level_tokenizer(directory)
    made = GrammarCompiler(directory, VOCAB, (EOS_ID,))
    yield made
    made.close()


def schema(chance: Chance, depth: int = 0) -> Any:
    """Mostly a right schema; each part may be something else."""
    if chance.random() < 0.04:
        return chance.choice(ODD)
    kind = chance.choice(TYPES if depth < 3 else TYPES[:5])
    node: dict[str, Any] = {"type": kind}
    match kind:
        case "object":
            names = chance.sample(["a", "b", "c d", "é", '"', "\\"], chance.randint(0, 4))
            node["properties"] = {name: schema(chance, depth + 1) for name in names}
            node["required"] = chance.sample(names, chance.randint(0, len(names)))
            if chance.random() < 0.3:
                node["additionalProperties"] = schema(chance, depth + 1)
            if chance.random() < 0.2:
                node["patternProperties"] = {pattern(chance): schema(chance, depth + 1)}
        case "array":
            node["items"] = schema(chance, depth + 1)
            node["minItems"] = chance.randint(0, 3)
            node["maxItems"] = chance.randint(2, 200)
        case "string":
            choices: list[dict[str, Any]] = [
                {}, {"maxLength": chance.randint(0, 300)}, {"minLength": chance.randint(0, 9)},
                {"pattern": f"^{pattern(chance)}$"}, {"enum": ["a", "b", '"']},
                {"format": chance.choice(["date", "time", "email", "uuid", "ipv4", "uri", "none"])},
            ]  # fmt: skip
            node |= chance.choice(choices)
        case "integer" | "number":
            low = chance.choice(
                [-(10 ** chance.randint(0, 20)), chance.randint(-9, 9), chance.random()]
            )
            node |= chance.choice(
                [{}, {"minimum": low}, {"exclusiveMaximum": low}, {"multipleOf": 3}]
            )
    while chance.random() < 0.15:
        value = chance.choice([*ODD, schema(chance, depth + 1), "#", "#/properties/a"])
        node[chance.choice(KEYWORDS)] = value
    if chance.random() < 0.15:
        word = chance.choice(["anyOf", "oneOf", "allOf"])
        return {word: [schema(chance, depth + 1) for _ in range(chance.randint(0, 3))]}
    return node


def pattern(chance: Chance, depth: int = 0) -> str:
    parts: list[str] = []
    for _ in range(chance.randint(1, 4)):
        atoms = [
            "a",
            "b",
            "é",
            "[a-z]",
            "[^a]",
            ".",
            r"\d",
            r"\w",
            r"\s",
            r"\.",
            r"\x41",
            "[\\]x-]",
        ]
        if depth < 3:
            atoms += [f"({pattern(chance, depth + 1)})", f"(?:{pattern(chance, depth + 1)}|b)"]
        if chance.random() < 0.08:
            atoms = [
                "^",
                "$",
                "(",
                ")",
                "[",
                "{",
                "(?=a)",
                "(?!a)",
                r"\b",
                r"\1",
                r"\p{L}",
                "\\",
                "|",
                "(?i)",
                "\0",
            ]
        low, more = chance.choice([0, 1, 3, 130]), chance.choice([0, 1, 200])
        counts = [
            "",
            "",
            "",
            "",
            "*",
            "+",
            "?",
            "*?",
            f"{{{low}}}",
            f"{{{low},}}",
            f"{{{low},{low + more}}}",
        ]
        parts.append(chance.choice(atoms) + chance.choice(counts))
    return "".join(parts)


def ebnf(chance: Chance) -> str:
    names = ["root", *(f"r{i}" for i in range(chance.randint(0, 4)))]

    def body(depth: int) -> str:
        atoms = ['"a"', '"b"', '""', "[a-z]", "[^a]", r'"\x41"', *names]
        if depth < 3:
            atoms.append(f"({body(depth + 1)})")
        counts = ["", "", "", "*", "+", "?", "{2}", "{0,3}", "{2,}", "{0,0}", "{1000}"]
        parts = [chance.choice(atoms) + chance.choice(counts) for _ in range(chance.randint(1, 3))]
        return chance.choice([" ", " | "]).join(parts)

    lines = [f"{name} ::= {body(0)}" for name in names]
    if chance.random() < 0.1:
        lines.append(chance.choice(["::=", "root ::=", "x", "\0", 'y ::= "', "é ::= a"]))
    return "\n".join(lines)


def form(chance: Chance, depth: int = 0) -> Any:
    kinds = [
        "const_string",
        "json_schema",
        "any_text",
        "token",
        "regex",
        "grammar",
        "exclude_token",
        "any_tokens",
    ]
    if depth < 3:
        kinds += [
            "sequence",
            "or",
            "tag",
            "triggered_tags",
            "tags_with_separator",
            "optional",
            "star",
        ]
    kind = chance.choice(kinds)
    tag = {
        "begin": "<f>",
        "content": form(chance, depth + 1) if depth < 3 else {"type": "any_text"},
        "end": "</f>",
    }
    some = [form(chance, depth + 1) for _ in range(chance.randint(1, 3))] if depth < 3 else []
    content: dict[str, Any] = {
        "const_string": {"value": chance.choice(["a", "<f>", ""])}, "json_schema": {"json_schema": schema(chance, 2)},
        "token": {"token": chance.choice(["a", "b", "<|im_start|>", 3, 399, -1])}, "regex": {"pattern": pattern(chance)},
        "grammar": {"grammar": ebnf(chance)}, "exclude_token": {"exclude_tokens": ["a"]},
        "any_tokens": {"exclude_tokens": [chance.choice(["a", 7])]}, "sequence": {"elements": some},
        "or": {"elements": some}, "tag": tag, "triggered_tags": {"triggers": ["<f"], "tags": [{"type": "tag", **tag}]},
        "tags_with_separator": {"tags": [{"type": "tag", **tag}], "separator": ",", "at_least_one": True},
        "optional": {"content": tag["content"]}, "star": {"content": tag["content"]},
    }.get(kind, {})  # fmt: skip
    made = {"type": kind, **content}
    if chance.random() < 0.05:
        made[chance.choice([*made, "odd"])] = chance.choice(ODD)
    return made


MAKERS = {
    "json_schema": lambda chance: json.dumps(schema(chance)),
    "regex": pattern,
    "ebnf": ebnf,
    "structural_tag": lambda chance: json.dumps({"type": "structural_tag", "format": form(chance)}),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_it_compiles_or_says_why_not_and_can_be_followed(compiler, chances, kind):
    for chance in chances:
        source = MAKERS[kind](chance)
        sampling = SamplingParams(**{kind: source})
        try:
            matcher = compiler.matcher(sampling)
        except RequestError as error:
            message = str(error)
            assert len(message) > len(f"sampling_params.{kind}: ") + 5, source
            assert "Check failed" not in message, source
            assert ".cc:" not in message, source
            message.encode()
            continue
        follow(compiler, matcher, chance, source)


def follow(compiler: GrammarCompiler, matcher, chance: Chance, source: str) -> None:
    bits = torch.zeros((1, (VOCAB + 31) // 32), dtype=torch.int32)
    for _ in range(WALK):
        bits = compiler.masks.fill(bits, [(matcher, ())])
        assert matcher.error is None or "takes too long" in matcher.error, (source, matcher.error)
        if matcher.error is not None:
            return
        tokens = [t for t in range(VOCAB) if bits[0, t // 32] >> (t % 32) & 1]
        assert tokens, source
        token = chance.choice(tokens)
        assert accepts(matcher, token), (source, token)
        if token == EOS_ID:
            return


def test_patterns_that_are_written_anew_mean_the_same(chances):
    for chance in chances:
        source = pattern(chance)
        for write in (checked_regex, checked_json_pattern):
            try:
                written = write(source)
            except ValueError:
                continue
            before, after = (
                regex.compile(text, regex.DOTALL | regex.V0) for text in (source, written)
            )
            for _ in range(10):
                text = "".join(
                    chance.choices("abA.é1 ", k=chance.choice([0, 1, 2, 3, 5, 129, 131, 260]))
                )
                try:
                    found = [bool(p.fullmatch(text, timeout=0.05)) for p in (before, after)]
                except TimeoutError:  # backtracks
                    break
                assert found[0] == found[1], (source, written, text)
