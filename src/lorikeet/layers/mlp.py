"""The gated MLP: packed gate/up projection, SiLU and product, down projection.

Shape legend: T tokens, D hidden features, I intermediate features of this rank.
"""

from __future__ import annotations

import torch
from torch import nn

from lorikeet.layers.batch import ForwardBatch
from lorikeet.layers.linear import Linear, Part, Placement, column, row
from lorikeet.ops.select import Ops


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        placement: Placement,
        ops: Ops,
        *,
        bias: bool,
    ) -> None:
        super().__init__()
        part = Part(intermediate_size, placement.tp.size)
        self.gate_up_proj = Linear(
            hidden_size, column(placement.tp, part, part), placement, bias=bias
        )
        self.down_proj = Linear(
            intermediate_size, row(placement.tp, hidden_size), placement, bias=bias
        )
        self._silu_mul = ops.silu_mul

    def forward(
        self, x_TD: torch.Tensor, batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the MLP: [T, D] -> [T, D], and a delta that is still to be added to it."""
        hidden_TI = self.gate_up_proj.forward_gated(x_TD, batch, self._silu_mul)
        return self.down_proj.forward_split(hidden_TI, batch)
