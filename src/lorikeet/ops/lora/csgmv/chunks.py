"""How ``csgmv`` cuts rows: by adapter, whatever sequences they belong to.

Shape legend: J tiles, M rows of a tile.
"""

from __future__ import annotations

from lorikeet.ops.lora.cutting import CutTiles, Pieces, cut


def cut_chunks(pieces: Pieces, block: int) -> CutTiles:
    """Tiles of at most ``block`` rows of one adapter."""
    return cut(pieces, block, by_adapter=True)


def most_chunks(num_rows: int, max_adapters: int, block: int) -> int:
    """Tiles that ``num_rows`` rows of at most ``max_adapters`` adapters and the base model can need."""
    groups = min(num_rows, max_adapters + 1)
    # One row opens a group's first tile; the others fill tiles up, and every full one opens another.
    return groups + (num_rows - groups) // block
