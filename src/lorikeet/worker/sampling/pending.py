"""What a step has sampled, on its way from the device: tokens and log-probabilities, and what the host makes of them.

Shape suffixes: N rows, V vocab, K most likely tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorikeet.core.plan import NOT_FINITE_LOGITS, SampledToken
from lorikeet.core.request import TokenLogprobs
from lorikeet.ops import sampling as ops
from lorikeet.worker.sampling.state import SamplingState
from lorikeet.worker.staging import Download

# JSON has no infinity; a token that the model excludes altogether reports the lowest float32 instead.
_LOWEST = torch.finfo(torch.float32).min
# A row that failed reports this token: a valid id, so that a step already planned after it can still run.
_PLACEHOLDER = 0


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


@dataclass(frozen=True, slots=True)
class PendingPrompt:
    """Log-probabilities of a prompt's positions: what needs no computing first, then blocks of rows."""

    known: list[TokenLogprobs]
    blocks: list[PendingLogprobs]

    def finish(self) -> list[TokenLogprobs]:
        return [*self.known, *(entry for block in self.blocks for entry in block.finish())]


class PendingSample:
    """The tokens of one step.

    Args:
        states: of the sequences, by row.
        chosen: tokens [N] and scores [N, 2], on the device.
        logprobs: row numbers, how many most likely tokens each wants, and their values.
    """

    def __init__(
        self,
        states: Sequence[SamplingState],
        chosen: tuple[Tensor, Tensor],
        logprobs: list[tuple[list[int], list[int], PendingLogprobs]],
    ) -> None:
        self._states = states
        self._download = Download(*chosen)
        self._logprobs = logprobs
        self._tokens: list[SampledToken] | None = None

    def finish(self) -> list[SampledToken]:
        """Wait for the tokens; grammars will advance by them. A second call returns the same."""
        if self._tokens is None:
            self._tokens = self._read()
        return self._tokens

    def _read(self) -> list[SampledToken]:
        tokens_N, scores_N2 = self._download.wait()
        logprobs: list[TokenLogprobs | None] = [None] * len(self._states)
        for rows, wanted, pending in self._logprobs:
            for row, num_top, value in zip(rows, wanted, pending.finish(), strict=True):
                logprobs[row] = TokenLogprobs(value.logprob, value.token_id, value.top[:num_top])
        rows = zip(self._states, tokens_N.tolist(), scores_N2.tolist(), logprobs, strict=True)
        return [
            _finish_row(state, token, logprob, state.error or _row_error(*scores))
            for state, token, scores, logprob in rows
        ]


def _row_error(peak: float, score: float) -> str | None:
    """Why a row has no token, from its largest raw logit and the chosen token's final logit."""
    if math.isnan(peak) or peak == math.inf:
        return NOT_FINITE_LOGITS
    if score == -math.inf:
        return "no token is possible: logits, stop tokens and grammar together exclude all of them"
    return None


def _finish_row(
    state: SamplingState, token: int, logprobs: TokenLogprobs | None, error: str | None
) -> SampledToken:
    if error is not None:
        state.error = error
        return SampledToken(seq=state.seq, token_id=_PLACEHOLDER, error=error)
    state.note(token)
    return SampledToken(seq=state.seq, token_id=token, logprobs=logprobs)
