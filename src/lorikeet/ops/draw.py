"""From logits to tokens in one go, for rows that use no filter: greedy, or a draw at a temperature.

Shape legend: N rows, V vocab, L lanes: one place per running sequence for the token it sampled last.
"""

from __future__ import annotations

from typing import Protocol

import torch

from lorikeet.ops.sampling import draw, row_keys, scale_temperature


class DrawOp(Protocol):
    """Chooses one token per row: the most likely one, or a draw at a temperature. Semantics, for each row n::

        token = argmax(logits)                                                        # where temperature is 0
        token = draw(scale_temperature(logits, temperature), row_keys(seed, counter)) # elsewhere
        scores = max(logits), logits[token]
        tokens[lane] = token                                                          # where lane >= 0
        return token, scores

    The functions are those of :mod:`lorikeet.ops.sampling`, so the token is a function of the row's logits,
    temperature, seed and counter alone. Among equal logits the lowest id is greedy's choice, and -inf is never drawn.

    ``logits`` are float32, float16 or bfloat16 and computed with in float32; rows may be strided.
    ``temperature`` is float32: 0, or in [1e-30, 1e30]. ``seeds`` and ``counters`` are int64, ``lanes`` and ``tokens``
    int32 or int64; lanes that are not below 0 are distinct. The result is int64 [N] and float32 [N, 2].
    Writes to ``tokens`` and to nothing else.

    A row without a finite maximum shows it in ``scores``: the maximum is NaN if any logit is. Its token is some id in
    [0, V).
    """

    def __call__(
        self,
        logits_NV: torch.Tensor,
        temperature_N: torch.Tensor,
        seeds_N: torch.Tensor,
        counters_N: torch.Tensor,
        lanes_N: torch.Tensor,
        tokens_L: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def draw_tokens_torch(
    logits_NV: torch.Tensor,
    temperature_N: torch.Tensor,
    seeds_N: torch.Tensor,
    counters_N: torch.Tensor,
    lanes_N: torch.Tensor,
    tokens_L: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch form of :class:`DrawOp`. Waits for the device, so that noise is drawn only for rows that need it."""
    logits_NV = logits_NV.float()
    tokens_N = logits_NV.argmax(dim=-1)
    drawn_N = temperature_N > 0
    if drawn_N.any():
        scaled_NV = scale_temperature(logits_NV[drawn_N], temperature_N[drawn_N])
        tokens_N[drawn_N] = draw(scaled_NV, row_keys(seeds_N[drawn_N], counters_N[drawn_N]))
    chosen_N = logits_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1)
    has_lane_N = lanes_N >= 0
    tokens_L[lanes_N[has_lane_N].long()] = tokens_N[has_lane_N].to(tokens_L.dtype)
    return tokens_N, torch.stack((logits_NV.amax(dim=-1), chosen_N), dim=1)
