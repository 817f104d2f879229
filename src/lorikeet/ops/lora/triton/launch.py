"""What the LoRA kernels share: how they read a tile's record, and B h.

Shape legend: M rows of a tile, P pages of a slice, R ranks of one pass, B output features of one program, H parts whose
sum is h.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rank(record_ptr, P: tl.constexpr):
    """Rank of a tile's adapter in a slice; 0 if it has none there."""
    return tl.load(record_ptr + P).to(tl.int32)


@triton.jit
def load_scale(record_ptr, P: tl.constexpr):
    """Factor by which B A x is multiplied, float32."""
    return (tl.load(record_ptr + P) >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def rank_rows(record_ptr, rank_R, mask_R, row_size, PAGE: tl.constexpr):
    """Where the pool's row of each rank begins, int64 element offsets; a row is A's, then B's."""
    page_R = tl.load(record_ptr + rank_R // PAGE, mask=mask_R, other=0)
    # Pages and rows begin at multiples of these, which makes wide loads possible.
    page_R = tl.multiple_of(page_R, PAGE)
    return page_R + (rank_R % PAGE) * row_size


@triton.jit
def delta_of_tile(
    pool_ptr,
    record_ptr,
    rank,
    h_M1_ptr,
    h_part_stride,
    is_row_M1,
    n_1B,
    size,
    row_size,
    K: tl.constexpr,
    PAGE: tl.constexpr,
    P: tl.constexpr,
    H: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """scale B h of one tile in some features of one slice, float32 [M, B]; 0 for rank 0.

    Args:
        rank: of the record's adapter, or 0.
        h_M1_ptr: where h of each row begins in the slice's first part.
        n_1B: features of the slice, of which those from ``size`` on count as 0.
        row_size: K and all features of the slice.
    """
    y_MB = tl.zeros([M, B], tl.float32)
    for first_rank in range(0, rank, R):
        rank_R = first_rank + tl.arange(0, R)
        is_rank_R = rank_R < rank
        b_R1_ptr = pool_ptr + rank_rows(record_ptr, rank_R, is_rank_R, row_size, PAGE)[:, None]
        b_RB = tl.load(b_R1_ptr + K + n_1B, mask=is_rank_R[:, None] & (n_1B < size), other=0.0)
        h_MR = tl.zeros([M, R], tl.float32)
        for number in tl.static_range(H):  # pyright: ignore[reportGeneralTypeIssues]
            h_MR += tl.load(
                h_M1_ptr + number * h_part_stride + rank_R[None, :],
                mask=is_row_M1 & is_rank_R[None, :],
                other=0.0,
            )
        y_MB = tl.dot(h_MR.to(b_RB.dtype), b_RB, y_MB, input_precision="ieee")
    return y_MB * load_scale(record_ptr, P)
