"""Tile sizes of the LoRA kernels: data, by architecture. ``scripts/tune_lora.py`` measures them. Measured on an H100.

A table is read from the top: the first line whose limits hold is taken. ``block_rows`` are the rows of a tile (M), ``ranks``
the largest rank of the pool, ``tiles`` those of the launch (J, with the ones that pad).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import le
from typing import Generic, TypeVar

# Rows of a tile while a step has few rows for each adapter, and the least that a matrix unit takes.
DECODE_BLOCK_ROWS = 16
# Rows of a tile with many rows for each adapter.
PREFILL_BLOCK_ROWS = 64
# More ranks than this are gone over in several passes.
MAX_RANK_BLOCK = 64


@dataclass(frozen=True, slots=True)
class ShrinkTile:
    """Sizes of a launch of the shrink kernel.

    Attributes:
        block_k: input features of one iteration.
        span: input features of one program, a multiple of ``block_k``; the sum over the programs is made by atomics or
            in ``expand``.
    """

    block_k: int
    span: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class ExpandTile:
    """Sizes of a launch of the expand kernel.

    Attributes:
        block_n: output features of one program.
    """

    block_n: int
    num_warps: int
    num_stages: int


Tile = TypeVar("Tile", ShrinkTile, ExpandTile)

# No limit.
ANY = 1 << 30

# (block_rows, ranks, tiles) at most.
_HOPPER_SHRINK: tuple[tuple[int, int, int, ShrinkTile], ...] = (
    (16, 16, 4, ShrinkTile(128, 256, 4, 3)),
    (16, 16, 16, ShrinkTile(128, 256, 4, 3)),
    (16, 16, ANY, ShrinkTile(128, 512, 4, 3)),
    (16, 32, 4, ShrinkTile(128, 256, 4, 3)),
    (16, 32, ANY, ShrinkTile(128, 256, 4, 3)),
    (16, ANY, 4, ShrinkTile(128, 256, 4, 3)),
    (16, ANY, ANY, ShrinkTile(128, 512, 4, 3)),
    # Longer from here on than is best for shrink alone, because expand reads every part.
    (32, ANY, ANY, ShrinkTile(128, 2048, 4, 3)),
    (64, 16, 32, ShrinkTile(128, 2048, 4, 3)),
    (64, 16, ANY, ShrinkTile(128, ANY, 4, 3)),
    (64, ANY, 32, ShrinkTile(128, 1024, 4, 3)),
    (64, ANY, ANY, ShrinkTile(128, ANY, 4, 3)),
    (ANY, ANY, ANY, ShrinkTile(128, ANY, 4, 3)),
)
_HOPPER_EXPAND: tuple[tuple[int, int, int, ExpandTile], ...] = (
    (16, 16, 4, ExpandTile(64, 4, 1)),
    (16, 16, 16, ExpandTile(128, 4, 1)),
    (16, 16, ANY, ExpandTile(128, 4, 1)),
    (16, 32, 4, ExpandTile(128, 4, 1)),
    (16, 32, ANY, ExpandTile(128, 4, 1)),
    (16, ANY, 4, ExpandTile(64, 4, 1)),
    (16, ANY, ANY, ExpandTile(128, 4, 1)),
    (32, ANY, ANY, ExpandTile(256, 4, 1)),
    (64, 16, 32, ExpandTile(128, 4, 1)),
    (64, 16, ANY, ExpandTile(128, 4, 1)),
    (64, ANY, 32, ExpandTile(256, 8, 1)),
    (64, ANY, ANY, ExpandTile(256, 4, 1)),
    (ANY, ANY, ANY, ExpandTile(128, 4, 1)),
)
# For the expand kernel that ends in silu-mul; prefill only.
_HOPPER_GATED: tuple[tuple[int, int, int, ExpandTile], ...] = (
    (16, ANY, ANY, ExpandTile(256, 4, 1)),
    (32, ANY, ANY, ExpandTile(256, 4, 1)),
    (64, 16, 32, ExpandTile(128, 8, 1)),
    (64, 16, ANY, ExpandTile(128, 8, 1)),
    (64, ANY, 32, ExpandTile(256, 8, 1)),
    (64, ANY, ANY, ExpandTile(128, 4, 1)),
    (ANY, ANY, ANY, ExpandTile(128, 8, 1)),
)


class Sizes(Generic[Tile]):
    """A table of sizes; look-ups are cached, since a process asks for the same few in every launch."""

    def __init__(self, lines: Sequence[tuple[int, int, int, Tile]]) -> None:
        self._lines = lines
        self._found: dict[tuple[int, int, int], Tile] = {}

    def __call__(self, block_rows: int, ranks: int, tiles: int) -> Tile:
        """The sizes for a launch."""
        key = (block_rows, ranks, tiles)
        tile = self._found.get(key)
        if tile is None:
            fits = (line[3] for line in self._lines if all(map(le, key, line[:3])))
            tile = self._found[key] = next(fits)
        return tile


@dataclass(frozen=True, slots=True)
class TileTable:
    """Sizes of all kernels on one architecture."""

    shrink: Sizes[ShrinkTile]
    expand: Sizes[ExpandTile]
    gated: Sizes[ExpandTile]


_HOPPER = TileTable(Sizes(_HOPPER_SHRINK), Sizes(_HOPPER_EXPAND), Sizes(_HOPPER_GATED))
TABLES: dict[tuple[int, int], TileTable] = {(9, 0): _HOPPER}
"""Compute capability -> sizes."""


def table_of(capability: tuple[int, int] | None) -> TileTable:
    """The sizes for a device of this compute capability (None: no GPU); Hopper's where nobody has measured."""
    return _HOPPER if capability is None else TABLES.get(capability, _HOPPER)


def rank_block(max_rank: int) -> int:
    """Ranks of one pass: a power of two, at least 16."""
    return min(MAX_RANK_BLOCK, max(16, 1 << math.ceil(math.log2(max_rank))))


def prefill_block(num_rows: int, num_adapters: int, largest: int) -> int:
    """Rows of a tile for a step that is not a captured decode step.

    Args:
        num_rows: rows that use an adapter.
        largest: what the tile may have at most.
    """
    few = num_rows < num_adapters * 3 * DECODE_BLOCK_ROWS
    return min(DECODE_BLOCK_ROWS if few else PREFILL_BLOCK_ROWS, largest)
