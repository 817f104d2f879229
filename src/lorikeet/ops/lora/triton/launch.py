"""What the LoRA kernels share: how they read a tile's record.

Shape legend: P pages of a slice, R ranks of one pass.
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
    """Factor of B A x, float32."""
    return (tl.load(record_ptr + P) >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def rank_rows(record_ptr, rank_R, mask_R, row_size, PAGE: tl.constexpr):
    """Where the pool's row of each rank begins, int64 element offsets; a row is A's, then B's."""
    page_R = tl.load(record_ptr + rank_R // PAGE, mask=mask_R, other=0)
    # Pages and rows begin at multiples of these, which makes wide loads possible.
    page_R = tl.multiple_of(page_R, PAGE)
    return page_R + (rank_R % PAGE) * row_size
