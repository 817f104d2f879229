"""Constrained output: whatever the logits say, the text obeys the grammar; bad grammars are refused by name."""

from __future__ import annotations

import json
import re
import threading

import pytest
import torch
from tokenizers import Tokenizer

from lorikeet.core.plan import SequenceStart
from lorikeet.core.request import SamplingParams
from lorikeet.errors import RequestError
from lorikeet.worker.grammar.compiler import GrammarCompiler
from lorikeet.worker.sampling.sampler import Sampler
from tests.support.grammar_tokenizer import (
    EOS_ID,
    SPECIAL_ID,
    VOCAB,
    save_byte_fallback_tokenizer,
    save_byte_level_tokenizer,
)
from tests.support.sampling import accepts, compile_grammar, sample

# More columns than the tokenizer has tokens: padded logits are the usual case.


class Setup:
    """A tokenizer, a compiler and a sampler over them."""

    def __init__(self, directory, tokenizer: Tokenizer, vocab_size: int = VOCAB) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.compiler = GrammarCompiler(directory, vocab_size, (EOS_ID,))

    def sampler(self) -> Sampler:
        return Sampler(grammars=self.compiler, device="cpu")

    def logits(self, step: int, seed: int) -> torch.Tensor:
        """Random, with a growing bias to the end of sequence and to what closes, so that open grammars end."""
        generator = torch.Generator().manual_seed(seed * 1000 + step)
        logits_NV = torch.randn(1, self.vocab_size, generator=generator) * 4
        logits_NV[0, EOS_ID] += step / 4
        for text, weight in (('"', 4), ("@", 6), ("}", 8), ("]", 8)):
            token = self.tokenizer.token_to_id(text)
            if token is not None:
                logits_NV[0, token] += step / weight
        return logits_NV

    def generate(self, seed: int, *, limit: int = 400, **params) -> list[int]:
        """Tokens up to the end of sequence, without it; fails if it does not come."""
        sampler = self.sampler()
        sampler.start(make_start(seed=seed, **params))
        tokens: list[int] = []
        for step in range(limit):
            (result,) = sample(sampler, self.logits(step, seed), [1])
            assert result.error is None
            if result.token_id == EOS_ID:
                return tokens
            tokens.append(result.token_id)
        raise AssertionError(f"no end after {limit} tokens: {self.text(tokens)!r}")

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def make_start(*, seed=0, outputs=(), **params) -> SequenceStart:
    return SequenceStart(
        seq=1,
        token_ids=[5, 6, *outputs],
        num_prompt=2,
        num_cached=0,
        page_ids=[],
        slot=0,
        sampling=SamplingParams(**params),
        seed=seed,
    )


@pytest.fixture(scope="module")
def setup(tmp_path_factory) -> Setup:
    directory = tmp_path_factory.mktemp("byte_level")
    return Setup(directory, save_byte_level_tokenizer(directory))


def conforms(value: object, schema: dict) -> bool:
    """A validator for the few keywords that the schemas below use."""
    if "enum" in schema:
        return value in schema["enum"]
    if branches := schema.get("anyOf", schema.get("oneOf")):
        return any(conforms(value, branch) for branch in branches)
    match schema.get("type"):
        case "object":
            properties = schema["properties"]
            return (
                isinstance(value, dict)
                and set(schema.get("required", [])) <= set(value) <= set(properties)
                and all(conforms(item, properties[name]) for name, item in value.items())
            )
        case "array":
            return (
                isinstance(value, list)
                and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1000)
                and all(conforms(item, schema["items"]) for item in value)
            )
        case "string":
            return (
                isinstance(value, str)
                and len(value) <= schema.get("maxLength", 10**6)
                and ("pattern" not in schema or bool(re.fullmatch(schema["pattern"], value)))
            )
        case "integer":
            return (
                isinstance(value, int)
                and not isinstance(value, bool)
                and schema.get("minimum", value) <= value <= schema.get("maximum", value)
            )
        case "boolean":
            return isinstance(value, bool)
    return schema == {}


