"""Rows of a step -> tiles, on the host, in a few calls of numpy whatever the number of rows.

``csgmv`` cuts by adapter, so that sequences of one adapter share tiles; ``triton`` cuts by sequence. The kernels are the
same.

Shape legend: N runs (adjacent rows of one sequence), T rows, J tiles, M rows of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorikeet.ops.lora.metadata import NO_ROW

# Sorts after every slot: rows of the base model come last.
_LAST = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True, eq=False)
class RowRuns:
    """Runs of adjacent rows with one slot, in the order of the rows.

    Attributes:
        slots_N: adapter slot of each run, 0 for the base model.
        lengths_N: rows of each run; may be 0.
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


def cut_tiles(runs: RowRuns, block: int, *, by_adapter: bool) -> CutTiles:
    """Cut rows into tiles of at most ``block`` rows of one adapter; tiles of the base model come last.

    Args:
        by_adapter: runs of one adapter share tiles; else each run has tiles of its own, except runs of the base model.
    """
    is_cut_N = runs.lengths_N > 0
    starts_N = np.cumsum(runs.lengths_N) - runs.lengths_N
    slots, lengths, starts = (array[is_cut_N] for array in (runs.slots_N, runs.lengths_N, starts_N))
    if not len(slots):
        return CutTiles(np.zeros(0, np.int32), np.zeros((0, block), np.int32))
    order = np.argsort(np.where(slots == 0, _LAST, slots), kind="stable")
    slots, lengths, starts = slots[order], lengths[order], starts[order]
    begins = np.cumsum(lengths) - lengths  # of each run, among the rows as they are cut
    numbers_T = np.arange(begins[-1] + lengths[-1])
    rows_T = numbers_T + np.repeat(starts - begins, lengths)

    # A group is the runs that may share tiles.
    is_first = np.ones(len(slots), dtype=bool)
    is_first[1:] = slots[1:] != slots[:-1]
    if not by_adapter:
        is_first |= slots > 0
    first = np.flatnonzero(is_first)
    group_lengths = np.add.reduceat(lengths, first)
    num_tiles = -(-group_lengths // block)
    first_tiles = np.cumsum(num_tiles) - num_tiles
    # For each group: its first position in the tiles minus its first position among the rows as they are cut.
    shifts = first_tiles * block - begins[first]
    rows_JM = np.full((int(num_tiles.sum()), block), NO_ROW, dtype=np.int32)
    rows_JM.reshape(-1)[numbers_T + np.repeat(shifts, group_lengths)] = rows_T
    return CutTiles(np.repeat(slots[first], num_tiles).astype(np.int32), rows_JM)


def most_tiles(num_rows: int, max_adapters: int, block: int, *, by_adapter: bool) -> int:
    """The most tiles that ``num_rows`` runs of one row, of at most ``max_adapters`` adapters and the base, can need."""
    if not by_adapter:
        return num_rows
    groups = min(num_rows, max_adapters + 1)
    # One row opens a group's first tile; the others fill tiles up, and every full one opens another.
    return groups + (num_rows - groups) // block


def padded(tiles: CutTiles, num_tiles: int) -> CutTiles:
    """The same tiles, followed by empty ones up to ``num_tiles``."""
    missing = num_tiles - len(tiles.slot_J)
    assert missing >= 0, f"{len(tiles.slot_J)} tiles do not fit {num_tiles}"
    if not missing:
        return tiles
    block = tiles.rows_JM.shape[1]
    return CutTiles(
        np.concatenate((tiles.slot_J, np.zeros(missing, np.int32))),
        np.concatenate((tiles.rows_JM, np.full((missing, block), NO_ROW, np.int32))),
    )
