"""Inputs of the attention bake-off: paged keys and values, the queries over them, and what the result must be.

Shape legend: S sets of K/V (one for each layer that the benchmark pretends to have), N sequences, T queries of all sequences,
L keys of one sequence, P pages of a sequence, Q query heads, K key/value heads, G = Q / K, H head size, R checked rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch

Q, K, H = 32, 8, 128
DTYPE = torch.bfloat16
DEVICE = "cuda"

# The sets together exceed the L2 cache (50 to 60 MB) by far: no call finds its keys there, as in a real model, where the
# weights of a layer pass through the cache between two attentions.
_BYTES_OF_ALL_SETS = 160e6
_MIN_SETS = 4


@dataclass(frozen=True)
class Shape:
    """Queries and keys of each sequence; ``name`` is what the tables say."""

    name: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that one call has to read."""
        return sum(self.keys) * K * H * 2 * DTYPE.itemsize

    @property
    def flops(self) -> int:
        """Multiplications and additions of one causal call."""
        pairs = sum(
            n * (length - n) + n * (n + 1) // 2
            for n, length in zip(self.queries, self.keys, strict=True)
        )
        return 4 * Q * H * pairs


def decode(batch: int, context: int) -> Shape:
    return Shape(f"{batch}x{context}", (1,) * batch, (context,) * batch)


DECODE = [
    decode(1, 192),
    decode(16, 192),
    decode(64, 192),
    decode(256, 192),
    decode(1, 1088),
    decode(16, 1088),
    decode(64, 1024),
    decode(256, 1088),
]
RAGGED = Shape("ragged", (1,) * 7, (1, 15, 16, 17, 333, 1088, 250))
PREFILL = [
    Shape("8x1024", (1024,) * 8, (1024,) * 8),
    Shape("1x8192", (8192,), (8192,)),
    Shape("1024+7168", (1024,), (8192,)),
]
RAGGED_PREFILL = Shape("ragged-prefill", (5, 64, 129, 1), (14, 64, 700, 40))


@dataclass
class Case:
    """The tensors of a shape.

    Attributes:
        q: by set, [T, Q, H].
        k, v: by set, [pages, page_size, K, H]; all sets share the page table, as layers do.
        page_table_NP: int32, pages in random order.
        kv_lens_N, query_starts: int32 on the device; ``*_host`` are the same on the CPU.
    """

    shape: Shape
    page_size: int
    q: list[torch.Tensor] = field(default_factory=list)
    k: list[torch.Tensor] = field(default_factory=list)
    v: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        counts = [-(-length // self.page_size) for length in self.shape.keys]
        self.num_pages = sum(counts) + 8
        order = torch.randperm(self.num_pages, generator=torch.Generator().manual_seed(1)).to(
            torch.int32
        )
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        self.indices_host = order[: starts[-1]].contiguous()
        self.indptr_host = torch.tensor(starts, dtype=torch.int32)
        self.kv_lens_host = torch.tensor(self.shape.keys, dtype=torch.int32)
        self.last_page_len_host = (self.kv_lens_host - 1) % self.page_size + 1
        query_starts = [0]
        for queries in self.shape.queries:
            query_starts.append(query_starts[-1] + queries)
        self.num_queries = query_starts[-1]
        self.query_starts_host = torch.tensor(query_starts, dtype=torch.int32)
        table_NP = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, (begin, end) in enumerate(pairwise(starts)):
            table_NP[row, : end - begin] = self.indices_host[begin:end]
        self.page_table_NP = table_NP.to(DEVICE)
        self.kv_lens_N = self.kv_lens_host.to(DEVICE)
        self.query_starts = self.query_starts_host.to(DEVICE)
        self.indices = self.indices_host.to(DEVICE)


def make_case(
    shape: Shape, page_size: int, *, sets: int | None = None, poison: bool = False
) -> Case:
    """Random queries, keys and values.

    Args:
        sets: None for as many as outgrow the L2 cache.
        poison: fill the places that no sequence owns with NaN instead of finite values.
    """
    case = Case(shape, page_size)
    if sets is None:
        sets = max(_MIN_SETS, int(_BYTES_OF_ALL_SETS / shape.kv_bytes) + 1)
    generator = torch.Generator(DEVICE).manual_seed(2)
    owned = _owned_places(case)
    for _ in range(sets):
        for tensors in (case.k, case.v):
            tensor = torch.empty(case.num_pages, page_size, K, H, dtype=DTYPE, device=DEVICE)
            tensor.normal_(generator=generator)
            if poison:
                tensor.view(-1, K, H)[~owned] = torch.nan
            tensors.append(tensor)
        query = torch.empty(case.num_queries, Q, H, dtype=DTYPE, device=DEVICE)
        case.q.append(query.normal_(generator=generator))
    return case


def _owned_places(case: Case) -> torch.Tensor:
    owned = torch.zeros(case.num_pages * case.page_size, dtype=torch.bool, device=DEVICE)
    for row, length in enumerate(case.shape.keys):
        owned[_places(case, row, length)] = True
    return owned


def _places(case: Case, row: int, length: int) -> torch.Tensor:
    position = torch.arange(length, device=DEVICE)
    page = case.page_table_NP[row, position // case.page_size].long()
    return page * case.page_size + position % case.page_size


def error_of(case: Case, out_TQH: torch.Tensor, at: int = 0, rows_each: int = 48) -> float:
    """Relative root mean square error of set ``at`` against fp32 arithmetic, over some rows of each sequence.

    NaN when the result holds any.
    """
    square_error = square_wanted = 0.0
    for row, (queries, length) in enumerate(zip(case.shape.queries, case.shape.keys, strict=True)):
        places = _places(case, row, length)
        k_LKH = case.k[at].view(-1, K, H)[places].float()
        v_LKH = case.v[at].view(-1, K, H)[places].float()
        picked_R = torch.linspace(0, queries - 1, min(queries, rows_each), device=DEVICE).long()
        first = int(case.query_starts_host[row])
        q_RKGH = case.q[at][first + picked_R].float().unflatten(1, (K, Q // K))
        scores = torch.einsum("rkgh,lkh->rkgl", q_RKGH, k_LKH) * H**-0.5
        last_R = length - queries + picked_R
        hidden = torch.arange(length, device=DEVICE) > last_R[:, None, None, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        wanted = torch.einsum("rkgl,lkh->rkgh", weights, v_LKH).flatten(1, 2)
        got = out_TQH[first + picked_R].float()
        square_error += (got - wanted).square().sum().item()
        square_wanted += wanted.square().sum().item()
    return (square_error / square_wanted) ** 0.5
