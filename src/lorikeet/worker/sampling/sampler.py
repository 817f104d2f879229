"""Logits in, tokens and log-probabilities out, for a batch of sequences with different sampling parameters.

``launch`` queues the work on the device and ``finish`` of what it returns reads the tokens; between the two the next
step may be launched, since everything that it needs of a token (its id, its count) is on the device already. Only a
grammar needs the token itself: see :meth:`Sampler.needs_tokens`.

Shape suffixes: N rows of the batch, M rows of the batch that use a feature, V vocab, T prompt positions, E entries of a
sparse (row, token) list, W words of a token bitmask, L lanes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor

from lorikeet.core.plan import SequenceStart
from lorikeet.core.request import SamplingParams, TokenLogprobs
from lorikeet.errors import LorikeetError
from lorikeet.ops import sampling as ops
from lorikeet.ops.draw import DrawOp, draw_tokens_torch
from lorikeet.worker.grammar.compiler import GrammarCompiler, GrammarMatcher
from lorikeet.worker.sampling.pending import PendingLogprobs, PendingPrompt, PendingSample
from lorikeet.worker.sampling.rules import LogitRules
from lorikeet.worker.sampling.state import SamplingState
from lorikeet.worker.staging import upload

__all__ = ["Sampler"]

# Prompt log-probabilities are computed in blocks of about this many float32 values (64 MB).
_BLOCK_ELEMENTS = 2**24


class Sampler:
    """Chooses the next token of every row of a batch and follows the state that this needs.

    A token depends on its row's logits, its sequence's parameters, seed and tokens so far, and on nothing else: not on
    the other rows, the row's place or how often the sequence was preempted. Features that no row uses cost nothing;
    features that some rows use are computed for those rows alone.

    Args:
        grammars: compiler for constrained requests. It knows the tokens that exist (columns of the logits beyond them,
            padding, are cut off before anything else) and those that end a sequence.
        device: where the logits are.
        draw: chooses tokens where greedy decoding and temperature are all that any row asks for.
    """

    def __init__(
        self,
        *,
        grammars: GrammarCompiler,
        device: torch.device | str,
        draw: DrawOp = draw_tokens_torch,
    ) -> None:
        self._vocab_size = grammars.vocab_size
        self._device = torch.device(device)
        self._grammars = grammars
        self._draw_tokens = draw
        self._rules = LogitRules(self._vocab_size, self._device, grammars.masks)
        self._states: dict[int, SamplingState] = {}

    def start(self, start: SequenceStart) -> None:
        """Open the state of a sequence; its ``token_ids`` beyond the prompt count as sampled already.

        A grammar that does not compile (``GrammarCompiler.request`` finds that before the request is admitted) fails
        this sequence alone: each of its rows gets the reason as ``SampledToken.error``. So does one whose penalties, bias
        or stop tokens find no memory on the device.

        Raises:
            ValueError: the sequence is open already.
        """
        if start.seq in self._states:
            raise ValueError(f"sequence {start.seq} is open already")
        matcher, error = None, None
        try:
            if start.sampling.grammar is not None:
                matcher = self._grammars.matcher(start.sampling)
        except LorikeetError as refusal:
            error = str(refusal)
        self._states[start.seq] = self._make_state(start, matcher, error)

    def end(self, seq: int) -> None:
        """Drop the state of a sequence. Raises KeyError if it is not open."""
        del self._states[seq]

    def needs_tokens(self, seqs: list[int]) -> bool:
        """True if the tokens that were launched last must be finished before these sequences can sample again."""
        return any(self._states[seq].matcher is not None for seq in seqs)

    def arrays(self, seqs: list[int], lanes: np.ndarray) -> list[np.ndarray]:
        """What :meth:`launch` needs on the device: temperature (0 is greedy), seed, tokens so far and lane, each [N]."""
        states = [self._states[seq] for seq in seqs]
        greedy = [state.sampling.is_greedy for state in states]
        temperatures = [
            0.0 if is_greedy else state.temperature
            for state, is_greedy in zip(states, greedy, strict=True)
        ]
        return [
            np.asarray(temperatures, dtype=np.float32),
            np.asarray([state.seed for state in states], dtype=np.int64),
            np.asarray([state.num_outputs for state in states], dtype=np.int64),
            lanes,
        ]

    def launch(
        self, logits_NV: Tensor, seqs: list[int], inputs: list[Tensor], sampled_L: Tensor
    ) -> PendingSample:
        """Choose one token per row. ``logits_NV`` is not changed, and may be once this has returned.

        A row whose logits hold NaN or +inf, or that leaves no token possible, gets ``SampledToken.error``; the other
        rows are not affected.

        Log-probabilities are those of the raw distribution: the log-softmax of the logits as the model returned
        them, before penalties, bias, grammar and temperature.

        Args:
            logits_NV: any float type, at least ``vocab_size`` columns; computed with in float32.
            seqs: the sequence of each row.
            inputs: :meth:`arrays` on the device.
            sampled_L: receives each row's token at its lane.
        """
        states = [self._states[seq] for seq in seqs]
        real_NV = self._real_columns(logits_NV, len(seqs))
        if all(state.is_plain for state in states):
            temperature_N, seeds_N, counters_N, lanes_N = inputs
            tokens_N, scores_N2 = self._draw_tokens(
                real_NV, temperature_N, seeds_N, counters_N, lanes_N, sampled_L
            )
        else:
            tokens_N, scores_N2 = self._by_rules(real_NV.to(torch.float32), states)
            _note_tokens(sampled_L, inputs[-1], tokens_N)
        logprobs = self._chosen_logprobs(real_NV, tokens_N, states)
        pending = PendingSample(states, (tokens_N, scores_N2), logprobs)
        # Last: what finds no memory is tried again, and must not count a token twice.
        for row, state in enumerate(states):
            state.launched(tokens_N[row : row + 1])
        return pending

    def launch_prompt(self, logits_TV: Tensor, seq: int, first_position: int) -> PendingPrompt:
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
        known: list[TokenLogprobs] = []
        if first_position == 1 and state.logprob_start == 0:
            known.append(TokenLogprobs(None, state.prompt[0], []))
        blocks: list[PendingLogprobs] = []
        size = max(1, _BLOCK_ELEMENTS // self._vocab_size)
        for begin in range(0, num_rows, size):
            rows_TV = self._real_columns(logits_TV[begin : begin + size], None).to(torch.float32)
            position = first_position + begin
            tokens = np.asarray(state.prompt[position : position + rows_TV.shape[0]], np.int64)
            tokens_T = upload(tokens, rows_TV.device)
            blocks.append(PendingLogprobs(rows_TV, tokens_T, max(state.num_top, 0)))
        return PendingPrompt(known, blocks)

    def _make_state(
        self, start: SequenceStart, matcher: GrammarMatcher | None, error: str | None
    ) -> SamplingState:
        make = functools.partial(
            SamplingState,
            vocab_size=self._vocab_size,
            eos_token_ids=self._grammars.eos_token_ids,
            device=self._device,
        )
        try:
            return make(start, matcher=matcher, error=error)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        try:
            return make(start, matcher=matcher, error=error)
        except torch.OutOfMemoryError as shortage:
            # Without any of what takes memory; it never gets a token.
            bare = msgspec.structs.replace(start, sampling=SamplingParams())
            error = f"the device has no memory for penalties, logit_bias or stop tokens: {shortage}"
            return make(bare, matcher=None, error=error)

    def _real_columns(self, logits_NV: Tensor, num_rows: int | None) -> Tensor:
        """The logits without padding columns.

        Raises:
            ValueError: they do not have one row per sequence or have fewer columns than there are tokens.
        """
        rows, columns = logits_NV.shape
        if (num_rows is not None and rows != num_rows) or columns < self._vocab_size:
            raise ValueError(
                f"logits are {rows} x {columns}; expected {num_rows or rows} rows and at least "
                f"{self._vocab_size} columns"
            )
        return logits_NV[:, : self._vocab_size]

    def _by_rules(self, raw_NV: Tensor, states: Sequence[SamplingState]) -> tuple[Tensor, Tensor]:
        """Tokens [N] and scores [N, 2] (largest raw logit, final logit of the token) where rows have rules."""
        final_NV = self._rules.apply(raw_NV, states)
        tokens_N = self._choose(final_NV, states)
        scores_N = final_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1)
        return tokens_N, torch.stack((raw_NV.amax(dim=-1), scores_N), dim=1)

    def _choose(self, final_NV: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """Argmax for greedy rows (the lowest id of equals), a draw for the others; int64 [N]."""
        drawn = [row for row, state in enumerate(states) if not state.sampling.is_greedy]
        if not drawn:
            return final_NV.argmax(dim=-1)
        users = [states[row] for row in drawn]
        if len(users) == len(states):
            return self._draw(final_NV, users)
        rows_M = upload(np.asarray(drawn, np.int64), final_NV.device)
        tokens_N = final_NV.argmax(dim=-1)
        tokens_N[rows_M] = self._draw(final_NV[rows_M], users)
        return tokens_N

    def _draw(self, final_MV: Tensor, users: Sequence[SamplingState]) -> Tensor:
        temperature_M = np.asarray([user.temperature for user in users], np.float32)
        scaled_MV = ops.scale_temperature(final_MV, upload(temperature_M, self._device))
        self._rules.filter_(scaled_MV, users)
        seeds_M = upload(np.asarray([user.seed for user in users], np.int64), self._device)
        counters = np.asarray([user.num_outputs for user in users], np.int64)
        return ops.draw(scaled_MV, ops.row_keys(seeds_M, upload(counters, self._device)))

    def _chosen_logprobs(
        self, real_NV: Tensor, tokens_N: Tensor, states: Sequence[SamplingState]
    ) -> list[tuple[list[int], list[int], PendingLogprobs]]:
        """Rows that asked for them, how many tokens each wants, and the values; no entry if none did."""
        rows = [row for row, state in enumerate(states) if state.num_top >= 0]
        if not rows:
            return []
        rows_M = upload(np.asarray(rows, np.int64), real_NV.device)
        wanted = [states[row].num_top for row in rows]
        logits_MV = real_NV[rows_M].to(torch.float32)
        return [(rows, wanted, PendingLogprobs(logits_MV, tokens_N[rows_M], max(wanted)))]


def _note_tokens(sampled_L: Tensor, lanes_N: Tensor, tokens_N: Tensor) -> None:
    """``sampled[lane] = token`` for rows that have a lane; without looking at the lanes, which may be on a device."""
    lanes_N = lanes_N.to(torch.int64)
    kept_N = sampled_L.index_select(0, lanes_N.clamp_min(0))
    new_N = torch.where(lanes_N < 0, kept_N, tokens_N)
    sampled_L.index_copy_(0, lanes_N.clamp_min(0), new_N)
