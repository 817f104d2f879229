"""RMSNorm in Triton: one program per token holds the whole row.

Shape legend: T tokens, D features; B the block that D is padded to, a power of two.
"""

from __future__ import annotations

import torch
import triton.language as tl

from lorikeet.ops.triton.early import early, follow
from lorikeet.ops.triton.launcher import check_rows, kernel, next_power_of_2

# 16 elements per thread: two loads of 16 bytes in a 16-bit type, and D = 4096 makes 8 warps.
_ELEMENTS_PER_WARP = 512
_MAX_WARPS = 16


def rms_norm_triton(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor | None = None,
    delta_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton form of :class:`lorikeet.ops.norm.RMSNormOp`.

    The sum is taken in float32 and rounded once; the statistics are those of the rounded sum, which is what the
    next layer adds to. Rows may be strided.

    Raises:
        ValueError: an operand has another shape than ``x`` [T, D], or a last dimension with a stride.
    """
    num_tokens, features = x_TD.shape
    check_rows(x_TD.shape, x_TD, residual_TD, delta_TD)
    check_rows(x_TD.shape[1:], weight_D)
    y_TD = x_TD.new_empty(x_TD.shape)
    is_sum = residual_TD is not None or delta_TD is not None
    total_TD = x_TD.new_empty(x_TD.shape) if is_sum else None
    block = next_power_of_2(features)
    _rms_norm[(num_tokens,)](
        x_TD,
        delta_TD,
        residual_TD,
        weight_D,
        y_TD,
        total_TD,
        x_TD.stride(0),
        0 if delta_TD is None else delta_TD.stride(0),
        0 if residual_TD is None else residual_TD.stride(0),
        eps,
        D=features,
        B=block,
        **early(x_TD.device),
        num_warps=min(_MAX_WARPS, max(1, block // _ELEMENTS_PER_WARP)),
    )
    return y_TD, x_TD if total_TD is None else total_TD


@kernel()
def _rms_norm(
    x_ptr,
    delta_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    x_stride,
    delta_stride,
    residual_stride,
    eps,
    D: tl.constexpr,
    B: tl.constexpr,
    EARLY: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at_B = tl.arange(0, B)
    mask_B = at_B < D
    # Asked for before the row is summed, so that it arrives while the row is on its way.
    weight_B = tl.load(weight_ptr + at_B, mask=mask_B, other=0.0).to(tl.float32)
    follow(EARLY)
    x_B = tl.load(x_ptr + token * x_stride + at_B, mask=mask_B, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        x_B += tl.load(delta_ptr + token * delta_stride + at_B, mask=mask_B, other=0.0)
    if residual_ptr is not None:
        x_B += tl.load(residual_ptr + token * residual_stride + at_B, mask=mask_B, other=0.0)
    if total_ptr is not None:
        total_B = x_B.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + token * D + at_B, total_B, mask=mask_B)
        x_B = total_B.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_B * x_B, axis=0) / D + eps)
    # Rounded before the weight is applied, as the torch form does.
    normed_B = (x_B * scale).to(y_ptr.dtype.element_ty).to(tl.float32)
    y_B = (normed_B * weight_B).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + token * D + at_B, y_B, mask=mask_B)
