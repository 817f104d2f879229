"""A site in the form that the kernels take.

Shape legend: T rows, E elements of the pool, L slices of all sites, J tiles, M rows of a tile, W words of a record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lorikeet.ops.lora.metadata import SiteTable, Tiles

# The kernels have arguments for this many regions: slices, and features between them that no adapter changes.
MAX_REGIONS = 3
# Elements of the widest load, in a 16-bit type and with room to spare.
WIDEST_LOAD = 16


@dataclass(frozen=True, slots=True, eq=False)
class SiteLaunch:
    """Operands of the kernels of one site in one step.

    Attributes:
        words_LJW: records of every tile in every slice (``resolve.py``).
        num_used: tiles that may have an adapter, the first ones.
        first_slice, num_slices: those of this site.
        sizes: output features of the slices, 0 for those that a site does not have.
        alignment: every row of the pool begins at a multiple of this many elements.
        rank_block: ranks of one pass.
    """

    pool_E: torch.Tensor
    words_LJW: torch.Tensor
    rows_JM: torch.Tensor
    num_used: int
    first_slice: int
    num_slices: int
    in_features: int
    sizes: tuple[int, int, int]
    alignment: int
    page_ranks: int
    rank_block: int


@dataclass(frozen=True, slots=True)
class Region:
    """Neighbouring output features of a site.

    Attributes:
        part: number of the slice in the site; -1 for features that no adapter changes.
    """

    offset: int
    size: int
    part: int


class SiteShape:
    """What the kernels need to know of a site in every step.

    Raises:
        ValueError: more slices than the kernels have arguments for, or slices that are not neighbours in the page table.
    """

    def __init__(self, site: SiteTable) -> None:
        first = site.slices[0]
        if len(site.slices) > MAX_REGIONS:
            raise ValueError(f"a site has {len(site.slices)} slices, kernels take {MAX_REGIONS}")
        if any(part.index != first.index + number for number, part in enumerate(site.slices)):
            raise ValueError("slices of a site are not neighbours in the page table")
        sizes = tuple(part.out_features for part in site.slices) + (0,) * MAX_REGIONS
        widths = (first.in_features + part.out_features for part in site.slices)
        self._site = site
        self._first = first
        self._sizes = (sizes[0], sizes[1], sizes[2])
        self._alignment = math.gcd(WIDEST_LOAD, *widths)
        self._regions: dict[int, tuple[Region, ...]] = {}

    def launch(self, words_LJW: torch.Tensor, rows: Tiles, rank_block: int) -> SiteLaunch:
        """The operands of a step."""
        first = self._first
        return SiteLaunch(
            pool_E=first.pool_E,
            words_LJW=words_LJW,
            rows_JM=rows.rows_JM,
            num_used=rows.num_used,
            first_slice=first.index,
            num_slices=len(self._site.slices),
            in_features=first.in_features,
            sizes=self._sizes,
            alignment=self._alignment,
            page_ranks=first.page_ranks,
            rank_block=rank_block,
        )

    def regions(self, out_features: int) -> tuple[Region, ...]:
        """:func:`regions_of`, worked out once."""
        found = self._regions.get(out_features)
        if found is None:
            found = self._regions[out_features] = regions_of(self._site, out_features)
        return found


def regions_of(site: SiteTable, out_features: int) -> tuple[Region, ...]:
    """The output features of a site in order, without gaps.

    Raises:
        ValueError: slices do not lie in ``[0, out_features)``, or leave more gaps than kernels have arguments for.
    """
    regions: list[Region] = []
    end = 0
    for number, part in enumerate(site.slices):
        if part.offset > end:
            regions.append(Region(end, part.offset - end, -1))
        regions.append(Region(part.offset, part.out_features, number))
        end = part.offset + part.out_features
    if end < out_features:
        regions.append(Region(end, out_features - end, -1))
    if end > out_features or len(regions) > MAX_REGIONS:
        raise ValueError(f"slices {regions} do not fit an output of {out_features} features")
    return tuple(regions)
