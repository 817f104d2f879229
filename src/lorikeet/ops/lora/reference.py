"""The oracle of LoRA backends: a loop over rows and ranks of the page table. Slow and too simple to be wrong.

Shape legend: T rows, K input features, O output features, R rank, S slots, P pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorikeet.ops.lora.metadata import RowGroup, SiteTable, SliceTable


def read_factors(table: SliceTable, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, K] and B [O, R] of a slot, float32, read through the page table."""
    row = table.in_features + table.out_features
    rows = []
    for rank in range(int(table.ranks_S[slot])):
        page = int(table.pages_SP[slot, rank // table.page_ranks])
        start = page + rank % table.page_ranks * row
        rows.append(table.pool_E[start : start + row])
    both_RC = torch.stack(rows).float() if rows else torch.zeros(0, row)
    return both_RC[:, : table.in_features], both_RC[:, table.in_features :].T


def delta(
    y_TO: torch.Tensor,
    x: torch.Tensor,
    site: SiteTable,
    groups: Sequence[RowGroup],
) -> torch.Tensor:
    """``y_TO`` plus the delta, as a new tensor.

    Args:
        x: activations [T, K], or token ids [T] for an embedding.
    """
    result_TO = y_TO.clone()
    for group in groups:
        rows = range(group.start, group.stop) if group.index_T is None else group.index_T.tolist()
        for row in rows:
            for table in site.slices:
                A_RK, B_OR = read_factors(table, group.slot)
                if x.is_floating_point():
                    h_R = A_RK @ x[row].float()
                else:
                    h_R = _column(A_RK, int(x[row]) - site.in_start)
                out = slice(table.offset, table.offset + table.out_features)
                added_O = float(table.scales_S[group.slot]) * (B_OR @ h_R)
                result_TO[row, out] = (y_TO[row, out].float() + added_O).to(y_TO.dtype)
    return result_TO


def _column(A_RK: torch.Tensor, column: int) -> torch.Tensor:
    if 0 <= column < A_RK.shape[1]:
        return A_RK[:, column]
    return A_RK.new_zeros(A_RK.shape[0])