SCHEMAS = {
    "flat": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
    },
    "nested": {
        "type": "object",
        "properties": {
            "people": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": {
                    "type": "object",
                    "properties": {
                        "age": {"type": "integer", "minimum": 0, "maximum": 150},
                        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
                    },
                    "required": ["age", "code"],
                },
            },
            "note": {"anyOf": [{"type": "string", "maxLength": 8}, {"enum": [None, 7]}]},
        },
        "required": ["people"],
    },
    "enum": {"type": "string", "enum": ["red", "grün", 'a "quoted" word']},
    "range": {"type": "integer", "minimum": -7, "maximum": 12},
    # Nothing shows that the branches exclude each other.
    "one of": {
        "oneOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}},
            {"type": "object", "properties": {"b": {"oneOf": [{"enum": ["x"]}, {"enum": [1]}]}}},
        ]
    },
}


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("greedy", [True, False])
def test_json_schema_is_always_obeyed(setup, name, greedy):
    schema = SCHEMAS[name]
    for seed in range(6):
        tokens = setup.generate(
            seed, json_schema=json.dumps(schema), temperature=0.0 if greedy else 1.2
        )
        value = json.loads(setup.text(tokens))
        assert conforms(value, schema), (value, schema)


@pytest.mark.parametrize("schema", ["{}", "true", '{"type": "object"}'])
def test_schemas_that_admit_any_json(setup, schema):
    for seed in range(6):
        text = setup.text(setup.generate(seed, json_schema=schema, top_p=0.95))
        value = json.loads(text, strict=True)
        assert schema != '{"type": "object"}' or isinstance(value, dict)


FORMATS = [
    "date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "uri-reference",
    "uri-template",
]  # fmt: skip


@pytest.mark.parametrize(
    "string",
    [{"format": name} for name in FORMATS]
    + [{"maxLength": 6}, {"minLength": 3}, {"pattern": "^.{2}\\s$"}],
)
def test_strings_are_always_json(setup, string):
    """Strings are where a grammar's character classes and JSON's escapes can disagree."""
    for seed in range(12):
        schema = json.dumps({"type": "string", **string})
        text = setup.text(setup.generate(seed, json_schema=schema, temperature=3.0, limit=900))
        assert isinstance(json.loads(text, strict=True), str)


def test_text_outside_ascii_is_produced_as_it_is(setup):
    schema = json.dumps({"enum": ["grün", "日本"]})
    texts = {setup.text(setup.generate(seed, json_schema=schema)) for seed in range(12)}
    assert texts == {'"grün"', '"日本"'}


REGEXES = [
    r"\d{4}-\d{2}-\d{2}",
    r"(yes|no|maybe)",
    r"[a-z]+@[a-z]+\.(com|org)",
    r"é{2,4}",
    r"[^a-z]{3}",
    r"\w+( \w+){0,3}",
    r"^(a|b)*c$",
    r"-?(0|[1-9][0-9]*)(\.[0-9]{1,2})?",
]


@pytest.mark.parametrize("pattern", REGEXES)
def test_regex_is_always_obeyed(setup, pattern):
    for seed in range(5):
        text = setup.text(setup.generate(seed, regex=pattern))
        assert re.fullmatch(pattern, text), text


def test_ebnf_is_always_obeyed(setup):
    ebnf = 'root ::= "(" item ("," item)* ")"\nitem ::= [0-9] | root'
    for seed in range(8):
        text = setup.text(setup.generate(seed, ebnf=ebnf))
        assert set(text) <= set("(),0123456789")
        depth = 0
        for char in text:
            depth += {"(": 1, ")": -1}.get(char, 0)
            assert depth >= 0
        assert depth == 0


TAGS = [
    {
        "type": "structural_tag",
        "format": {
            "type": "tag",
            "begin": "<f>",
            "content": {"type": "json_schema", "json_schema": SCHEMAS["range"]},
            "end": "</f>",
        },
    },
    {
        "type": "structural_tag",
        "structures": [{"begin": "<f>", "schema": SCHEMAS["range"], "end": "</f>"}],
        "triggers": ["<f"],
    },
]


