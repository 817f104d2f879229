"""The gated SiLU in Triton: a token's features are cut into blocks, one program each.

Shape legend: T tokens, I intermediate features (HALF of the packed ones); B features of one program, a power of two.
"""

from __future__ import annotations

import torch
import triton.language as tl

from lorikeet.ops.triton.early import early, follow
from lorikeet.ops.triton.launcher import cdiv, check_rows, kernel

# A small batch wants many programs, to spread over the device; a large one few, each with more loads on their way.
_FEW_TOKENS = 64
_BLOCK_FEW = 1024
_BLOCK_MANY = 2048
_NUM_WARPS = 4


def silu_mul_triton(
    gate_up_T2I: torch.Tensor, delta_T2I: torch.Tensor | None = None
) -> torch.Tensor:
    """Triton form of :class:`lorikeet.ops.activation.SiluMulOp`: float32 inside, rounded once. Rows may be strided.

    Raises:
        ValueError: ``delta`` has another shape than ``gate_up`` [T, 2I], or a last dimension has a stride.
    """
    num_tokens, features = gate_up_T2I.shape
    check_rows(gate_up_T2I.shape, gate_up_T2I, delta_T2I)
    half = features // 2
    y_TI = gate_up_T2I.new_empty((num_tokens, half))
    block = _BLOCK_FEW if num_tokens <= _FEW_TOKENS else _BLOCK_MANY
    _silu_mul[(num_tokens, cdiv(half, block))](
        gate_up_T2I,
        delta_T2I,
        y_TI,
        gate_up_T2I.stride(0),
        0 if delta_T2I is None else delta_T2I.stride(0),
        HALF=half,
        B=block,
        **early(gate_up_T2I.device),
        num_warps=_NUM_WARPS,
    )
    return y_TI


@kernel()
def _silu_mul(
    gate_up_ptr,
    delta_ptr,
    y_ptr,
    gate_up_stride,
    delta_stride,
    HALF: tl.constexpr,
    B: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    token = tl.program_id(0).to(tl.int64)
    at_B = tl.program_id(1) * B + tl.arange(0, B)
    mask_B = at_B < HALF
    row_ptr = gate_up_ptr + token * gate_up_stride
    gate_B = tl.load(row_ptr + at_B, mask=mask_B, other=0.0).to(tl.float32)
    up_B = tl.load(row_ptr + HALF + at_B, mask=mask_B, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        delta_row_ptr = delta_ptr + token * delta_stride
        gate_B += tl.load(delta_row_ptr + at_B, mask=mask_B, other=0.0)
        up_B += tl.load(delta_row_ptr + HALF + at_B, mask=mask_B, other=0.0)
    y_B = gate_B / (1.0 + tl.exp(-gate_B)) * up_B
    tl.store(y_ptr + token * HALF + at_B, y_B.to(y_ptr.dtype.element_ty), mask=mask_B)
