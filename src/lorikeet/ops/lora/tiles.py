"""Tile sizes of the LoRA kernels: data. ``scripts/tune_lora.py`` measures them. Lines for ranks up to 16 were measured on an
H100, the others are carried over from their neighbours.

A table is read from the top: the first line whose limits hold is taken. ``block_rows`` are the rows of a tile (M), ``ranks``
the largest rank of the pool, ``tiles`` those of the launch (J, with the ones that pad).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

# Rows of a tile while a step has few rows for each adapter, and the least that a matrix unit takes.
DECODE_BLOCK_ROWS = 16
# Rows of a tile with many rows for each adapter.
PREFILL_BLOCK_ROWS = 64
# More ranks than this are gone over in several passes.
MAX_RANK_BLOCK = 64


@dataclass(frozen=True, slots=True)
class ShrinkTile:
    """Attributes:
    block_k: input features of one iteration.
    span: input features of one program, a multiple of ``block_k``; the sum over the programs is made by atomics or in
        ``expand``.
    """

    block_k: int
    span: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class ExpandTile:
    """Attributes:
    block_n: output features of one program.
    """

    block_n: int
    num_warps: int
    num_stages: int


# Look-ups that are remembered: sizes of batches and of tables that one process meets.
_CACHED = 4096
# No limit.
ANY = 1 << 30

# (block_rows, ranks, tiles) at most.
_SHRINK: tuple[tuple[int, int, int, ShrinkTile], ...] = (
    (16, 16, 4, ShrinkTile(128, 256, 4, 3)),
    (16, 16, 16, ShrinkTile(128, 256, 4, 3)),
    (16, 16, ANY, ShrinkTile(128, 512, 4, 3)),
    (16, 32, 4, ShrinkTile(256, 512, 4, 3)),
    (16, 32, ANY, ShrinkTile(256, 1024, 4, 3)),
    (16, ANY, 4, ShrinkTile(128, 512, 4, 4)),
    (16, ANY, ANY, ShrinkTile(128, 1024, 4, 4)),
    (32, ANY, ANY, ShrinkTile(128, 2048, 4, 3)),
    # Longer than what shrink alone likes best: expand reads every part.
    (64, 16, 32, ShrinkTile(128, 2048, 4, 3)),
    (64, 16, ANY, ShrinkTile(128, ANY, 4, 3)),
    (64, ANY, 32, ShrinkTile(128, 1024, 4, 3)),
    (64, ANY, ANY, ShrinkTile(128, ANY, 4, 3)),
    (ANY, ANY, ANY, ShrinkTile(64, ANY, 8, 3)),
)
_EXPAND: tuple[tuple[int, int, int, ExpandTile], ...] = (
    (16, 16, 4, ExpandTile(64, 4, 1)),
    (16, 16, 16, ExpandTile(128, 4, 1)),
    (16, 16, ANY, ExpandTile(128, 4, 1)),
    (16, 32, 4, ExpandTile(256, 4, 1)),
    (16, 32, ANY, ExpandTile(512, 4, 1)),
    (16, ANY, 4, ExpandTile(128, 4, 1)),
    (16, ANY, ANY, ExpandTile(256, 4, 1)),
    (32, ANY, ANY, ExpandTile(256, 4, 1)),
    (64, 16, 32, ExpandTile(128, 4, 1)),
    (64, 16, ANY, ExpandTile(128, 4, 1)),
    (64, ANY, 32, ExpandTile(128, 4, 1)),
    (64, ANY, ANY, ExpandTile(128, 4, 1)),
    (ANY, ANY, ANY, ExpandTile(128, 8, 1)),
)
# Of the expand that ends in silu-mul; prefill only.
_GATED: tuple[tuple[int, int, int, ExpandTile], ...] = (
    (16, ANY, ANY, ExpandTile(256, 4, 1)),
    (32, ANY, ANY, ExpandTile(128, 4, 1)),
    (64, 16, 32, ExpandTile(128, 8, 1)),
    (64, 16, ANY, ExpandTile(128, 8, 1)),
    (64, ANY, 32, ExpandTile(64, 4, 1)),
    (64, ANY, ANY, ExpandTile(64, 4, 1)),
    (ANY, ANY, ANY, ExpandTile(64, 8, 1)),
)


@functools.lru_cache(_CACHED)
def shrink_tile(block_rows: int, ranks: int, tiles: int) -> ShrinkTile:
    """Sizes for a shrink launch."""
    return next(row[3] for row in _SHRINK if _holds(row[:3], block_rows, ranks, tiles))


@functools.lru_cache(_CACHED)
def expand_tile(block_rows: int, ranks: int, tiles: int) -> ExpandTile:
    """Sizes for an expand launch."""
    return next(row[3] for row in _EXPAND if _holds(row[:3], block_rows, ranks, tiles))


@functools.lru_cache(_CACHED)
def gated_tile(block_rows: int, ranks: int, tiles: int) -> ExpandTile:
    """Sizes for an expand launch that ends in silu-mul."""
    return next(row[3] for row in _GATED if _holds(row[:3], block_rows, ranks, tiles))


def rank_block(max_rank: int) -> int:
    """Ranks of one pass: a power of two from 16 on."""
    return min(MAX_RANK_BLOCK, max(16, 1 << math.ceil(math.log2(max_rank))))


def prefill_block(num_rows: int, num_adapters: int, largest: int) -> int:
    """Rows of a tile for a step that is not a captured decode step.

    Args:
        num_rows: rows that use an adapter.
        largest: what the tile may have at most.
    """
    few = num_rows < num_adapters * 3 * DECODE_BLOCK_ROWS
    return min(DECODE_BLOCK_ROWS if few else PREFILL_BLOCK_ROWS, largest)


def _holds(limits: tuple[int, int, int], *values: int) -> bool:
    return all(value <= limit for value, limit in zip(values, limits, strict=True))
