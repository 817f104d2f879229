"""What the sampler remembers of one sequence between steps.

Shape suffix: V vocab.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lorikeet.core.plan import SequenceStart
from lorikeet.core.request import SamplingParams
from lorikeet.ops.sampling import MAX_TEMPERATURE, MIN_TEMPERATURE
from lorikeet.worker.grammar.compiler import GrammarMatcher
from lorikeet.worker.staging import upload

__all__ = ["SamplingState"]


class SamplingState:
    """One sequence's sampling parameters and everything that its output so far decides.

    Built from a :class:`SequenceStart` alone, outputs included, so that a preempted sequence goes on exactly where it
    was: nothing else carries over from one step to the next.

    Attributes:
        seq: the sequence's number.
        sampling: its parameters.
        seed: key of its noise; with ``num_outputs``, the counter, it determines the noise of the next draw.
        num_outputs: tokens sampled so far, those on their way included.
        num_top: how many of the most likely tokens to report; -1 if no log-probabilities are wanted at all.
        logprob_start: first prompt position whose log-probability is wanted, or -1.
        prompt: the prompt if ``logprob_start`` is not -1, else empty.
        temperature: clamped to what float32 can divide by; not used by a greedy sequence.
        counts_V: float32 counts of output tokens, or None without frequency and presence penalty.
        seen_V: bool, True for tokens of prompt and output, or None without repetition penalty.
        bias: (token ids int64, values float32), or None.
        early_stops: ids that may not be sampled before ``min_new_tokens``.
        banned_E: the same on the device, or None if there are none or they need no ban: ``min_new_tokens`` is reached, or
            a grammar sees to it.
        matcher: the grammar, or None.
        error: why this sequence cannot go on; None while it can.
    """

    def __init__(
        self,
        start: SequenceStart,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        matcher: GrammarMatcher | None,
        error: str | None,
        device: torch.device,
    ) -> None:
        sampling = start.sampling
        self.seq = start.seq
        self.sampling = sampling
        self.seed = start.seed
        self.num_top = start.num_top_logprobs
        self.logprob_start = start.logprob_start
        self.prompt = start.token_ids[: start.num_prompt] if start.logprob_start >= 0 else []
        self.temperature = min(max(sampling.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE)
        self.early_stops = tuple(sorted({*eos_token_ids, *sampling.stop_token_ids}))
        self.matcher = matcher
        self.error = error
        outputs = start.token_ids[start.num_prompt :]
        self.counts_V, self.seen_V = _histories(start, outputs, vocab_size, device)
        self.bias = _bias(sampling, device)
        self._one = torch.ones(1, device=device)
        # Outputs from before a preemption; the histories have them already.
        self.num_outputs = len(outputs)
        for token in outputs:
            self.note(token)
        self.banned_E = None
        if self.is_early and matcher is None:
            self.banned_E = upload(np.asarray(self.early_stops, np.int64), device)

    @property
    def is_early(self) -> bool:
        """True while ``min_new_tokens`` still forbids tokens that would end the output."""
        return self.num_outputs < self.sampling.min_new_tokens and bool(self.early_stops)

    @property
    def is_filtered(self) -> bool:
        """True if top-k, top-p or min-p exclude tokens from the draw."""
        sampling = self.sampling
        return sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0

    @property
    def is_plain(self) -> bool:
        """True if the next token is the argmax of the unmodified logits, or a draw from all of them."""
        return (
            (self.sampling.is_greedy or not self.is_filtered)
            and self.counts_V is None
            and self.seen_V is None
            and self.bias is None
            and self.matcher is None
            and not self.is_early
        )

    def launched(self, token_1: Tensor) -> None:
        """Count a sampled token, which only the device may know yet. Needs no memory, so it cannot fail."""
        self.num_outputs += 1
        if self.counts_V is not None:
            self.counts_V.index_add_(0, token_1, self._one)
        if self.seen_V is not None:
            self.seen_V.index_fill_(0, token_1, value=True)

    def note(self, token_id: int) -> None:
        """Take a token that the host has read; the grammar advances when the next mask is wanted."""
        if self.matcher is not None:
            self.matcher.note(token_id)


def _histories(
    start: SequenceStart, outputs: list[int], vocab_size: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    sampling = start.sampling
    counts_V = seen_V = None
    if sampling.frequency_penalty != 0 or sampling.presence_penalty != 0:
        tokens = upload(np.asarray(outputs, np.int64), device)
        ones = torch.ones(len(outputs), device=device)
        counts_V = torch.zeros(vocab_size, device=device).index_add_(0, tokens, ones)
    if sampling.repetition_penalty != 1:
        seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        tokens = upload(np.asarray(start.token_ids, np.int64), device)
        seen_V.index_fill_(0, tokens, value=True)
    return counts_V, seen_V


def _bias(sampling: SamplingParams, device: torch.device) -> tuple[Tensor, Tensor] | None:
    if not sampling.logit_bias:
        return None
    tokens = np.asarray(list(sampling.logit_bias), dtype=np.int64)
    values = np.asarray(list(sampling.logit_bias.values()), dtype=np.float32)
    return upload(tokens, device), upload(values, device)
