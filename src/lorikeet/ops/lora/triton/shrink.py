"""h = A x for all slices of a site in one launch: a program takes one tile, one slice and a part of the input features.

Shape legend: T rows, K input features, J tiles, M rows of a tile, N slices of the site, W words of a record, H parts
whose sum is h, C ranks that a slot may have; in kernels also R ranks of one pass, B input features of one iteration.
"""

from __future__ import annotations

import torch
import triton.language as tl

from lorikeet.ops.lora.tiles import DECODE_BLOCK_ROWS, ShrinkTile
from lorikeet.ops.lora.triton.launch import load_rank, rank_rows
from lorikeet.ops.lora.triton.site import SiteLaunch
from lorikeet.ops.triton.early import CACHE_LINE, early, follow, prefetch
from lorikeet.ops.triton.launcher import cdiv, check_rows, kernel, next_power_of_2


def shrink_tiles(
    x_TK: torch.Tensor,
    h_HNTC: torch.Tensor,
    launch: SiteLaunch,
    tile: ShrinkTile,
) -> None:
    """Write h of the rows of all tiles, float32; ranks that an adapter does not have are left as they are.

    Args:
        h_HNTC: if it has one part although several programs share a row's input features, they add to it in no fixed
            order, and it has to hold zeros before.
    """
    num_inputs = launch.in_features
    check_rows(None, x_TK)
    if x_TK.shape[1] != num_inputs:
        raise ValueError(f"x has {x_TK.shape[1]} features, the site {num_inputs}")
    num_tiles, block = launch.rows_JM.shape
    span = min(tile.span, cdiv(num_inputs, tile.block_k) * tile.block_k)
    num_parts = cdiv(num_inputs, span)
    line = CACHE_LINE // launch.pool_E.element_size()
    if h_HNTC.shape[0] not in (1, num_parts):
        raise ValueError(f"h has {h_HNTC.shape[0]} parts, {num_parts} programs share a row")
    _shrink[(launch.num_used, launch.num_slices, num_parts)](
        x_TK,
        launch.pool_E,
        launch.words_LJW,
        launch.rows_JM,
        h_HNTC,
        x_TK.stride(0),
        h_HNTC.stride(0) if h_HNTC.shape[0] > 1 else 0,
        h_HNTC.stride(1),
        num_tiles,
        launch.first_slice,
        K=num_inputs,
        O0=launch.sizes[0],
        O1=launch.sizes[1],
        O2=launch.sizes[2],
        ALIGN=launch.alignment,
        PAGE=launch.page_ranks,
        P=launch.words_LJW.shape[2] - 1,
        C=h_HNTC.shape[3],
        M=block,
        R=launch.rank_block,
        B=tile.block_k,
        SPAN=span,
        ADD=num_parts > 1 and h_HNTC.shape[0] == 1,
        LINES=next_power_of_2(cdiv(span, line)) if block <= DECODE_BLOCK_ROWS else 0,
        **early(x_TK.device),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@kernel("num_tiles", "first_slice")
def _shrink(
    x_ptr,
    pool_ptr,
    words_ptr,
    rows_ptr,
    h_ptr,
    x_stride,
    h_part_stride,
    h_slice_stride,
    num_tiles,
    first_slice,
    K: tl.constexpr,
    O0: tl.constexpr,
    O1: tl.constexpr,
    O2: tl.constexpr,
    ALIGN: tl.constexpr,
    PAGE: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    SPAN: tl.constexpr,
    ADD: tl.constexpr,
    LINES: tl.constexpr,
    EARLY: tl.constexpr,
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    span = tl.program_id(2)
    record_ptr = words_ptr + ((first_slice + part) * num_tiles + tile).to(tl.int64) * (P + 1)
    rank = load_rank(record_ptr, P)
    row_size = K + tl.where(part == 0, O0, tl.where(part == 1, O1, O2))
    row_size = tl.multiple_of(row_size, ALIGN)
    if EARLY and LINES > 0:
        # A is prefetched while the kernel before this one still computes x.
        line_1L = span * SPAN + tl.arange(0, LINES)[None, :] * (SPAN // LINES)
        line_1L = tl.minimum(line_1L, K - 1)
        for first_rank in range(0, rank, R):
            rank_R = first_rank + tl.arange(0, R)
            a_R_ptr = pool_ptr + rank_rows(record_ptr, rank_R, rank_R < rank, row_size, PAGE)
            prefetch(a_R_ptr[:, None] + line_1L)
    follow(EARLY)
    if rank == 0:
        return
    row_M = tl.load(rows_ptr + tile * M + tl.arange(0, M)).to(tl.int64)
    is_row_M1 = (row_M >= 0)[:, None]
    x_M1_ptr = x_ptr + row_M[:, None] * x_stride
    h_part_ptr = h_ptr + span * h_part_stride + part * h_slice_stride
    at_B = tl.arange(0, B)
    for first_rank in range(0, rank, R):
        rank_R = first_rank + tl.arange(0, R)
        is_rank_R = rank_R < rank
        a_R1_ptr = pool_ptr + rank_rows(record_ptr, rank_R, is_rank_R, row_size, PAGE)[:, None]
        h_MR = tl.zeros([M, R], tl.float32)
        for begin in range(0, SPAN, B):
            k_1B = (span * SPAN + begin + at_B)[None, :]
            if K % SPAN == 0:
                x_MB = tl.load(x_M1_ptr + k_1B, mask=is_row_M1, other=0.0)
                a_RB = tl.load(a_R1_ptr + k_1B, mask=is_rank_R[:, None], other=0.0)
            else:
                x_MB = tl.load(x_M1_ptr + k_1B, mask=is_row_M1 & (k_1B < K), other=0.0)
                a_RB = tl.load(a_R1_ptr + k_1B, mask=is_rank_R[:, None] & (k_1B < K), other=0.0)
            h_MR = tl.dot(x_MB, tl.trans(a_RB), h_MR, input_precision="ieee")
        h_MR_ptr = h_part_ptr + row_M[:, None] * C + rank_R[None, :]
        mask_MR = is_row_M1 & is_rank_R[None, :]
        if ADD:
            tl.atomic_add(h_MR_ptr, h_MR, mask=mask_MR, sem="relaxed")
        else:
            tl.store(h_MR_ptr, h_MR, mask=mask_MR)


def gather_tiles(
    ids_T: torch.Tensor, h_1NTC: torch.Tensor, launch: SiteLaunch, in_start: int
) -> None:
    """Write h of an embedding: columns of A, 0 for ids outside of ``[in_start, in_start + K)``."""
    check_rows(h_1NTC.shape[2:3], ids_T)
    num_tiles, block = launch.rows_JM.shape
    _gather[(launch.num_used, launch.num_slices)](
        ids_T,
        launch.pool_E,
        launch.words_LJW,
        launch.rows_JM,
        h_1NTC,
        h_1NTC.stride(1),
        num_tiles,
        launch.first_slice,
        in_start,
        K=launch.in_features,
        O0=launch.sizes[0],
        O1=launch.sizes[1],
        O2=launch.sizes[2],
        PAGE=launch.page_ranks,
        P=launch.words_LJW.shape[2] - 1,
        C=h_1NTC.shape[3],
        M=block,
        R=16,
        num_warps=2,
    )


@kernel("num_tiles", "first_slice", "in_start")
def _gather(
    ids_ptr,
    pool_ptr,
    words_ptr,
    rows_ptr,
    h_ptr,
    h_slice_stride,
    num_tiles,
    first_slice,
    in_start,
    K: tl.constexpr,
    O0: tl.constexpr,
    O1: tl.constexpr,
    O2: tl.constexpr,
    PAGE: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
):
    tile = tl.program_id(0)
    part = tl.program_id(1)
    record_ptr = words_ptr + ((first_slice + part) * num_tiles + tile).to(tl.int64) * (P + 1)
    rank = load_rank(record_ptr, P)
    if rank == 0:
        return
    row_size = K + tl.where(part == 0, O0, tl.where(part == 1, O1, O2))
    row_M1 = tl.load(rows_ptr + tile * M + tl.arange(0, M)).to(tl.int64)[:, None]
    is_row_M1 = row_M1 >= 0
    column_M1 = tl.load(ids_ptr + row_M1, mask=is_row_M1, other=0).to(tl.int64) - in_start
    is_held_M1 = is_row_M1 & (column_M1 >= 0) & (column_M1 < K)
    for first_rank in range(0, rank, R):
        rank_R = first_rank + tl.arange(0, R)
        is_rank_R = rank_R < rank
        a_1R_ptr = pool_ptr + rank_rows(record_ptr, rank_R, is_rank_R, row_size, PAGE)[None, :]
        a_MR = tl.load(a_1R_ptr + column_M1, mask=is_held_M1 & is_rank_R[None, :], other=0.0)
        h_MR_ptr = h_ptr + part * h_slice_stride + row_M1 * C + rank_R[None, :]
        tl.store(h_MR_ptr, a_MR.to(tl.float32), mask=is_row_M1 & is_rank_R[None, :])
