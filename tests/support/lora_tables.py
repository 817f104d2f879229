"""A small adapter pool with random weights, scattered over poisoned memory, for tests of LoRA ops.

Shape legend: E elements of the pool, T rows, K input features, O output features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lorikeet.ops.lora.api import LoRABackend
from lorikeet.ops.lora.metadata import RankPageTable, RowGroup, SiteTable, SliceTable

PAGE_RANKS = 8


@dataclass
class RandomSite:
    """One site with adapters in slots 1..S; whatever is not a weight in use is NaN.

    Attributes:
        weights: (slot, slice) -> (A [R, K], B [O, R], scale), float32 values that the pool's type holds exactly.
        pages: (slot, slice) -> where they are.
    """

    table: SiteTable
    weights: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, float]] = field(
        default_factory=dict
    )
    pages: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    @property
    def page_table(self) -> RankPageTable:
        return self.table.slices[0].table

    def records(self, slot: int) -> dict[int, tuple[Sequence[int], int, float]]:
        """What the page table says of a slot."""
        return {
            part: (self.pages[used, part], len(A_RK), scale)
            for (used, part), (A_RK, _, scale) in self.weights.items()
            if used == slot
        }

    def dense_delta(self, x_TK: torch.Tensor, slot: int, part: int) -> torch.Tensor:
        """scale B A x in float64, [T, O]."""
        A_RK, B_OR, scale = self.weights[slot, part]
        return scale * (x_TK.double() @ A_RK.double().T) @ B_OR.double().T


def random_site(
    in_features: int,
    out_features: Sequence[int],
    ranks: Mapping[int, Sequence[int]],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scattered: bool = True,
    in_start: int = 0,
    offsets: Sequence[int] | None = None,
    device: str = "cpu",
) -> RandomSite:
    """A site whose slot s has rank ``ranks[s][j]`` in slice j; 0 leaves the slice alone.

    Args:
        scattered: pages in a random order with gaps between them; else one after the other.
        offsets: first output feature of each slice; by default one behind the other.
    """
    generator = torch.Generator().manual_seed(seed)
    num_pages = sum(-(-rank // PAGE_RANKS) for parts in ranks.values() for rank in parts)
    stride = PAGE_RANKS * (in_features + max(out_features))
    places = torch.arange(2 * num_pages + 1)
    if scattered:
        places = places[torch.randperm(len(places), generator=generator)]
    free = (places * stride).tolist()
    host_E = torch.full((len(places) * stride,), float("nan"), dtype=dtype)
    pool_E = host_E if device == "cpu" else torch.empty_like(host_E, device=device)
    max_pages = max(-(-rank // PAGE_RANKS) for parts in ranks.values() for rank in (*parts, 1))
    if offsets is None:
        offsets = [sum(out_features[:part]) for part in range(len(out_features))]
    table = RankPageTable(
        num_slots=max(ranks, default=0) + 2,
        num_slices=len(out_features),
        max_pages=max_pages,
        device=pool_E.device,
    )
    slices = tuple(
        SliceTable(
            pool_E,
            in_features=in_features,
            out_features=out,
            offset=offset,
            page_ranks=PAGE_RANKS,
            table=table,
            index=index,
        )
        for index, (out, offset) in enumerate(zip(out_features, offsets, strict=True))
    )
    site = RandomSite(SiteTable(slices, in_start))
    for slot, parts in ranks.items():
        for part, rank in enumerate(parts):
            if rank:
                pages = [free.pop(0) for _ in range(-(-rank // PAGE_RANKS))]
                _write(site, host_E, slices[part], (slot, part), rank, pages, generator)
        table.put(slot, site.records(slot))
    if pool_E is not host_E:
        pool_E.copy_(host_E)
    return site


def _write(
    site: RandomSite,
    host_E: torch.Tensor,
    table: SliceTable,
    key: tuple[int, int],
    rank: int,
    pages: list[int],
    generator: torch.Generator,
) -> None:
    dtype, num_inputs, num_outputs = host_E.dtype, table.in_features, table.out_features
    A_RK = (torch.randn(rank, num_inputs, generator=generator) / num_inputs**0.5).to(dtype)
    B_OR = torch.randn(num_outputs, rank, generator=generator).to(dtype)
    scale = float(torch.rand((), generator=generator)) + 0.5
    row = num_inputs + num_outputs
    for page, start in enumerate(pages):
        first = page * PAGE_RANKS
        num_ranks = min(PAGE_RANKS, rank - first)
        lines_RC = host_E[start : start + num_ranks * row].view(num_ranks, row)
        lines_RC[:, :num_inputs] = A_RK[first : first + num_ranks]
        lines_RC[:, num_inputs:] = B_OR.T[first : first + num_ranks]
    table.remember(key[0], pages, rank, scale)
    site.pages[key] = pages
    site.weights[key] = (A_RK.float(), B_OR.float(), scale)


def groups_of(slot_T: Sequence[int], *, gathered: bool) -> tuple[RowGroup, ...]:
    """Groups of single rows' slots: one gathered group per slot, or one group per run of equal slots."""
    groups: list[RowGroup] = []
    if gathered:
        for slot in dict.fromkeys(slot_T):
            rows = [row for row, used in enumerate(slot_T) if used == slot]
            if slot:
                groups.append(RowGroup(slot, rows[0], rows[-1] + 1, torch.tensor(rows)))
        return tuple(groups)
    start = 0
    for row in range(1, len(slot_T) + 1):
        if row == len(slot_T) or slot_T[row] != slot_T[start]:
            if slot_T[start]:
                groups.append(RowGroup(slot_T[start], start, row))
            start = row
    return tuple(groups)


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, ratio: float) -> None:
    """Compare by relative root mean square, NaNs in the same places."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN in other places"
    difference = (actual - expected).nan_to_num().double().square().mean().sqrt()
    size = expected.nan_to_num().double().square().mean().sqrt()
    assert difference <= ratio * size + 1e-12, f"{name}: relative RMS error {difference / size:.2e}"


def add_delta_(
    backend: LoRABackend[Any, Any],
    y_TO: torch.Tensor,
    x_TK: torch.Tensor,
    site: SiteTable,
    rows: Any,
) -> None:
    """Add the whole delta of a linear site to y in place, as a layer does in two calls."""
    backend.expand_(y_TO, backend.shrink(x_TK, site, rows), site, rows)