def test_structural_tag_is_always_obeyed(setup):
    for seed in range(5):
        text = setup.text(setup.generate(seed, structural_tag=json.dumps(TAGS[0])))
        found = re.fullmatch(r"<f>(-?\d+)</f>", text)
        assert found, text
        assert -7 <= int(found[1]) <= 12


LIMITED = {"type": "json_schema", "json_schema": {"type": "string", "maxLength": 9}}
ENDED = {"type": "tag", "begin": "<f>", "content": LIMITED, "end": "</f>"}
ONLY_JSON = [
    ENDED,
    {"type": "sequence", "elements": [{"type": "const_string", "value": "a\n"}, ENDED]},
    {"type": "tags_with_separator", "tags": [ENDED], "separator": "\n", "at_least_one": True},
]
FREE_TEXT = [
    {"type": "any_text"},
    {"type": "sequence", "elements": [{"type": "any_text", "excludes": ["<f>"]}, ENDED]},
    {"type": "regex", "pattern": r"\t"},
]


def admits_tabs(setup: Setup, form: dict, before: str) -> bool:
    source = json.dumps({"type": "structural_tag", "format": form})
    matcher = setup.compiler.matcher(SamplingParams(structural_tag=source))
    for token in setup.tokenizer.encode(before).ids:
        assert accepts(matcher, token), before
    return accepts(matcher, setup.tokenizer.encode("\t").ids[0])


def test_structural_tags_of_json_alone_have_no_raw_control_characters(setup):
    """A tab in a string would make it no JSON."""
    for form, before in zip(ONLY_JSON, ('<f>"', 'a\n<f>"', '<f>"'), strict=True):
        assert not admits_tabs(setup, form, before)
    for form in FREE_TEXT:
        assert admits_tabs(setup, form, "")


def test_structural_tag_in_the_older_form(setup):
    """Free text, but once the trigger is there the rest must follow."""
    sampler = setup.sampler()
    outputs = setup.tokenizer.encode("free <f>").ids
    sampler.start(make_start(outputs=outputs, structural_tag=json.dumps(TAGS[1])))
    tokens = list(outputs)
    for step in range(60):
        (result,) = sample(sampler, setup.logits(step, 3), [1])
        assert result.error is None
        tokens.append(result.token_id)
        if "</f>" in setup.text(tokens):
            break
    found = re.fullmatch(r"free <f>(-?\d+)</f>.*", setup.text(tokens), re.DOTALL)
    assert found
    assert -7 <= int(found[1]) <= 12


def test_byte_fallback_vocabulary(tmp_path):
    tokenizer = save_byte_fallback_tokenizer(tmp_path)
    setup = Setup(tmp_path, tokenizer, vocab_size=tokenizer.get_vocab_size() + 3)
    for seed in range(5):
        text = setup.text(setup.generate(seed, regex="[a-z]+ [a-z]+\n(é|ü)"))
        assert re.fullmatch("[a-z]+ [a-z]+\n(é|ü)", text), text


# --- the end of a constrained output ---


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_after_the_grammar_only_the_end_of_sequence_follows(setup, ignore_eos):
    sampler = setup.sampler()
    sampler.start(make_start(regex="abc?", ignore_eos=ignore_eos))
    tokens = [sample(sampler, setup.logits(step, 1), [1])[0] for step in range(12)]
    assert all(token.error is None for token in tokens)
    ids = [token.token_id for token in tokens]
    end = ids.index(EOS_ID)
    assert re.fullmatch("abc?", setup.text(ids[:end]))
    assert ids[end:] == [EOS_ID] * (12 - end)


def test_min_new_tokens_keeps_an_open_grammar_open(setup):
    for seed in range(5):
        tokens = setup.generate(seed, regex="[a-z]*", min_new_tokens=12)
        assert len(tokens) >= 12


