"""What a LoRA op is told besides activations: which rows use which adapter, and where the adapter's weights lie.

Shape legend: T rows of the activation, K input features, O output features, R rank, S adapter slots, P pages of a
slice, E elements of the pool.

**Rows.** A batch is made of rows of tokens, each with one adapter slot; slot 0 is the base model. Example: two prompt
chunks of the adapters in slots 2 and 1, then four decode rows::

    slots   = [2, 1, 0, 2, 0, 2]        per row of the batch
    lengths = [3, 2, 1, 1, 1, 1]        tokens of each
    tokens  =  0 1 2 | 3 4 | 5 | 6 | 7 | 8

    LoRABatch.tokens = (
        RowGroup(slot=2, start=0, stop=9, index_T=[0, 1, 2, 6, 8]),   # not adjacent: gathered by index
        RowGroup(slot=1, start=3, stop=5, index_T=None),              # adjacent: rows [3, 5) as they lie
    )

Tokens 5 and 7 are in no group: the base model costs nothing. With ``logits_rows = [2, 4, 5, 6, 7, 8]`` (the last token
of each row) the LM head sees six rows, of which ``LoRABatch.logits`` groups 0, 3 and 5 for slot 2, and 1 for slot 1.

**Weights.** The pool is one flat buffer of E elements. Page p of slot s of a slice begins at ``pages_SP[s, p]``; row r
of it is ``concat(A[r, :], B[:, r])``. With 16 ranks per page an adapter of rank 20 has two pages, the second with 4
ranks in use and 12 of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NO_PAGE = -1


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows of an activation that use the same adapter.

    Attributes:
        slot: the adapter's slot, never 0.
        start, stop: the half-open range that holds the rows.
        index_T: int64 row numbers if the rows are not all of the range, ascending.
    """

    slot: int
    start: int
    stop: int
    index_T: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LoRABatch:
    """Groups of rows by adapter. A batch without any adapter has no LoRABatch at all.

    Attributes:
        tokens: groups over the T tokens of the batch, for every site but the LM head.
        logits: groups over the rows whose logits are wanted, for the LM head.
    """

    tokens: tuple[RowGroup, ...]
    logits: tuple[RowGroup, ...]


@dataclass(frozen=True, slots=True)
class Factors:
    """A and B of consecutive ranks of one slice, as views of the pool; only ranks in use.

    Attributes:
        A_KR: A transposed.
        B_RO: B transposed.
    """

    A_KR: torch.Tensor
    B_RO: torch.Tensor


class SliceTable:
    """Where the weights of one slice of one site lie, for every slot.

    The tensors are what kernels read. ``factors[slot]`` is the same as views, for backends that call matmuls: pages
    that follow each other in the pool are one view, so an adapter is usually one pair of factors.

    Args:
        pool_E: the pool.
        offset: first output feature of the slice inside the site's output.
        num_slots, max_pages: size of the page table.
    """

    def __init__(
        self,
        pool_E: torch.Tensor,
        *,
        in_features: int,
        out_features: int,
        offset: int,
        page_ranks: int,
        num_slots: int,
        max_pages: int,
    ) -> None:
        self.pool_E = pool_E
        self.in_features = in_features
        self.out_features = out_features
        self.offset = offset
        self.page_ranks = page_ranks
        device = pool_E.device
        self.pages_SP = torch.full(
            (num_slots, max_pages), NO_PAGE, dtype=torch.int64, device=device
        )
        self.ranks_S = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.scales_S = torch.zeros(num_slots, dtype=torch.float32, device=device)
        self.factors: list[tuple[Factors, ...]] = [()] * num_slots
        self.scales: list[float] = [0.0] * num_slots

    @property
    def page_elems(self) -> int:
        return self.page_ranks * (self.in_features + self.out_features)

    def set(self, slot: int, pages: Sequence[int], rank: int, scale: float) -> None:
        """Point a slot to its pages (element offsets, in rank order)."""
        padding = [NO_PAGE] * (self.pages_SP.shape[1] - len(pages))
        self.pages_SP[slot] = torch.tensor([*pages, *padding], dtype=torch.int64)
        self.ranks_S[slot] = rank
        self.scales_S[slot] = scale
        self.factors[slot] = tuple(self._factors(pages, rank))
        self.scales[slot] = scale

    def clear(self, slot: int) -> None:
        """Make a slot rank 0: its rows are left as the base made them."""
        self.pages_SP[slot] = NO_PAGE
        self.ranks_S[slot] = 0
        self.scales_S[slot] = 0.0
        self.factors[slot] = ()
        self.scales[slot] = 0.0

    def _factors(self, pages: Sequence[int], rank: int) -> list[Factors]:
        row, found, first = self.in_features + self.out_features, [], 0
        while first < len(pages):
            last = first + 1
            while last < len(pages) and pages[last] == pages[last - 1] + self.page_elems:
                last += 1
            num_ranks = min(rank, last * self.page_ranks) - first * self.page_ranks
            view = self.pool_E.narrow(0, pages[first], num_ranks * row).view(num_ranks, row)
            found.append(Factors(view[:, : self.in_features].T, view[:, self.in_features :]))
            first = last
        return found


@dataclass(frozen=True, slots=True)
class SiteTable:
    """The tables of a site's slices that adapters may change, in order of their offset.

    Attributes:
        in_start: first input feature of this rank: the first token id of its part of a divided embedding, else 0.
    """

    slices: tuple[SliceTable, ...]
    in_start: int = 0
