"""Rows -> tiles: every row in exactly one tile of its adapter, and no more tiles than were promised."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lorikeet.ops.lora.csgmv.chunks import cut_chunks, most_chunks
from lorikeet.ops.lora.cutting import CutTiles, Pieces, padded
from lorikeet.ops.lora.metadata import NO_ROW
from lorikeet.ops.lora.triton.segments import cut_segments, most_segments

CUTS = [cut_chunks, cut_segments]


def _pieces(slots: list[int], lengths: list[int]) -> Pieces:
    return Pieces(np.array(slots, dtype=np.int64), np.array(lengths, dtype=np.int64))


def _rows(tiles: CutTiles) -> list[tuple[int, list[int]]]:
    """(slot, rows) of each tile; rows lie on the left."""
    found = []
    for slot, row_M in zip(tiles.slot_J.tolist(), tiles.rows_JM.tolist(), strict=True):
        num_rows = sum(row != NO_ROW for row in row_M)
        assert all(row == NO_ROW for row in row_M[num_rows:])
        found.append((slot, row_M[:num_rows]))
    return found


def test_the_example_of_the_documentation():
    pieces = _pieces([2, 1, 0, 2, 0, 2], [3, 2, 1, 1, 1, 1])
    tiles = cut_chunks(pieces, 4)
    assert _rows(tiles) == [(1, [3, 4]), (2, [0, 1, 2, 6]), (2, [8]), (0, [5, 7])]
    assert tiles.num_used == 3
    assert _rows(cut_segments(pieces, 4)) == [
        (1, [3, 4]),
        (2, [0, 1, 2]),
        (2, [6]),
        (2, [8]),
        (0, [5, 7]),
    ]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_one_tile_of_its_slot(cut, seed):
    rng = random.Random(seed)
    slots = [rng.choice([0, 0, 1, 2, 9, 4]) for _ in range(rng.randint(1, 30))]
    lengths = [rng.choice([0, 1, 1, 5, 40]) for _ in slots]
    slot_T = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
    tiles = cut(_pieces(slots, lengths), 16)
    assert tiles.slot_J.dtype == tiles.rows_JM.dtype == np.int32
    found = [row for _, rows in _rows(tiles) for row in rows]
    assert sorted(found) == [*range(len(slot_T))]
    for slot, rows in _rows(tiles):
        assert rows
        assert {slot_T[row] for row in rows} == {slot}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("slots", "lengths"), [([], []), ([0, 4], [0, 0])])
def test_nothing_to_cut(cut, slots, lengths):
    tiles = cut(_pieces(slots, lengths), 16)
    assert tiles.slot_J.shape == (0,)
    assert tiles.rows_JM.shape == (0, 16)


def test_only_chunks_share_tiles_between_sequences():
    pieces = _pieces([3] * 20, [1] * 20)
    assert len(cut_chunks(pieces, 16).slot_J) == 2
    assert len(cut_segments(pieces, 16).slot_J) == 20


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
        pieces = _pieces(slots, [1] * num_rows)
        chunks = len(cut_chunks(pieces, 16).slot_J)
        assert chunks <= most_chunks(num_rows, max_adapters, 16)
        numbers.append(chunks)
        segments = len(cut_segments(pieces, 16).slot_J)
        assert segments <= most_segments(num_rows, max_adapters, 16)
    if max_adapters < num_rows:
        assert max(numbers) == most_chunks(num_rows, max_adapters, 16)


def test_padding_is_empty_tiles_of_the_base():
    tiles = padded(cut_chunks(_pieces([2], [3]), 16), 3)
    assert _rows(tiles) == [(2, [0, 1, 2]), (0, []), (0, [])]
    with pytest.raises(AssertionError, match="3 tiles do not fit 2"):
        padded(tiles, 2)
