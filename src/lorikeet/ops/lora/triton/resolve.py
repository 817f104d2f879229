"""The first LoRA kernel of a step: what every tile uses in every slice, so that later kernels look nothing up.

Shape legend: S adapter slots, L slices of all sites, J tiles, W words of a record (see
:class:`lorikeet.ops.lora.metadata.RankPageTable`); B words of one program.
"""

from __future__ import annotations

import torch
import triton.language as tl

from lorikeet.ops.triton.launcher import cdiv, kernel

_BLOCK = 1024


def resolve_tiles(words_SLW: torch.Tensor, slot_J: torch.Tensor) -> torch.Tensor:
    """The record of each tile's slot in each slice: ``out[l, j] = words[slot[j], l]``, [L, J, W]."""
    _, num_slices, num_words = words_SLW.shape
    num_tiles = len(slot_J)
    out_LJW = words_SLW.new_empty((num_slices, num_tiles, num_words))
    if out_LJW.numel():
        _resolve[(cdiv(out_LJW.numel(), _BLOCK),)](
            words_SLW, slot_J, out_LJW, num_tiles, L=num_slices, W=num_words, B=_BLOCK, num_warps=4
        )
    return out_LJW


@kernel("num_tiles")
def _resolve(
    words_ptr, slots_ptr, out_ptr, num_tiles, L: tl.constexpr, W: tl.constexpr, B: tl.constexpr
):
    at_B = tl.program_id(0) * B + tl.arange(0, B)
    record_B = at_B // W
    tile_B = record_B % num_tiles
    slice_B = record_B // num_tiles
    mask_B = slice_B < L
    slot_B = tl.load(slots_ptr + tile_B, mask=mask_B, other=0).to(tl.int64)
    from_B = (slot_B * L + slice_B) * W + at_B % W
    tl.store(out_ptr + at_B, tl.load(words_ptr + from_B, mask=mask_B), mask=mask_B)
