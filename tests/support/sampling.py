"""The sampler and the grammar compiler in one call each, where the engine goes on between two."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lorikeet.core.plan import SampledToken
from lorikeet.core.request import SamplingParams, TokenLogprobs
from lorikeet.worker.grammar.compiler import GrammarCompiler
from lorikeet.worker.grammar.masks import CompiledGrammar, GrammarMatcher
from lorikeet.worker.sampling.sampler import Sampler
from tests.support.grammar_tokenizer import VOCAB


def sample(sampler: Sampler, logits_NV: Tensor, seqs: list[int]) -> list[SampledToken]:
    """Choose a token for each row on the CPU and read it at once; the rows have no lanes."""
    arrays = sampler.arrays(seqs, np.full(len(seqs), -1, dtype=np.int64))
    inputs = [torch.from_numpy(array) for array in arrays]
    return sampler.launch(logits_NV, seqs, inputs, torch.zeros(1, dtype=torch.int64)).finish()


def prompt_logprobs(
    sampler: Sampler, logits_TV: Tensor, seq: int, first_position: int
) -> list[TokenLogprobs]:
    """Compute the log-probabilities of prompt positions and read them at once."""
    return sampler.launch_prompt(logits_TV, seq, first_position).finish()


def compile_grammar(compiler: GrammarCompiler, sampling: SamplingParams) -> CompiledGrammar | None:
    """Wait for the grammar of a request; None if it has none."""
    return None if sampling.grammar is None else compiler.request(sampling).result()


def accepts(matcher: GrammarMatcher, token_id: int) -> bool:
    """Advance a grammar by one token, as the thread that computes masks does; False if it does not admit the token."""
    matcher.note(token_id)
    try:
        matcher.fill(torch.zeros((1, -(-VOCAB // 32)), dtype=torch.int32), 0)
    except ValueError:
        return False
    return True
