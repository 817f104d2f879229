"""Log-probabilities of chosen tokens, computed on the device and read later.

Shape suffixes: N rows, V vocab, K most likely tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorikeet.core.request import TokenLogprobs
from lorikeet.ops import sampling as ops
from lorikeet.worker.staging import Download

# JSON has no infinity; a token that the model excludes altogether reports the lowest float32 instead.
_LOWEST = torch.finfo(torch.float32).min


class PendingLogprobs:
    """Log-probabilities on their way to the host.

    Args:
        logits_NV: float32.
        tokens_N: int64, the token of each row.
        num_top: how many of the most likely tokens to report with each.
    """

    def __init__(self, logits_NV: Tensor, tokens_N: Tensor, num_top: int) -> None:
        chosen_N, values_NK, ids_NK = ops.token_logprobs(logits_NV, tokens_N, num_top)
        self._download = Download(chosen_N, tokens_N, values_NK, ids_NK)

    def finish(self) -> list[TokenLogprobs]:
        """One per row. Most likely tokens that the model excludes altogether (-inf) are not listed."""
        chosen_N, tokens_N, values_NK, ids_NK = self._download.wait()
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


class PendingPrompt:
    """Log-probabilities of a prompt's positions: what needs no computing first, then blocks of rows."""

    def __init__(self, known: list[TokenLogprobs], blocks: list[PendingLogprobs]) -> None:
        self._known = known
        self._blocks = blocks

    def finish(self) -> list[TokenLogprobs]:
        found = list(self._known)
        for block in self._blocks:
            found += block.finish()
        return found
