"""What a LoRA op needs besides activations: which rows use which adapter, and where the adapter's weights lie.

Shape legend: T rows of the activation, K input features, O output features, R rank, S adapter slots, L slices of all
sites, P pages of a slice, W = P + 1 words, E elements of the pool, J tiles, M rows of a tile.

**Rows.** A batch is made of rows of tokens, each with one adapter slot; slot 0 is the base model. Example: two prompt
chunks of the adapters in slots 2 and 1, then four decode rows::

    slots   = [2, 1, 0, 2, 0, 2]        per row of the batch
    lengths = [3, 2, 1, 1, 1, 1]        tokens of each
    tokens  =  0 1 2 | 3 4 | 5 | 6 | 7 | 8

For matmuls (the ``torch`` backend) the rows of an adapter are a group::

    LoRABatch.tokens = (
        RowGroup(slot=2, start=0, stop=9, index_T=[0, 1, 2, 6, 8]),   # not adjacent: gathered by index
        RowGroup(slot=1, start=3, stop=5, index_T=None),              # adjacent: rows [3, 5) as they lie
    )

For kernels (``triton``, ``csgmv``) they are tiles of at most M rows of one adapter; with M = 4 and grouping by adapter::

    Tiles.slot_J  = [1, 2, 2, 0]
    Tiles.rows_JM = [[3, 4, -1, -1], [0, 1, 2, 6], [8, -1, -1, -1], [5, 7, -1, -1]]
    Tiles.num_used = 3

Tokens 5 and 7 are in no group, and in a tile of slot 0 that matters only to kernels which write every row. With
``logits_rows = [2, 4, 5, 6, 7, 8]`` (the last token of each row) the LM head sees six rows, of which
``LoRABatch.logits`` groups 0, 3 and 5 for slot 2, and 1 for slot 1.

**Weights.** The pool is one flat buffer of E elements. Page p of slot s of a slice begins at ``pages_SP[s, p]``; row r
of it is ``concat(A[r, :], B[:, r])``. With 16 ranks per page an adapter of rank 20 has two pages, the second with 4
ranks in use and 12 of zeros. The page tables of all slices are one :class:`RankPageTable`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

NO_PAGE = -1
NO_ROW = -1


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
class Tiles:
    """Rows of an activation, cut into tiles of one adapter each: every row is in one tile.

    Attributes:
        slot_J: int32, the slot of each tile; 0 for tiles of base rows and for tiles that pad, which are the last.
        rows_JM: int32 row numbers, from the left; the rest is ``NO_ROW``.
        num_rows: rows of the activation (T).
        num_used: tiles that may have an adapter; those behind are known to have slot 0.
    """

    slot_J: torch.Tensor
    rows_JM: torch.Tensor
    num_rows: int
    num_used: int


AdapterRows = tuple[RowGroup, ...] | Tiles


@dataclass(frozen=True, slots=True)
class LoRABatch:
    """Which rows use which adapter. A batch without any adapter has no LoRABatch at all.

    Attributes:
        tokens: the T tokens of the batch, for every site but the LM head.
        logits: the rows whose logits are wanted, for the LM head; ``tokens`` itself if they are the same.
        is_beside: deltas are computed at the same time as the base layers, on a stream of their own, and are kept
            apart from their outputs until whoever reads those adds them.
    """

    tokens: AdapterRows
    logits: AdapterRows
    is_beside: bool = False


@dataclass(frozen=True, slots=True)
class Factors:
    """A and B of consecutive ranks of one slice, as views of the pool; only ranks in use.

    Attributes:
        A_KR: A transposed.
        B_RO: B transposed.
    """

    A_KR: torch.Tensor
    B_RO: torch.Tensor


class RankPageTable:
    """Where the rank pages of every slice lie, for every slot: one tensor, so that one copy describes a new adapter.

    A slot's record of a slice is W words: its pages, padded with ``NO_PAGE``, then rank and scale in one word.

    Attributes:
        words_SLW: int64.
        pages_SLP: int64, element offsets of pages in rank order; a view.
        ranks_SL: int32; 0 where a slot has nothing. A view.
        scales_SL: float32; a view.
    """

    def __init__(
        self, *, num_slots: int, num_slices: int, max_pages: int, device: torch.device
    ) -> None:
        self.max_pages = max_pages
        shape = (num_slots, num_slices, max_pages + 1)
        self.words_SLW = torch.full(shape, NO_PAGE, dtype=torch.int64, device=device)
        self.words_SLW[..., max_pages] = 0
        halves = self.words_SLW.view(torch.int32)
        self.pages_SLP = self.words_SLW[..., :max_pages]
        self.ranks_SL = halves[..., 2 * max_pages]
        self.scales_SL = halves[..., 2 * max_pages + 1].view(torch.float32)

    def put(self, slot: int, records: Mapping[int, tuple[Sequence[int], int, float]]) -> None:
        """Replace what a slot holds: slice -> (pages, rank, scale); slices that are not named have rank 0.

        The copy is queued on the current stream and not waited for.
        """
        last = self.max_pages
        words_LW = np.full(self.words_SLW.shape[1:], NO_PAGE, dtype=np.int64)
        words_LW[:, last] = 0
        ints, floats = words_LW.view(np.int32), words_LW.view(np.float32)
        for index, (pages, rank, scale) in records.items():
            words_LW[index, : len(pages)] = pages
            ints[index, 2 * last], floats[index, 2 * last + 1] = rank, scale
        host_LW = torch.from_numpy(words_LW)
        if self.words_SLW.is_cuda:
            host_LW = host_LW.pin_memory()
        self.words_SLW[slot].copy_(host_LW, non_blocking=True)

    def clear(self, slot: int) -> None:
        """Make a slot rank 0 everywhere, in the order of the current stream."""
        self.pages_SLP[slot].fill_(NO_PAGE)
        self.words_SLW[slot, :, self.max_pages].fill_(0)


class SliceTable:
    """Where the weights of one slice of one site lie, for every slot.

    The tensors are what kernels read. ``factors_of`` is the same as views, for backends that call matmuls: pages that
    follow each other in the pool are one view, so an adapter is usually one pair of factors.

    Args:
        pool_E: the pool.
        offset: first output feature of the slice inside the site's output.
        table: the page tables of all slices.
        index: this slice's number in them.
    """

    def __init__(
        self,
        pool_E: torch.Tensor,
        *,
        in_features: int,
        out_features: int,
        offset: int,
        page_ranks: int,
        table: RankPageTable,
        index: int,
    ) -> None:
        self.pool_E = pool_E
        self.in_features = in_features
        self.out_features = out_features
        self.offset = offset
        self.page_ranks = page_ranks
        self.table = table
        self.index = index
        self.pages_SP = table.pages_SLP[:, index]
        self.ranks_S = table.ranks_SL[:, index]
        self.scales_S = table.scales_SL[:, index]
        self.scales: list[float] = [0.0] * len(self.ranks_S)
        self._pages: dict[int, tuple[Sequence[int], int]] = {}
        # Views are made when a matmul first asks: kernels never do, and hundreds of views take milliseconds.
        self._factors: dict[int, tuple[Factors, ...]] = {}

    @property
    def page_elems(self) -> int:
        return self.page_ranks * (self.in_features + self.out_features)

    def remember(self, slot: int, pages: Sequence[int], rank: int, scale: float) -> None:
        """Point a slot to its pages (element offsets, in rank order), for matmuls; the caller writes the page table."""
        self.forget(slot)
        self._pages[slot] = (pages, rank)
        self.scales[slot] = scale

    def forget(self, slot: int) -> None:
        """Make a slot rank 0, for matmuls."""
        self._pages.pop(slot, None)
        self._factors.pop(slot, None)
        self.scales[slot] = 0.0

    def factors_of(self, slot: int) -> tuple[Factors, ...]:
        """A and B of a slot in rank order; none if it is rank 0."""
        if slot not in self._pages:
            return ()
        if slot not in self._factors:
            self._factors[slot] = tuple(self._views(*self._pages[slot]))
        return self._factors[slot]

    def _views(self, pages: Sequence[int], rank: int) -> list[Factors]:
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
