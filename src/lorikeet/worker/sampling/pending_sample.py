"""Sampled tokens on their way from the device, and the results that the host makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lorikeet.core.plan import NOT_FINITE_LOGITS, SampledToken
from lorikeet.core.request import TokenLogprobs
from lorikeet.worker.sampling.logprobs import PendingLogprobs
from lorikeet.worker.sampling.state import SamplingState
from lorikeet.worker.staging import Download

# A row that failed reports this token: a valid id, so that a step already planned after it can still run.
_PLACEHOLDER = 0


class PendingSample:
    """The tokens of one step.

    Args:
        states: of the sequences, by row.
        chosen: tokens [N] and scores [N, 2], on the device; None without rows.
        logprobs: row numbers, how many most likely tokens each wants, and their values.
    """

    def __init__(
        self,
        states: Sequence[SamplingState],
        chosen: tuple[Tensor, Tensor] | None,
        logprobs: list[tuple[list[int], list[int], PendingLogprobs]],
    ) -> None:
        self._states = states
        self._download = None if chosen is None else Download(*chosen)
        self._logprobs = logprobs
        self._tokens: list[SampledToken] | None = None

    def finish(self) -> list[SampledToken]:
        """Wait for the tokens; grammars will advance by them. A second call returns the same."""
        if self._tokens is None:
            self._tokens = [] if self._download is None else self._read(self._download)
        return self._tokens

    def _read(self, download: Download) -> list[SampledToken]:
        tokens_N, scores_N2 = download.wait()
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
