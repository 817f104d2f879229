"""RMSNorm as a layer.

Shape legend: T tokens, D features.
"""

from __future__ import annotations

import torch
from torch import nn

from lorikeet.layers.linear import Placement
from lorikeet.ops.norm import RMSNormOp


class RMSNorm(nn.Module):
    """Adds the residual stream and normalises; see :class:`lorikeet.ops.norm.RMSNormOp`."""

    def __init__(self, features: int, eps: float, placement: Placement, op: RMSNormOp) -> None:
        super().__init__()
        self.weight = placement.empty(features)
        self.eps = eps
        self._op = op

    def forward(
        self,
        x_TD: torch.Tensor,
        residual_TD: torch.Tensor | None = None,
        delta_TD: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (normalised sum, sum) of x, residual and delta."""
        return self._op(x_TD, self.weight, self.eps, residual_TD, delta_TD)

    @torch.no_grad()
    def load_part(self, name: str, part: int, whole: torch.Tensor) -> None:
        """Copy the checkpoint's weight; every rank holds all of it."""
        assert (name, part) == ("weight", 0)
        self.weight.copy_(whole)
