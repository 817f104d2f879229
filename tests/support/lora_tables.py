"""A small adapter pool with random weights, scattered over poisoned memory, for tests of LoRA ops.

Shape legend: E elements of the pool, T rows, K input features, O output features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lorikeet.ops.lora.metadata import RowGroup, SiteTable, SliceTable

PAGE_RANKS = 16


@dataclass
class RandomSite:
    """One site with adapters in slots 1..S; whatever is not a weight in use is NaN.

    Attributes:
        weights: (slot, slice) -> (A [R, K], B [O, R], scale), float32 values that the pool's type holds exactly.
    """

    table: SiteTable
    weights: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, float]] = field(
        default_factory=dict
    )

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
) -> RandomSite:
    """A site whose slot s has rank ``ranks[s][j]`` in slice j; 0 leaves the slice alone.

    Args:
        scattered: pages in a random order with gaps between them; else one after the other.
    """
    generator = torch.Generator().manual_seed(seed)
    num_pages = sum(-(-rank // PAGE_RANKS) for parts in ranks.values() for rank in parts)
    stride = PAGE_RANKS * (in_features + max(out_features))
    places = torch.arange(2 * num_pages + 1)
    if scattered:
        places = places[torch.randperm(len(places), generator=generator)]
    free = (places * stride).tolist()
    pool_E = torch.full((len(places) * stride,), float("nan"), dtype=dtype)
    max_pages = max(-(-rank // PAGE_RANKS) for parts in ranks.values() for rank in (*parts, 1))
    offsets = [sum(out_features[:part]) for part in range(len(out_features))]
    slices = tuple(
        SliceTable(
            pool_E,
            in_features=in_features,
            out_features=out,
            offset=offset,
            page_ranks=PAGE_RANKS,
            num_slots=max(ranks, default=0) + 2,
            max_pages=max_pages,
        )
        for out, offset in zip(out_features, offsets, strict=True)
    )
    site = RandomSite(SiteTable(slices, in_start))
    for slot, parts in ranks.items():
        for part, rank in enumerate(parts):
            if rank:
                _write(site, slices[part], slot, part, rank, free, generator)
    return site


def _write(
    site: RandomSite,
    table: SliceTable,
    slot: int,
    part: int,
    rank: int,
    free: list[int],
    generator: torch.Generator,
) -> None:
    dtype, num_inputs, num_outputs = table.pool_E.dtype, table.in_features, table.out_features
    A_RK = (torch.randn(rank, num_inputs, generator=generator) / num_inputs**0.5).to(dtype)
    B_OR = torch.randn(num_outputs, rank, generator=generator).to(dtype)
    scale = float(torch.rand((), generator=generator)) + 0.5
    row = num_inputs + num_outputs
    pages: list[int] = []
    for page in range(-(-rank // PAGE_RANKS)):
        start = free.pop(0)
        pages.append(start)
        for inside in range(min(PAGE_RANKS, rank - page * PAGE_RANKS)):
            at, line = start + inside * row, page * PAGE_RANKS + inside
            table.pool_E[at : at + num_inputs] = A_RK[line]
            table.pool_E[at + num_inputs : at + row] = B_OR[:, line]
    table.set(slot, pages, rank, scale)
    site.weights[slot, part] = (A_RK.float(), B_OR.float(), scale)


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
