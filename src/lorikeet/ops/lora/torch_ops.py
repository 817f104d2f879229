"""LoRA by matmuls: one pair per adapter in the batch and slice of the site. The CPU path.

Shape legend: T rows of the activation, G rows of one group, K input features, O output features, R rank.

Rows of an adapter that do not lie together are gathered first, so a decode step with many rows of few adapters does
few matmuls. Factors are views of the pool; ranks that pad the last page are never read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorikeet.ops.activation import silu_mul_torch
from lorikeet.ops.lora.metadata import Factors, LoRABatch, RowGroup, SiteTable, SliceTable

# One float32 [G, R] tensor per group, slice and pair of factors, in that order of nesting.
GroupedShrunk = list[torch.Tensor]


class TorchBackend:
    """See :class:`lorikeet.ops.lora.api.LoRABackend`; its rows are groups."""

    def begin(self, batch: LoRABatch) -> None:
        """Do nothing: factors are views that exist already."""

    def shrink(
        self, x_TK: torch.Tensor, site: SiteTable, groups: Sequence[RowGroup]
    ) -> GroupedShrunk:
        h: GroupedShrunk = []
        for group in groups:
            factors = [pair for table in site.slices for pair in table.factors_of(group.slot)]
            if factors:
                x_GK = _rows(x_TK, group).float()
                h.extend(x_GK @ pair.A_KR.float() for pair in factors)
        return h

    def gather(
        self, ids_T: torch.Tensor, site: SiteTable, groups: Sequence[RowGroup]
    ) -> GroupedShrunk:
        h: GroupedShrunk = []
        for group in groups:
            ids_G = _rows(ids_T, group) - site.in_start
            for table in site.slices:
                h.extend(_columns(pair, ids_G) for pair in table.factors_of(group.slot))
        return h

    def expand_(
        self, y_TO: torch.Tensor, h: GroupedShrunk, site: SiteTable, groups: Sequence[RowGroup]
    ) -> None:
        parts = iter(h)
        for group in groups:
            for table in site.slices:
                pairs = table.factors_of(group.slot)
                if pairs:
                    shrunk = [(next(parts), pair) for pair in pairs]
                    _add_(y_TO, shrunk, table, group)

    def expand_into(
        self, out_TO: torch.Tensor, h: GroupedShrunk, site: SiteTable, groups: Sequence[RowGroup]
    ) -> None:
        self.expand_(out_TO.zero_(), h, site, groups)

    def silu_mul(
        self, y_T2I: torch.Tensor, h: GroupedShrunk, site: SiteTable, groups: Sequence[RowGroup]
    ) -> torch.Tensor:
        self.expand_(y_T2I, h, site, groups)
        return silu_mul_torch(y_T2I)


def _rows(x: torch.Tensor, group: RowGroup) -> torch.Tensor:
    if group.index_T is None:
        return x[group.start : group.stop]
    return x.index_select(0, group.index_T)


def _columns(pair: Factors, ids_G: torch.Tensor) -> torch.Tensor:
    """Columns of A, [G, R]; zeros for ids outside of it."""
    num_ids = pair.A_KR.shape[0]
    held_G = (ids_G >= 0) & (ids_G < num_ids)
    columns_GR = pair.A_KR.index_select(0, ids_G.clamp(0, num_ids - 1)).float()
    return torch.where(held_G[:, None], columns_GR, 0.0)


def _add_(
    y_TO: torch.Tensor,
    shrunk: list[tuple[torch.Tensor, Factors]],
    table: SliceTable,
    group: RowGroup,
) -> None:
    """Add one group's delta to one slice of y, rounding once."""
    scale, index_T = table.scales[group.slot], group.index_T
    y_TS = y_TO.narrow(1, table.offset, table.out_features)
    rows_GS = y_TS[group.start : group.stop] if index_T is None else y_TS.index_select(0, index_T)
    sum_GS = rows_GS.float()  # for a float32 y without an index this is a view of y itself
    for h_GR, pair in shrunk:
        sum_GS.addmm_(h_GR, pair.B_RO.float(), alpha=scale)
    if index_T is not None:
        y_TS.index_copy_(0, index_T, sum_GS.to(y_TO.dtype))
    elif sum_GS is not rows_GS:
        rows_GS.copy_(sum_GS)
