"""A sequence that was preempted (ended, then started with its outputs) goes on exactly as if it had not been."""

from __future__ import annotations

import json

import pytest
import torch

from lorikeet.core.plan import SampledToken, SequenceStart
from lorikeet.core.request import SamplingParams
from lorikeet.worker.grammar.compiler import GrammarCompiler
from lorikeet.worker.sampling.sampler import Sampler
from tests.support.grammar_tokenizer import EOS_ID, save_byte_level_tokenizer
from tests.support.sampling import sample

VOCAB = 352
PROMPT = [5, 6, 7]
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "maxLength": 10},
        "b": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["a", "b"],
}

CASES = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.5},
    "filtered": {"top_k": 50, "top_p": 0.9, "min_p": 0.001},
    "frequency": {"frequency_penalty": 1.9, "temperature": 0.0},
    "presence": {"presence_penalty": -1.5, "top_p": 0.7},
    "repetition": {"repetition_penalty": 1.9, "temperature": 0.0},
    "min_new_tokens": {"min_new_tokens": 17, "stop_token_ids": (40,)},
    "regex": {"regex": "([a-z]+ )*", "frequency_penalty": 0.5},
    "json_schema": {"json_schema": json.dumps(SCHEMA), "min_new_tokens": 30},
}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> GrammarCompiler:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_byte_level_tokenizer(directory)
    return GrammarCompiler(directory, VOCAB, (EOS_ID,))


def make_sampler(compiler: GrammarCompiler) -> Sampler:
    return Sampler(grammars=compiler, device="cpu")


def make_start(seq: int, outputs: list[int], params: dict) -> SequenceStart:
    return SequenceStart(
        seq=seq,
        token_ids=[*PROMPT, *outputs],
        num_prompt=len(PROMPT),
        num_cached=0,
        page_ids=[],
        slot=0,
        sampling=SamplingParams(**params),
        seed=1234567,
        num_top_logprobs=2,
    )


def run(sampler: Sampler, seq: int, steps: range) -> list[SampledToken]:
    """Sample; the logits of a step depend on nothing but the step."""
    results = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        logits_NV = torch.randn(1, VOCAB, generator=generator) * 2
        logits_NV[0, EOS_ID] += 1.0
        results += sample(sampler, logits_NV, [seq])
    return results


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stops", [(1,), (10,), (3, 16, 17, 29)])
def test_the_continuation_is_identical(compiler, name, stops):
    params = CASES[name]
    whole = make_sampler(compiler)
    whole.start(make_start(1, [], params))
    expected = run(whole, 1, range(40))
    assert all(result.error is None for result in expected)

    sampler = make_sampler(compiler)
    sampler.start(make_start(1, [], params))
    found: list[SampledToken] = []
    begin = 0
    for stop in (*stops, 40):
        found += run(sampler, 1, range(begin, stop))
        begin = stop
        sampler.end(1)
        sampler.start(make_start(1, [result.token_id for result in found], params))
    assert found == expected


def test_a_new_number_after_the_preemption_changes_nothing(compiler):
    """The seed counts, not the engine's number of the sequence."""
    params = CASES["sampled"]
    sampler = make_sampler(compiler)
    sampler.start(make_start(1, [], params))
    expected = [result.token_id for result in run(sampler, 1, range(20))]
    sampler.start(make_start(77, expected[:8], params))
    assert [result.token_id for result in run(sampler, 77, range(8, 20))] == expected[8:]


def test_outputs_that_the_grammar_does_not_admit_fail_the_sequence(compiler):
    sampler = make_sampler(compiler)
    sampler.start(make_start(1, [EOS_ID + 50], {"regex": "zzz"}))
    (result,) = run(sampler, 1, range(1))
    assert result.error is not None
    assert "does not admit output token 50" in result.error
