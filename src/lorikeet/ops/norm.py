"""RMSNorm, with the residual stream added on the way in.

Shape legend: T tokens, D features.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional


class RMSNormOp(Protocol):
    """Adds up x, delta and residual, and normalises the sum. Semantics, with absent operands taken as 0::

        residual = x + delta + residual
        y = residual / sqrt(mean(residual ** 2) + eps) * weight        # statistics in float32
        return y, residual

    ``delta`` is a LoRA delta of ``x`` that is added here, which saves a pass over ``x`` of its own.
    No operand is written to. ``residual`` of the result may be ``x`` itself.
    """

    def __call__(
        self,
        x_TD: torch.Tensor,
        weight_D: torch.Tensor,
        eps: float,
        residual_TD: torch.Tensor | None = None,
        delta_TD: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm_torch(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor | None = None,
    delta_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch form of :class:`RMSNormOp`; any number of leading dimensions."""
    if delta_TD is not None:
        x_TD = x_TD + delta_TD
    if residual_TD is not None:
        x_TD = x_TD + residual_TD
    if x_TD.dtype == torch.float32:
        return functional.rms_norm(x_TD, weight_D.shape, weight_D, eps), x_TD
    # Rounded to the narrow type before the weight is applied: that is where the families' own code rounds.
    normed_TD = functional.rms_norm(x_TD.float(), weight_D.shape, None, eps).to(x_TD.dtype)
    return normed_TD * weight_D, x_TD