def test_min_new_tokens_yields_to_a_grammar_that_admits_only_the_end(setup):
    tokens = setup.generate(0, regex="[0-9]", min_new_tokens=12)
    assert re.fullmatch("[0-9]", setup.text(tokens))


def test_min_new_tokens_also_leaves_out_stop_ids_where_the_grammar_can(setup):
    stop = setup.tokenizer.token_to_id("a")
    tokens = setup.generate(0, regex="[ab]*", min_new_tokens=10, stop_token_ids=(stop,))
    assert stop not in tokens[:10]


def test_a_grammar_and_logits_that_exclude_each_other_are_an_error_of_the_row(setup):
    sampler = setup.sampler()
    sampler.start(make_start(regex="abc"))
    logits_NV = torch.full((1, VOCAB), -torch.inf)
    logits_NV[0, setup.tokenizer.token_to_id("x")] = 1.0
    (result,) = sample(sampler, logits_NV, [1])
    assert result.error is not None
    assert "no token is possible" in result.error


def test_padding_and_special_tokens_are_never_admitted(setup):
    """A special token would vanish from the text, and padding has none."""
    sampler = setup.sampler()
    sampler.start(make_start(regex="(.|\n)*"))
    logits_NV = torch.zeros(1, VOCAB)
    logits_NV[0, [SPECIAL_ID, setup.tokenizer.get_vocab_size(), VOCAB - 1]] = 1000.0
    for _ in range(30):
        (result,) = sample(sampler, logits_NV, [1])
        assert result.token_id not in (SPECIAL_ID,)
        assert result.token_id < setup.tokenizer.get_vocab_size()


def test_special_tokens_that_are_shown_count_as_their_text(setup):
    sampler = setup.sampler()
    sampler.start(make_start(regex=r"<\|im_start\|>", skip_special_tokens=False))
    logits_NV = torch.zeros(1, VOCAB)
    logits_NV[0, SPECIAL_ID] = 1000.0
    ids = [sample(sampler, logits_NV, [1])[0].token_id for _ in range(2)]
    assert ids == [SPECIAL_ID, EOS_ID]


def test_structural_tags_may_name_special_tokens(setup):
    tag = {"type": "structural_tag", "format": {"type": "token", "token": "<|im_start|>"}}
    assert setup.generate(0, structural_tag=json.dumps(tag)) == [SPECIAL_ID]


def test_constrained_and_free_rows_share_a_batch(setup):
    sampler = setup.sampler()
    first = make_start(regex="[0-9]{8}")
    free = make_start(temperature=0.0)
    free.seq = 2
    sampler.start(first)
    sampler.start(free)
    digits: list[int] = []
    for step in range(9):
        logits_NV = torch.cat([setup.logits(step, 4), setup.logits(step, 5)])
        constrained, unconstrained = sample(sampler, logits_NV, [1, 2])
        assert unconstrained.token_id == int(logits_NV[1].argmax())
        digits.append(constrained.token_id)
        if constrained.token_id == EOS_ID:
            break
    assert re.fullmatch("[0-9]{8}", setup.text(digits))


