"""Logits in, tokens and log-probabilities out, for a batch of sequences with different sampling parameters.

Shape suffixes: N rows of the batch, M rows of the batch that use a feature, V vocab, T prompt positions, E entries of a
sparse (row, token) list, W words of a token bitmask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorikeet.core.plan import SampledToken, SequenceStart
from lorikeet.core.request import SamplingParams, TokenLogprobs
from lorikeet.errors import RequestError
from lorikeet.ops import sampling as ops
from lorikeet.worker.grammar import GrammarCompiler, GrammarMatcher
from lorikeet.worker.sampling_state import SamplingState

__all__ = ["Sampler"]

# A row that failed reports this token: a valid id, so that a step already planned after it can still run.
_PLACEHOLDER = 0
# JSON has no infinity; a token that the model excludes altogether reports the lowest float32 instead.
_LOWEST = torch.finfo(torch.float32).min
# Prompt log-probabilities are computed in blocks of about this many float32 values (64 MB).
_BLOCK_ELEMENTS = 2**24


class Sampler:
    """Chooses the next token of every row of a batch and follows the state that this needs.

    A token depends on its row's logits, its sequence's parameters, seed and tokens so far, and on nothing else: not on
    the other rows, the row's place or how often the sequence was preempted. Features that no row uses cost nothing;
    features that some rows use are computed for those rows alone.

    Args:
        vocab_size: tokens that exist. Columns of the logits beyond it (padding) are cut off before anything else.
        eos_token_ids: the model's end-of-sequence tokens; those outside the vocabulary are ignored, since they can
            not be sampled.
        device: where the logits are.
        grammars: compiler for constrained requests; None refuses them.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        device: torch.device | str,
        grammars: GrammarCompiler | None,
    ) -> None:
        if grammars is not None and grammars.vocab_size != vocab_size:
            raise ValueError(
                f"the grammar compiler has {grammars.vocab_size} tokens, the sampler {vocab_size}"
            )
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(token for token in eos_token_ids if token < vocab_size)
        self._device = torch.device(device)
        self._grammars = grammars
        self._states: dict[int, SamplingState] = {}

    def start(self, start: SequenceStart) -> None:
        """Open the state of a sequence; its ``token_ids`` beyond the prompt count as sampled already.

        A grammar that does not compile (``GrammarCompiler.compile`` finds that before the request is admitted) fails
        this sequence alone: each of its rows gets the reason as ``SampledToken.error``.

        Raises:
            ValueError: the sequence is open already.
        """
        if start.seq in self._states:
            raise ValueError(f"sequence {start.seq} is open already")
        matcher, error = None, None
        try:
            matcher = self._matcher(start.sampling)
        except RequestError as refusal:
            error = str(refusal)
        self._states[start.seq] = SamplingState(
            start,
            vocab_size=self._vocab_size,
            eos_token_ids=self._eos_token_ids,
            matcher=matcher,
            error=error,
            device=self._device,
        )

    def end(self, seq: int) -> None:
        """Drop the state of a sequence. Raises KeyError if it is not open."""
        del self._states[seq]

    def sample(self, logits_NV: Tensor, seqs: list[int]) -> list[SampledToken]:
        """One token per row, and each sequence's state advanced by it. ``logits_NV`` is not changed.

        A row whose logits hold NaN or +inf, or that leaves no token possible, gets ``SampledToken.error``; its state
        does not advance and the other rows are not affected.

        Log-probabilities are those of the raw distribution: the log-softmax of the logits as the model returned
        them, before penalties, bias, grammar and temperature.

        Args:
            logits_NV: any float type, at least ``vocab_size`` columns; computed with in float32.
            seqs: the sequence of each row.
        """
        if not seqs:
            return []
        states = [self._states[seq] for seq in seqs]
        raw_NV = self._real_columns(logits_NV, len(seqs))
        if all(state.is_plain_greedy for state in states):
            peaks_N, tokens_N = raw_NV.max(dim=-1)
            scores_N = peaks_N
        else:
            peaks_N = raw_NV.amax(dim=-1)
            final_NV = self._modified(raw_NV, states)
            tokens_N = self._choose(final_NV, states)
            scores_N = final_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1)
        errors = [
            state.error or _row_error(peak, score)
            for state, peak, score in zip(states, peaks_N.tolist(), scores_N.tolist(), strict=True)
        ]
        logprobs = self._chosen_logprobs(raw_NV, tokens_N, states)
        return [
            _finish_row(state, token, logprob, error)
            for state, token, logprob, error in zip(
                states, tokens_N.tolist(), logprobs, errors, strict=True
            )
        ]

    def prompt_logprobs(
        self, logits_TV: Tensor, seq: int, first_position: int
    ) -> list[TokenLogprobs]:
        """Log-probabilities of prompt tokens: row i of the logits predicts position ``first_position + i``.

        One entry per row. If ``first_position`` is 1 and the sequence asked for position 0, an entry for position 0
        comes before them, without a value because nothing predicts the first token; so a prompt of one token is
        asked for with no rows. A row that holds NaN has no value either.

        Raises:
            ValueError: a row predicts a position outside the prompt.
        """
        state = self._states[seq]
        num_rows = logits_TV.shape[0]
        if not 1 <= first_position <= len(state.prompt) - num_rows:
            raise ValueError(
                f"sequence {seq}: positions [{first_position}, {first_position + num_rows}) are not in "
                f"[1, {len(state.prompt)})"
            )
        found: list[TokenLogprobs] = []
        if first_position == 1 and state.logprob_start == 0:
            found.append(TokenLogprobs(None, state.prompt[0], []))
        raw_TV = logits_TV[:, : self._vocab_size]
        num_top = max(state.num_top, 0)
        block = max(1, _BLOCK_ELEMENTS // self._vocab_size)
        for begin in range(0, num_rows, block):
            rows_TV = self._real_columns(raw_TV[begin : begin + block], None)
            position = first_position + begin
            tokens = state.prompt[position : position + rows_TV.shape[0]]
            found += _logprobs(rows_TV, torch.tensor(tokens, device=rows_TV.device), num_top)
        return found

    def _matcher(self, sampling: SamplingParams) -> GrammarMatcher | None:
        if sampling.grammar is None:
            return None
        if self._grammars is None:
            kind = sampling.grammar[0]
            raise RequestError(f"sampling_params.{kind}: grammars are not available here", kind)
        return self._grammars.matcher(sampling)

    def _real_columns(self, logits_NV: Tensor, num_rows: int | None) -> Tensor:
        """The logits as float32 without padding columns.

        Raises:
            ValueError: they do not have one row per sequence or have fewer columns than there are tokens.
        """
        rows, columns = logits_NV.shape
        if (num_rows is not None and rows != num_rows) or columns < self._vocab_size:
            raise ValueError(
                f"logits are {rows} x {columns}; expected {num_rows or rows} rows and at least "
                f"{self._vocab_size} columns"
            )
        return logits_NV[:, : self._vocab_size].to(torch.float32)

    def _modified(self, raw_NV: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """The logits after penalties, bias, min_new_tokens and grammar; ``raw_NV`` itself if no row has any."""
        modifiers: list[tuple[Callable[[SamplingState], bool], Callable[..., None]]] = [
            (lambda state: state.seen_V is not None, self._penalise_repetition_),
            (lambda state: state.counts_V is not None, self._penalise_counts_),
            (lambda state: state.bias is not None, self._bias_),
            (lambda state: state.is_early and state.matcher is None, self._ban_stops_),
            (lambda state: state.matcher is not None, self._apply_grammar_),
        ]
        final_NV = raw_NV
        for uses, modify_ in modifiers:
            rows = [index for index, state in enumerate(states) if uses(state)]
            if not rows:
                continue
            if final_NV is raw_NV:
                final_NV = raw_NV.clone()
            users = [states[row] for row in rows]
            rows_M = torch.tensor(rows, device=raw_NV.device)
            modify_(final_NV, rows_M, users)
        return final_NV

    def _penalise_repetition_(
        self, final_NV: Tensor, rows_M: Tensor, users: list[SamplingState]
    ) -> None:
        part_MV = final_NV[rows_M]
        seen_MV = torch.stack([user.seen_V for user in users if user.seen_V is not None])
        penalty_M = self._floats([user.sampling.repetition_penalty for user in users])
        ops.penalise_repetition_(part_MV, seen_MV, penalty_M)
        final_NV[rows_M] = part_MV

    def _penalise_counts_(
        self, final_NV: Tensor, rows_M: Tensor, users: list[SamplingState]
    ) -> None:
        part_MV = final_NV[rows_M]
        counts_MV = torch.stack([user.counts_V for user in users if user.counts_V is not None])
        frequency_M = self._floats([user.sampling.frequency_penalty for user in users])
        presence_M = self._floats([user.sampling.presence_penalty for user in users])
        ops.penalise_counts_(part_MV, counts_MV, frequency_M, presence_M)
        final_NV[rows_M] = part_MV

    def _bias_(self, final_NV: Tensor, rows_M: Tensor, users: list[SamplingState]) -> None:
        biases = [user.bias for user in users if user.bias is not None]
        lengths_M = torch.tensor([len(tokens_E) for tokens_E, _ in biases], device=rows_M.device)
        rows_E = rows_M.repeat_interleave(lengths_M)
        tokens_E = torch.cat([tokens_E for tokens_E, _ in biases])
        ops.add_bias_(final_NV, rows_E, tokens_E, torch.cat([values_E for _, values_E in biases]))

    def _ban_stops_(self, final_NV: Tensor, rows_M: Tensor, users: list[SamplingState]) -> None:
        lengths_M = torch.tensor([len(user.early_stops) for user in users], device=rows_M.device)
        tokens_E = torch.tensor(
            [token for user in users for token in user.early_stops], device=rows_M.device
        )
        ops.ban_(final_NV, rows_M.repeat_interleave(lengths_M), tokens_E)

    def _apply_grammar_(self, final_NV: Tensor, rows_M: Tensor, users: list[SamplingState]) -> None:
        bits_MW = torch.zeros((len(users), (self._vocab_size + 31) // 32), dtype=torch.int32)
        for row, user in enumerate(users):
            # A sequence whose grammar has failed keeps all bits 0: no token, and its own error is reported.
            if user.matcher is not None and user.error is None:
                user.matcher.fill(bits_MW, row, user.early_stops if user.is_early else ())
        part_MV = final_NV[rows_M]
        ops.apply_bitmask_(part_MV, bits_MW.to(part_MV.device))
        final_NV[rows_M] = part_MV

    def _choose(self, final_NV: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """Argmax for greedy rows (the lowest id of equals), a draw for the others; int64 [N]."""
        drawn = [row for row, state in enumerate(states) if not state.sampling.is_greedy]
        if not drawn:
            return final_NV.argmax(dim=-1)
        users = [states[row] for row in drawn]
        if len(users) == len(states):
            return self._draw(final_NV, users)
        rows_M = torch.tensor(drawn, device=final_NV.device)
        tokens_N = final_NV.argmax(dim=-1)
        tokens_N[rows_M] = self._draw(final_NV[rows_M], users)
        return tokens_N

    def _draw(self, final_MV: Tensor, users: Sequence[SamplingState]) -> Tensor:
        scaled_MV = ops.scale_temperature(final_MV, self._floats([u.temperature for u in users]))
        self._filter_(scaled_MV, users)
        seeds_M = torch.tensor([user.seed for user in users], device=final_MV.device)
        counters_M = torch.tensor([user.num_outputs for user in users], device=final_MV.device)
        return ops.draw(scaled_MV, ops.row_keys(seeds_M, counters_M))

    def _filter_(self, scaled_MV: Tensor, users: Sequence[SamplingState]) -> None:
        """Top-k, top-p and min-p for the rows that use one of them."""
        params = [user.sampling for user in users]
        rows = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0]
        if not rows:
            return
        used = [params[row] for row in rows]
        top_ks = [min(p.top_k, self._vocab_size) if p.top_k > 0 else self._vocab_size for p in used]
        uses_top_k = any(p.top_k > 0 for p in used)
        uses_top_p = any(p.top_p < 1 for p in used)
        uses_min_p = any(p.min_p > 0 for p in used)
        rows_M = torch.tensor(rows, device=scaled_MV.device)
        part_MV = scaled_MV if len(rows) == len(users) else scaled_MV[rows_M]
        ops.keep_likely_(
            part_MV,
            top_k_N=torch.tensor(top_ks, device=scaled_MV.device) if uses_top_k else None,
            top_p_N=self._floats([p.top_p for p in used]) if uses_top_p else None,
            min_p_N=self._floats([p.min_p for p in used]) if uses_min_p else None,
            max_top_k=max(top_ks),
        )
        if part_MV is not scaled_MV:
            scaled_MV[rows_M] = part_MV

    def _chosen_logprobs(
        self, raw_NV: Tensor, tokens_N: Tensor, states: Sequence[SamplingState]
    ) -> list[TokenLogprobs | None]:
        """One per row; None where the sequence did not ask for them."""
        found: list[TokenLogprobs | None] = [None] * len(states)
        rows = [row for row, state in enumerate(states) if state.num_top >= 0]
        if not rows:
            return found
        rows_M = torch.tensor(rows, device=raw_NV.device)
        wanted = [states[row].num_top for row in rows]
        values = _logprobs(raw_NV[rows_M], tokens_N[rows_M], max(wanted))
        for row, num_top, value in zip(rows, wanted, values, strict=True):
            found[row] = TokenLogprobs(value.logprob, value.token_id, value.top[:num_top])
        return found

    def _floats(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)


def _row_error(peak: float, score: float) -> str | None:
    """Why a row has no token, from its largest raw logit and the chosen token's final logit."""
    if math.isnan(peak) or peak == math.inf:
        return "the model returned logits that are not finite (NaN or infinity)"
    if score == -math.inf:
        return "no token is possible: logits, stop tokens and grammar together exclude all of them"
    return None


def _finish_row(
    state: SamplingState, token: int, logprobs: TokenLogprobs | None, error: str | None
) -> SampledToken:
    if error is None and not state.advance(token):
        error = f"the grammar does not admit the sampled token {token}"
    if error is not None:
        state.error = error
        return SampledToken(seq=state.seq, token_id=_PLACEHOLDER, error=error)
    return SampledToken(seq=state.seq, token_id=token, logprobs=logprobs)


def _logprobs(logits_NV: Tensor, tokens_N: Tensor, num_top: int) -> list[TokenLogprobs]:
    """Values on the host. Most likely tokens that the model excludes altogether (-inf) are not listed."""
    chosen_N, values_NK, ids_NK = ops.token_logprobs(logits_NV, tokens_N, num_top)
    rows = zip(
        chosen_N.tolist(), tokens_N.tolist(), values_NK.tolist(), ids_NK.tolist(), strict=True
    )
    return [
        TokenLogprobs(
            None if math.isnan(value) else max(value, _LOWEST),
            token,
            [pair for pair in zip(top_values, top_ids, strict=True) if pair[0] > -math.inf],
        )
        for value, token, top_values, top_ids in rows
    ]
