"""What requests do to their logits before a token is chosen: penalties, bias, bans, grammars, and the filters of draws.

Shape suffixes: N rows of the batch, M rows of the batch that use a rule, V vocab, E entries of a sparse (row, token)
list, W words of a token bitmask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lorikeet.ops import sampling as ops
from lorikeet.worker.grammar.masks import GrammarMatcher, MaskFiller
from lorikeet.worker.sampling.state import SamplingState
from lorikeet.worker.staging import upload


class LogitRules:
    """Applies each rule to the rows that use it, in the order of ``ops/sampling.py``."""

    def __init__(self, vocab_size: int, device: torch.device, masks: MaskFiller) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._masks = masks

    def apply(self, raw_NV: Tensor, states: Sequence[SamplingState]) -> Tensor:
        """The logits after penalties, bias, min_new_tokens and grammar; ``raw_NV`` itself if no row has any."""
        rules: list[tuple[Callable[[SamplingState], bool], Callable[..., None]]] = [
            (lambda state: state.seen_V is not None, self._penalise_repetition_),
            (lambda state: state.counts_V is not None, self._penalise_counts_),
            (lambda state: state.bias is not None, self._bias_),
            (lambda state: state.is_early and state.matcher is None, self._ban_stops_),
            (lambda state: state.matcher is not None, self._apply_grammar_),
        ]
        final_NV = raw_NV
        for uses, modify_ in rules:
            rows = [index for index, state in enumerate(states) if uses(state)]
            if not rows:
                continue
            if final_NV is raw_NV:
                final_NV = raw_NV.clone()
            modify_(final_NV, rows, [states[row] for row in rows])
        return final_NV

    def filter_(self, scaled_MV: Tensor, users: Sequence[SamplingState]) -> None:
        """Top-k, top-p and min-p for the rows that use one of them."""
        rows = [row for row, user in enumerate(users) if user.is_filtered]
        if not rows:
            return
        used = [users[row].sampling for row in rows]
        top_ks = [min(p.top_k, self._vocab_size) if p.top_k > 0 else self._vocab_size for p in used]
        uses_top_k = any(p.top_k > 0 for p in used)
        uses_top_p = any(p.top_p < 1 for p in used)
        uses_min_p = any(p.min_p > 0 for p in used)
        rows_M = self._ints(rows)
        part_MV = scaled_MV if len(rows) == len(users) else scaled_MV[rows_M]
        ops.keep_likely_(
            part_MV,
            top_k_N=self._ints(top_ks) if uses_top_k else None,
            top_p_N=self._floats([p.top_p for p in used]) if uses_top_p else None,
            min_p_N=self._floats([p.min_p for p in used]) if uses_min_p else None,
            max_top_k=max(top_ks),
        )
        if part_MV is not scaled_MV:
            scaled_MV[rows_M] = part_MV

    def _penalise_repetition_(
        self, final_NV: Tensor, rows: list[int], users: list[SamplingState]
    ) -> None:
        rows_M = self._ints(rows)
        part_MV = final_NV[rows_M]
        seen_MV = torch.stack([user.seen_V for user in users if user.seen_V is not None])
        penalty_M = self._floats([user.sampling.repetition_penalty for user in users])
        ops.penalise_repetition_(part_MV, seen_MV, penalty_M)
        final_NV[rows_M] = part_MV

    def _penalise_counts_(
        self, final_NV: Tensor, rows: list[int], users: list[SamplingState]
    ) -> None:
        rows_M = self._ints(rows)
        part_MV = final_NV[rows_M]
        counts_MV = torch.stack([user.counts_V for user in users if user.counts_V is not None])
        frequency_M = self._floats([user.sampling.frequency_penalty for user in users])
        presence_M = self._floats([user.sampling.presence_penalty for user in users])
        ops.penalise_counts_(part_MV, counts_MV, frequency_M, presence_M)
        final_NV[rows_M] = part_MV

    def _bias_(self, final_NV: Tensor, rows: list[int], users: list[SamplingState]) -> None:
        biases = [user.bias for user in users if user.bias is not None]
        rows_E, tokens_E = self._entries(rows, [tokens_E for tokens_E, _ in biases])
        values_E = torch.cat([values_E for _, values_E in biases])
        ops.add_bias_(final_NV, rows_E, tokens_E, values_E)

    def _ban_stops_(self, final_NV: Tensor, rows: list[int], users: list[SamplingState]) -> None:
        banned = [user.banned_E for user in users if user.banned_E is not None]
        ops.ban_(final_NV, *self._entries(rows, banned))

    def _entries(self, rows: list[int], lists: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(row, token) entries from a list of tokens for each row, without touching them on the host."""
        counts_M = self._ints([len(tokens_E) for tokens_E in lists])
        tokens_E = torch.cat(lists)
        # With the length given, torch need not ask the device for it.
        rows_E = torch.repeat_interleave(self._ints(rows), counts_M, output_size=len(tokens_E))
        return rows_E, tokens_E

    def _apply_grammar_(
        self, final_NV: Tensor, rows: list[int], users: list[SamplingState]
    ) -> None:
        bits_MW = torch.zeros((len(users), (self._vocab_size + 31) // 32), dtype=torch.int32)
        wanted: list[tuple[GrammarMatcher, tuple[int, ...]]] = []
        for user in users:
            assert user.matcher is not None
            user.matcher.error = user.matcher.error or user.error
            wanted.append((user.matcher, user.early_stops if user.is_early else ()))
        # A sequence that has failed has only zeros: no token, and its own error is reported.
        bits_MW = self._masks.fill(bits_MW, wanted)
        for user, (matcher, _) in zip(users, wanted, strict=True):
            user.error = matcher.error
        rows_M = self._ints(rows)
        part_MV = final_NV[rows_M]
        ops.apply_bitmask_(part_MV, upload(bits_MW.numpy(), self._device))
        final_NV[rows_M] = part_MV

    def _floats(self, values: list[float]) -> Tensor:
        return upload(np.asarray(values, dtype=np.float32), self._device)

    def _ints(self, values: list[int]) -> Tensor:
        return upload(np.asarray(values, dtype=np.int64), self._device)
