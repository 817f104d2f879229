"""Rows -> tiles: every row in exactly one tile of its adapter, and no more tiles than were promised."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lorikeet.ops.lora.cutting import CutTiles, RowRuns, cut_tiles, most_tiles, padded
from lorikeet.ops.lora.metadata import NO_ROW


def _runs(slots: list[int], lengths: list[int]) -> RowRuns:
    return RowRuns(np.array(slots, dtype=np.int64), np.array(lengths, dtype=np.int64))


def _rows(tiles: CutTiles) -> list[tuple[int, list[int]]]:
    """(slot, rows) of each tile; rows lie on the left."""
    found = []
    for slot, row_M in zip(tiles.slot_J.tolist(), tiles.rows_JM.tolist(), strict=True):
        num_rows = sum(row != NO_ROW for row in row_M)
        assert all(row == NO_ROW for row in row_M[num_rows:])
        found.append((slot, row_M[:num_rows]))
    return found


def test_the_example_of_the_documentation():
    runs = _runs([2, 1, 0, 2, 0, 2], [3, 2, 1, 1, 1, 1])
    tiles = cut_tiles(runs, 4, by_adapter=True)
    assert _rows(tiles) == [(1, [3, 4]), (2, [0, 1, 2, 6]), (2, [8]), (0, [5, 7])]
    assert tiles.num_used == 3
    assert _rows(cut_tiles(runs, 4, by_adapter=False)) == [
        (1, [3, 4]),
        (2, [0, 1, 2]),
        (2, [6]),
        (2, [8]),
        (0, [5, 7]),
    ]


@pytest.mark.parametrize("by_adapter", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_one_tile_of_its_slot(by_adapter, seed):
    rng = random.Random(seed)
    slots = [rng.choice([0, 0, 1, 2, 9, 4]) for _ in range(rng.randint(1, 30))]
    lengths = [rng.choice([0, 1, 1, 5, 40]) for _ in slots]
    slot_T = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
    tiles = cut_tiles(_runs(slots, lengths), 16, by_adapter=by_adapter)
    assert tiles.slot_J.dtype == tiles.rows_JM.dtype == np.int32
    found = [row for _, rows in _rows(tiles) for row in rows]
    assert sorted(found) == [*range(len(slot_T))]
    for slot, rows in _rows(tiles):
        assert rows
        assert {slot_T[row] for row in rows} == {slot}


@pytest.mark.parametrize("by_adapter", [True, False])
@pytest.mark.parametrize(("slots", "lengths"), [([], []), ([0, 4], [0, 0])])
def test_nothing_to_cut(by_adapter, slots, lengths):
    tiles = cut_tiles(_runs(slots, lengths), 16, by_adapter=by_adapter)
    assert tiles.slot_J.shape == (0,)
    assert tiles.rows_JM.shape == (0, 16)


def test_sequences_share_tiles_only_when_cut_by_adapter():
    runs = _runs([3] * 20, [1] * 20)
    assert len(cut_tiles(runs, 16, by_adapter=True).slot_J) == 2
    assert len(cut_tiles(runs, 16, by_adapter=False).slot_J) == 20


@pytest.mark.parametrize("num_rows", [1, 2, 15, 16, 17, 40, 64])
@pytest.mark.parametrize("max_adapters", [1, 3, 40])
def test_promised_number_of_tiles_suffices(num_rows, max_adapters):
    """And is reached, with full tiles and one row in each of the others."""
    rng = random.Random(num_rows)
    batches = [[rng.randint(0, max_adapters) for _ in range(num_rows)] for _ in range(20)]
    worst = [*range(min(num_rows, max_adapters + 1))]
    batches.append(worst + [1] * (num_rows - len(worst)))
    numbers = []
    for slots in batches:
        runs = _runs(slots, [1] * num_rows)
        for by_adapter in (True, False):
            num_tiles = len(cut_tiles(runs, 16, by_adapter=by_adapter).slot_J)
            assert num_tiles <= most_tiles(num_rows, max_adapters, 16, by_adapter=by_adapter)
            numbers += [num_tiles] * by_adapter
    if max_adapters < num_rows:
        assert max(numbers) == most_tiles(num_rows, max_adapters, 16, by_adapter=True)


def test_padding_is_empty_tiles_of_the_base():
    tiles = padded(cut_tiles(_runs([2], [3]), 16, by_adapter=True), 3)
    assert _rows(tiles) == [(2, [0, 1, 2]), (0, []), (0, [])]
    with pytest.raises(AssertionError, match="3 tiles do not fit 2"):
        padded(tiles, 2)
