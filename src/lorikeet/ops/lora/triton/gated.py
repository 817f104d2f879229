"""silu(gate + delta) * (up + delta) in one launch: the expand of a long prompt's gate and up, without a pass of its own
over their output.

Shape legend: T rows, I intermediate features, J tiles, M rows of a tile, N slices of the site, W words of a record, H
parts whose sum is h, C ranks that a slot may have; in kernels also R ranks of one pass, B features of one program.
"""

from __future__ import annotations

import torch
import triton.language as tl

from lorikeet.ops.lora.tiles import ExpandTile
from lorikeet.ops.lora.triton.launch import delta_of_tile, load_rank
from lorikeet.ops.lora.triton.site import Region, SiteLaunch
from lorikeet.ops.triton.launcher import cdiv, check_rows, kernel


def expand_silu_mul(
    y_T2I: torch.Tensor,
    h_HNTC: torch.Tensor,
    launch: SiteLaunch,
    regions: tuple[Region, ...],
    tile: ExpandTile,
) -> torch.Tensor:
    """The gated SiLU of y plus the delta, [T, I]; every row has to be in a tile.

    Args:
        regions: gate and up, of which adapters may change either.

    Raises:
        ValueError: ``regions`` are not two of one size.
    """
    half = y_T2I.shape[1] // 2
    if [(region.offset, region.size) for region in regions] != [(0, half), (half, half)]:
        raise ValueError(f"{regions} are not a gate and an up")
    check_rows(torch.Size((h_HNTC.shape[2], 2 * half)), y_T2I)
    num_tiles, block = launch.rows_JM.shape
    out_TI = y_T2I.new_empty((y_T2I.shape[0], half))
    _silu_mul[(cdiv(half, tile.block_n), num_tiles)](
        y_T2I,
        out_TI,
        launch.pool_E,
        launch.words_LJW,
        launch.rows_JM,
        h_HNTC,
        y_T2I.stride(0),
        h_HNTC.stride(0),
        h_HNTC.stride(1),
        num_tiles,
        launch.first_slice,
        K=launch.in_features,
        HALF=half,
        GATE=regions[0].part,
        UP=regions[1].part,
        PAGE=launch.page_ranks,
        P=launch.words_LJW.shape[2] - 1,
        C=h_HNTC.shape[3],
        H=h_HNTC.shape[0],
        M=block,
        R=launch.rank_block,
        B=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out_TI


@kernel("num_tiles", "first_slice")
def _silu_mul(
    y_ptr,
    out_ptr,
    pool_ptr,
    words_ptr,
    rows_ptr,
    h_ptr,
    y_stride,
    h_part_stride,
    h_slice_stride,
    num_tiles,
    first_slice,
    K: tl.constexpr,
    HALF: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    PAGE: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    tile = tl.program_id(1)
    row_M1 = tl.load(rows_ptr + tile * M + tl.arange(0, M)).to(tl.int64)[:, None]
    is_row_M1 = row_M1 >= 0
    n_1B = (tl.program_id(0) * B + tl.arange(0, B))[None, :]
    mask_MB = is_row_M1 & (n_1B < HALF)
    y_MB_ptr = y_ptr + row_M1 * y_stride + n_1B
    h_M1_ptr = h_ptr + row_M1 * C
    gate_MB = tl.load(y_MB_ptr, mask=mask_MB, other=0.0).to(tl.float32)
    up_MB = tl.load(y_MB_ptr + HALF, mask=mask_MB, other=0.0).to(tl.float32)
    ROW: tl.constexpr = K + HALF
    if GATE >= 0:
        record_ptr = words_ptr + ((first_slice + GATE) * num_tiles + tile).to(tl.int64) * (P + 1)
        gate_MB += delta_of_tile(
            pool_ptr, record_ptr, load_rank(record_ptr, P), h_M1_ptr + GATE * h_slice_stride,
            h_part_stride, is_row_M1, n_1B, HALF, ROW, K, PAGE, P, H, M, R, B,
        )  # fmt: skip
    if UP >= 0:
        record_ptr = words_ptr + ((first_slice + UP) * num_tiles + tile).to(tl.int64) * (P + 1)
        up_MB += delta_of_tile(
            pool_ptr, record_ptr, load_rank(record_ptr, P), h_M1_ptr + UP * h_slice_stride,
            h_part_stride, is_row_M1, n_1B, HALF, ROW, K, PAGE, P, H, M, R, B,
        )  # fmt: skip
    out_MB = gate_MB / (1.0 + tl.exp(-gate_MB)) * up_MB
    tl.store(out_ptr + row_M1 * HALF + n_1B, out_MB.to(out_ptr.dtype.element_ty), mask=mask_MB)
