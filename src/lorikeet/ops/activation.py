"""The gated SiLU of the MLP.

Shape legend: T tokens, I intermediate features.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional


class SiluMulOp(Protocol):
    """The product of SiLU of the gate and up. Semantics, with an absent ``delta`` taken as 0::

        gate, up = (gate_up + delta).chunk(2, dim=-1)
        return silu(gate) * up

    ``gate_up`` and ``delta`` are [T, 2I], the result is [T, I]. No operand is written to.
    """

    def __call__(
        self, gate_up_T2I: torch.Tensor, delta_T2I: torch.Tensor | None = None
    ) -> torch.Tensor: ...


def silu_mul_torch(
    gate_up_T2I: torch.Tensor, delta_T2I: torch.Tensor | None = None
) -> torch.Tensor:
    """Torch form of :class:`SiluMulOp`."""
    if delta_T2I is not None:
        gate_up_T2I = gate_up_T2I + delta_T2I
    gate_TI, up_TI = gate_up_T2I.chunk(2, dim=-1)
    return functional.silu(gate_TI).mul_(up_TI)
