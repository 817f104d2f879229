"""y += scale B h, or a fresh delta, for all slices of a site in one launch: a program takes one tile and a block of
output features of one slice.

Shape legend: T rows, O output features of the site, J tiles, M rows of a tile, N slices of the site, W words of a
record, H parts whose sum is h, C ranks that a slot may have; in kernels also R ranks of one pass, B output features of
one program.
"""

from __future__ import annotations

import math

import torch
import triton.language as tl

from lorikeet.ops.lora.tiles import ExpandTile
from lorikeet.ops.lora.triton.launch import delta_of_tile, load_rank
from lorikeet.ops.lora.triton.site import MAX_REGIONS, WIDEST_LOAD, Region, SiteLaunch
from lorikeet.ops.triton.launcher import cdiv, check_rows, kernel

_NOTHING = Region(0, 0, -1)


def expand_tiles(
    y_TO: torch.Tensor,
    h_HNTC: torch.Tensor,
    launch: SiteLaunch,
    regions: tuple[Region, ...],
    tile: ExpandTile,
    *,
    add: bool,
) -> None:
    """Add the delta of the rows of all tiles to ``y``, or write it in place of what is there.

    Args:
        regions: all output features of the site.
        add: False writes every feature of every row that is in a tile, zeros where no adapter changes it.
    """
    check_rows(torch.Size((h_HNTC.shape[2], sum(region.size for region in regions))), y_TO)
    num_tiles, block = launch.rows_JM.shape
    wanted = [region for region in regions if region.part >= 0 or not add]
    num_blocks = sum(cdiv(region.size, tile.block_n) for region in wanted)
    first, second, third = (wanted + [_NOTHING] * MAX_REGIONS)[:MAX_REGIONS]
    _expand[(num_blocks, launch.num_used if add else num_tiles)](
        y_TO,
        launch.pool_E,
        launch.words_LJW,
        launch.rows_JM,
        h_HNTC,
        y_TO.stride(0),
        h_HNTC.stride(0),
        h_HNTC.stride(1),
        num_tiles,
        launch.first_slice,
        K=launch.in_features,
        AT0=first.offset,
        AT1=second.offset,
        AT2=third.offset,
        O0=first.size,
        O1=second.size,
        O2=third.size,
        PART0=first.part,
        PART1=second.part,
        PART2=third.part,
        ALIGN=launch.alignment,
        ALIGN_O=math.gcd(WIDEST_LOAD, *(number for r in wanted for number in (r.offset, r.size))),
        PAGE=launch.page_ranks,
        P=launch.words_LJW.shape[2] - 1,
        C=h_HNTC.shape[3],
        H=h_HNTC.shape[0],
        M=block,
        R=launch.rank_block,
        B=tile.block_n,
        ADD=add,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@kernel("num_tiles", "first_slice")
def _expand(
    y_ptr,
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
    AT0: tl.constexpr,
    AT1: tl.constexpr,
    AT2: tl.constexpr,
    O0: tl.constexpr,
    O1: tl.constexpr,
    O2: tl.constexpr,
    PART0: tl.constexpr,
    PART1: tl.constexpr,
    PART2: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_O: tl.constexpr,
    PAGE: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    M: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    ADD: tl.constexpr,
):
    block = tl.program_id(0)
    tile = tl.program_id(1)
    if not ADD:  # noqa: SIM102  (known to the compiler, the other is not)
        if tl.load(rows_ptr + tile * M) < 0:  # a tile that pads: rows begin on the left
            return
    row_M = tl.load(rows_ptr + tile * M + tl.arange(0, M)).to(tl.int64)

    # Which region the block lies in, and what that is.
    BEFORE1: tl.constexpr = (O0 + B - 1) // B
    BEFORE2: tl.constexpr = BEFORE1 + (O1 + B - 1) // B
    in_0, in_1 = block < BEFORE1, block < BEFORE2
    at = tl.multiple_of(tl.where(in_0, AT0, tl.where(in_1, AT1, AT2)), ALIGN_O)
    size = tl.multiple_of(tl.where(in_0, O0, tl.where(in_1, O1, O2)), ALIGN_O)
    part = tl.where(in_0, PART0, tl.where(in_1, PART1, PART2))
    begin = (block - tl.where(in_0, 0, tl.where(in_1, BEFORE1, BEFORE2))) * B

    record = (first_slice + tl.maximum(part, 0)) * num_tiles + tile
    record_ptr = words_ptr + record.to(tl.int64) * (P + 1)
    rank = tl.where(part < 0, 0, load_rank(record_ptr, P))
    if ADD:  # noqa: SIM102  (known to the compiler, the other is not)
        if rank == 0:
            return
    row_size = tl.multiple_of(K + size, ALIGN)
    n_1B = (begin + tl.arange(0, B))[None, :]
    is_row_M1 = (row_M >= 0)[:, None]
    h_M1_ptr = h_ptr + tl.maximum(part, 0) * h_slice_stride + row_M[:, None] * C
    y_MB = delta_of_tile(
        pool_ptr, record_ptr, rank, h_M1_ptr, h_part_stride, is_row_M1, n_1B, size, row_size,
        K, PAGE, P, H, M, R, B,
    )  # fmt: skip
    y_MB_ptr = y_ptr + row_M[:, None] * y_stride + at + n_1B
    mask_MB = is_row_M1 & (n_1B < size)
    if ADD:
        y_MB += tl.load(y_MB_ptr, mask=mask_MB, other=0.0).to(tl.float32)
    tl.store(y_MB_ptr, y_MB.to(y_ptr.dtype.element_ty), mask=mask_MB)
