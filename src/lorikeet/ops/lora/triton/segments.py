"""How ``triton`` cuts rows: every sequence is a segment of its own.

Shape legend: J tiles, M rows of a tile.
"""

from __future__ import annotations

from lorikeet.ops.lora.cutting import CutTiles, Pieces, cut


def cut_segments(pieces: Pieces, block: int) -> CutTiles:
    """Tiles of at most ``block`` rows of one sequence; rows of the base model share theirs."""
    return cut(pieces, block, by_adapter=False)


def most_segments(num_rows: int, max_adapters: int, block: int) -> int:
    """Tiles that a decode step of ``num_rows`` rows can need: one for each sequence."""
    del max_adapters, block
    return num_rows
