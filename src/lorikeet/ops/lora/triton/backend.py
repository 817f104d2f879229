"""LoRA by Triton kernels: one launch per step that looks pages up, then two per site.

Shape legend: T rows, K input features, O output features, L slices of all sites, N slices of one site, J tiles,
W words of a record, H parts whose sum is h, C ranks that a slot may have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorikeet.ops.lora import tiles
from lorikeet.ops.lora.metadata import LoRABatch, RankPageTable, SiteTable, Tiles
from lorikeet.ops.lora.tiles import ExpandTile, ShrinkTile
from lorikeet.ops.lora.triton.expand import expand_tiles
from lorikeet.ops.lora.triton.gated import expand_silu_mul
from lorikeet.ops.lora.triton.resolve import resolve_tiles
from lorikeet.ops.lora.triton.shrink import gather_tiles, shrink_tiles
from lorikeet.ops.lora.triton.site import SiteLaunch, SiteShape
from lorikeet.ops.triton.launcher import cdiv


@dataclass(frozen=True, slots=True, eq=False)
class ShrunkTiles:
    """h of a site: float32 [H, N, T, C], of which only the rows of tiles and the ranks in use are written."""

    h_HNTC: torch.Tensor
    launch: SiteLaunch


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """The tiles of one step and the records that they use.

    Attributes:
        zeros_LTC: where programs that share a row add up h; None if each keeps its own part.
    """

    rows: Tiles
    words_LJW: torch.Tensor
    zeros_LTC: torch.Tensor | None


class TritonBackend:
    """See :class:`lorikeet.ops.lora.api.LoRABackend`; its rows are tiles. Serves ``triton`` and ``csgmv``.

    A captured step begins with :meth:`begin`: everything that a replay may find changed is read by kernels.

    Args:
        table: page tables of all sites.
        page_ranks: ranks of a page.
        deterministic: the same inputs give the same bits. Else the order of some sums in float32 is left open, which
            is a little faster.
        shrink_tile, expand_tile: sizes of all launches, for whoever tunes them; None takes them from ``tiles.py``.
    """

    def __init__(
        self,
        table: RankPageTable,
        *,
        page_ranks: int,
        deterministic: bool = False,
        shrink_tile: ShrinkTile | None = None,
        expand_tile: ExpandTile | None = None,
    ) -> None:
        self._shrink_tile, self._expand_tile = shrink_tile, expand_tile
        self._table = table
        self._max_rank = table.max_pages * page_ranks
        device = table.words_SLW.device
        self._sizes = tiles.table_of(
            torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        )
        self._rank_block = tiles.rank_block(self._max_rank)
        self._deterministic = deterministic
        self._steps: list[_Step] = []
        self._shapes: dict[int, SiteShape] = {}

    def begin(self, batch: LoRABatch) -> None:
        assert isinstance(batch.tokens, Tiles)
        assert isinstance(batch.logits, Tiles)
        self._steps = [self._step(batch.tokens, may_add=batch.is_beside)]
        if batch.logits is not batch.tokens:
            self._steps.append(self._step(batch.logits, may_add=False))

    def shrink(self, x_TK: torch.Tensor, site: SiteTable, rows: Tiles) -> ShrunkTiles:
        step = self._find(rows)
        launch = self._launch(step, site)
        tile = self._shrink_tile or self._sizes.shrink(*self._size_of(rows))
        num_parts = cdiv(launch.in_features, tile.span)
        h_HNTC = self._sums(step, launch) if num_parts > 1 else None
        if h_HNTC is None:
            h_HNTC = self._empty(x_TK, num_parts, launch)
        if rows.num_used:
            shrink_tiles(x_TK, h_HNTC, launch, tile)
        return ShrunkTiles(h_HNTC, launch)

    def gather(self, ids_T: torch.Tensor, site: SiteTable, rows: Tiles) -> ShrunkTiles:
        launch = self._launch(self._find(rows), site)
        h_1NTC = self._empty(ids_T, 1, launch)
        if rows.num_used:
            gather_tiles(ids_T, h_1NTC, launch, site.in_start)
        return ShrunkTiles(h_1NTC, launch)

    def expand_(self, y_TO: torch.Tensor, h: ShrunkTiles, site: SiteTable, rows: Tiles) -> None:
        self._expand(y_TO, h, site, rows, add=True)

    def expand_into(
        self, out_TO: torch.Tensor, h: ShrunkTiles, site: SiteTable, rows: Tiles
    ) -> None:
        self._expand(out_TO, h, site, rows, add=False)

    def silu_mul(
        self, y_T2I: torch.Tensor, h: ShrunkTiles, site: SiteTable, rows: Tiles
    ) -> torch.Tensor:
        tile = self._expand_tile or self._sizes.gated(*self._size_of(rows))
        return expand_silu_mul(
            y_T2I, h.h_HNTC, h.launch, self._shape(site).regions(y_T2I.shape[1]), tile
        )

    def _expand(
        self, y_TO: torch.Tensor, h: ShrunkTiles, site: SiteTable, rows: Tiles, *, add: bool
    ) -> None:
        if add and not rows.num_used:
            return
        tile = self._expand_tile or self._sizes.expand(*self._size_of(rows))
        regions = self._shape(site).regions(y_TO.shape[1])
        expand_tiles(y_TO, h.h_HNTC, h.launch, regions, tile, add=add)

    def _size_of(self, rows: Tiles) -> tuple[int, int, int]:
        return rows.rows_JM.shape[1], self._max_rank, rows.slot_J.shape[0]

    def _step(self, rows: Tiles, *, may_add: bool) -> _Step:
        words_LJW = resolve_tiles(self._table.words_SLW, rows.slot_J)
        zeros_LTC = None
        if may_add and not self._deterministic:
            zeros_LTC = torch.zeros(
                (words_LJW.shape[0], rows.num_rows, self._max_rank), device=words_LJW.device
            )
        return _Step(rows, words_LJW, zeros_LTC)

    def _find(self, rows: Tiles) -> _Step:
        for step in self._steps:
            if step.rows is rows:
                return step
        raise AssertionError("these rows are not those of the batch that was begun")

    def _launch(self, step: _Step, site: SiteTable) -> SiteLaunch:
        return self._shape(site).launch(step.words_LJW, step.rows, self._rank_block)

    def _shape(self, site: SiteTable) -> SiteShape:
        shape = self._shapes.get(id(site))
        if shape is None:
            # The shape holds the site, so that the id is not used for another one.
            shape = self._shapes[id(site)] = SiteShape(site)
        return shape

    def _sums(self, step: _Step, launch: SiteLaunch) -> torch.Tensor | None:
        if step.zeros_LTC is None:
            return None
        return step.zeros_LTC[None, launch.first_slice : launch.first_slice + launch.num_slices]

    def _empty(self, x: torch.Tensor, num_parts: int, launch: SiteLaunch) -> torch.Tensor:
        shape = (num_parts, launch.num_slices, x.shape[0], self._max_rank)
        return x.new_empty(shape, dtype=torch.float32)
