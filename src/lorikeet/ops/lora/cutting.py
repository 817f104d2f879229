"""Rows of a step -> tiles, on the host, in a few calls of numpy whatever the number of rows.

Shape legend: N pieces (runs of rows of one sequence), T rows, J tiles, M rows of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorikeet.ops.lora.metadata import NO_ROW

# Behind every slot: rows of the base model come last.
_LAST = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Runs of adjacent rows, in the order of the rows.

    Attributes:
        slots_N: adapter slot of each, 0 for the base model.
        lengths_N: rows of each, 0 too.
    """

    slots_N: np.ndarray
    lengths_N: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class CutTiles:
    """:class:`lorikeet.ops.lora.metadata.Tiles` on the host, int32."""

    slot_J: np.ndarray
    rows_JM: np.ndarray

    @property
    def num_used(self) -> int:
        """Tiles that have an adapter."""
        return int(np.count_nonzero(self.slot_J))


def cut(pieces: Pieces, block: int, *, by_adapter: bool) -> CutTiles:
    """Cut rows into tiles of at most ``block`` rows of one adapter; those of the base model are the last.

    Args:
        by_adapter: rows of one adapter share tiles; else only rows of one piece do, and those of the base model.
    """
    is_cut_N = pieces.lengths_N > 0
    starts_N = np.cumsum(pieces.lengths_N) - pieces.lengths_N
    slots, lengths, starts = (
        array[is_cut_N] for array in (pieces.slots_N, pieces.lengths_N, starts_N)
    )
    if not len(slots):
        return CutTiles(np.zeros(0, np.int32), np.zeros((0, block), np.int32))
    order = np.argsort(np.where(slots == 0, _LAST, slots), kind="stable")
    slots, lengths, starts = slots[order], lengths[order], starts[order]
    begins = np.cumsum(lengths) - lengths  # of each piece, among the rows as they are cut
    numbers_T = np.arange(begins[-1] + lengths[-1])
    rows_T = numbers_T + np.repeat(starts - begins, lengths)

    # A group is what may share tiles.
    is_first = np.ones(len(slots), dtype=bool)
    is_first[1:] = slots[1:] != slots[:-1]
    if not by_adapter:
        is_first |= slots > 0
    first = np.flatnonzero(is_first)
    group_lengths = np.add.reduceat(lengths, first)
    num_tiles = -(-group_lengths // block)
    first_tiles = np.cumsum(num_tiles) - num_tiles
    # Where a group's first row lies among the rows of all tiles, less what it lies at among the rows as they are cut.
    shifts = first_tiles * block - begins[first]
    rows_JM = np.full((int(num_tiles.sum()), block), NO_ROW, dtype=np.int32)
    rows_JM.reshape(-1)[numbers_T + np.repeat(shifts, group_lengths)] = rows_T
    return CutTiles(np.repeat(slots[first], num_tiles).astype(np.int32), rows_JM)


def padded(tiles: CutTiles, num_tiles: int) -> CutTiles:
    """The same tiles and empty ones behind them."""
    missing = num_tiles - len(tiles.slot_J)
    assert missing >= 0, f"{len(tiles.slot_J)} tiles do not fit {num_tiles}"
    if not missing:
        return tiles
    block = tiles.rows_JM.shape[1]
    return CutTiles(
        np.concatenate((tiles.slot_J, np.zeros(missing, np.int32))),
        np.concatenate((tiles.rows_JM, np.full((missing, block), NO_ROW, np.int32))),
    )