# --- bad grammars ---

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}
REFUSED = [
    ("json_schema", '{"type": "object"', "not valid JSON"),
    ("json_schema", "[]", "an object or a boolean"),
    ("json_schema", "false", "Schema 'false'"),
    ("json_schema", '{"type": "foo"}', "type is 'foo'; allowed: one of string"),
    ("json_schema", '{"$ref": "#/nope"}', "nope"),
    ("json_schema", '{"$ref": "http://example.com/x"}', "$ref"),
    ("json_schema", '{"$ref": "#"}', "no output at all"),
    ("json_schema", '{"enum": []}', "must not be empty"),
    ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "minimum greater"),
    ("json_schema", '{"not": {"type": "string"}}', "not is not supported"),
    ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
    ("json_schema", '{"items": ' * 200 + "{}" + "}" * 200, "nested deeper"),
    ("json_schema", "[" * 100_000, "recursion"),
    ("regex", "(", "parenthesis"),
    ("regex", "a{3,1}", "Lower bound"),
    ("regex", "(?=a)b", "Lookahead"),
    ("regex", r"(a)\1", "Backreference"),
    ("regex", r"\bfoo", "boundary"),
    ("regex", "a^b", "^ in the middle"),
    ("regex", r"a\Z", "escape"),
    ("ebnf", "garbage", "root"),
    ("ebnf", 'root ::= "a" b', '"b" is not defined'),
    ("ebnf", "root ::= root", "no output at all"),
    ("ebnf", "", "root"),
    ("structural_tag", "{", "not valid JSON"),
    ("structural_tag", "{}", "format"),
    ("structural_tag", '{"type": "structural_tag", "format": {"type": "zz"}}', "zz"),
    ("structural_tag", '{"structures": [{"begin": "<f>"}]}', "begin, schema and end"),
    ("structural_tag", '{"structures": [], "trigger": []}', "'trigger'"),
    (
        "structural_tag",
        json.dumps(
            {
                "structures": [{"begin": "<f>", "schema": {"not": {}}, "end": "x"}],
                "triggers": ["<f>"],
            }
        ),
        "not is not supported",
    ),
]


@pytest.mark.parametrize(("kind", "source", "reason"), REFUSED)
def test_bad_grammars_name_the_field_and_the_reason(setup, kind, source, reason):
    with pytest.raises(RequestError) as caught:
        compile_grammar(setup.compiler, SamplingParams(**{kind: source}))
    message = str(caught.value)
    assert message.startswith(f"sampling_params.{kind}: ")
    assert reason in message
    assert caught.value.param == kind
    assert len(message) < 600
    assert ".cc:" not in message


def test_a_bad_grammar_fails_its_sequence_alone(setup):
    """The engine compiles before it admits; should it not, the other rows still get their tokens."""
    sampler = setup.sampler()
    sampler.start(make_start(regex="("))
    other = make_start(temperature=0.0)
    other.seq = 2
    sampler.start(other)
    logits_NV = torch.cat([setup.logits(0, 0), setup.logits(0, 1)])
    refused, served = sample(sampler, logits_NV, [1, 2])
    assert refused.error is not None
    assert "parenthesis" in refused.error
    assert (served.error, served.token_id) == (None, int(logits_NV[1].argmax()))


def test_without_a_tokenizer_file_grammars_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"tokenizer\.json"):
        compile_grammar(GrammarCompiler(tmp_path, 10, (0,)), SamplingParams(regex="a"))


def test_without_an_end_of_sequence_token_grammars_are_refused(tmp_path):
    save_byte_level_tokenizer(tmp_path)
    with pytest.raises(RequestError, match="no end-of-sequence token"):
        compile_grammar(GrammarCompiler(tmp_path, VOCAB, ()), SamplingParams(regex="a"))


def test_requests_without_a_grammar_need_nothing(tmp_path):
    compile_grammar(GrammarCompiler(tmp_path, 10, ()), SamplingParams())


def test_compiling_from_several_threads(setup, tmp_path):
    """The first use builds the tokenizer data, so the race is there as well as in the cache."""
    tokenizer = save_byte_level_tokenizer(tmp_path)
    fresh = Setup(tmp_path, tokenizer)
    failures: list[object] = []

    def compile_many(worker: int) -> None:
        for index in range(15):
            schema = {"type": "object", "properties": {f"k{index % 4}": {"type": "string"}}}
            compile_grammar(fresh.compiler, SamplingParams(json_schema=json.dumps(schema)))
            try:
                compile_grammar(fresh.compiler, SamplingParams(regex="(" * (1 + worker % 2)))
            except RequestError:
                continue
            failures.append(worker)

    threads = [threading.Thread(target=compile_many, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    assert re.fullmatch("[ab]{3}", fresh.text(fresh.generate(0, regex="[ab]{3}")))
