"""Steps of attention in poisoned, scattered memory, and what they must give, written out query by query."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lorikeet.attention.base import AttentionBackend, AttentionInputs
from lorikeet.kv.storage import KVStorage

LAYER = 1

# (queries, keys) of each sequence.
STEPS = {
    "prompt": [(9, 9)],
    "prompts": [(9, 9), (2, 2), (17, 17)],
    "chunk": [(5, 14)],
    "chunks": [(5, 14), (3, 3), (4, 40)],
    "first-token": [(1, 1)],
    "decode": [(1, 12)],
    "decode-equal": [(1, 12), (1, 12), (1, 12)],
    "decode-ragged": [(1, 12), (1, 1), (1, 33), (1, 8)],
    "decode-far-apart": [(1, 700), (1, 5), (1, 300), (1, 290), (1, 31)],
    "mixed": [(1, 12), (6, 6), (1, 30), (5, 22), (1, 1)],
    "one-of-each": [(7, 7), (1, 20)],
}
DECODE_STEPS = [name for name in STEPS if name.startswith(("first", "decode"))]
WINDOWS = [None, 1, 6, 16, 500]


@dataclass(frozen=True)
class Heads:
    """Query heads, key heads, head size, and the head size of the storage, whose rest is zeros."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    stored_dim: int = 8


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Step:
    """Sequences of given (queries, keys) in poisoned memory: what no sequence owns is NaN, in K and in V.

    Sequences up to the last one with several queries count as chunks, those behind it decode. On a GPU the integers are
    int32, as in the engine.
    """

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        *,
        heads: Heads = Heads(),
        page_size: int = 4,
        device: str = "cpu",
        int_type: torch.dtype = torch.int64,
    ) -> None:
        self.heads, self.page_size = heads, page_size
        self.device, self.dtype, self._int = device, dtype, int_type
        tables = [-(-keys // page_size) for _, keys in shapes]
        num_pages = sum(tables) + 3
        free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1)).tolist()
        self.pages = [[free.pop() for _ in range(count)] for count in tables]
        size = heads.head_dim
        self.kv = KVStorage(
            2, num_pages, page_size, heads.num_kv_heads, heads.stored_dim, dtype, device
        )
        for tensor in (*self.kv.k, *self.kv.v):
            tensor.fill_(torch.nan)
        self.keys = self._drawn(shapes, seed=10)
        self.values = self._drawn(shapes, seed=90)
        starts, stored = [0], []
        for i, (queries, keys) in enumerate(shapes):
            places = torch.tensor(
                [self.pages[i][p // page_size] * page_size + p % page_size for p in range(keys)]
            )
            for storage, owned in ((self.kv.k, self.keys[i]), (self.kv.v, self.values[i])):
                storage[LAYER][places] = 0
                storage[LAYER][places, :, :size] = owned.to(device)
            starts.append(starts[-1] + queries)
            stored.append(places[keys - queries :])
        self.places = torch.cat(stored)
        several = [i for i, (queries, _) in enumerate(shapes) if queries > 1]
        self.inputs = self._inputs(starts, [keys for _, keys in shapes], max([-1, *several]) + 1)
        self.queries = draw(starts[-1], heads.num_heads, size, seed=5).to(device, dtype)
        self.new_keys = self.kv.k[LAYER][self.places][..., :size]
        self.new_values = self.kv.v[LAYER][self.places][..., :size]

    def static(self, bucket: int, width: int) -> AttentionInputs:
        """This decode step as a graph's: padded to ``bucket`` rows, page tables to ``width`` pages."""
        padding = bucket - len(self.pages)
        self.queries = torch.cat((self.queries, self.queries[:1].expand(padding, -1, -1)))
        return self._inputs(
            list(range(bucket + 1)),
            [*self.inputs.kv_lens, *[1] * padding],
            0,
            width=width,
            bucket=bucket,
        )

    def run(
        self, backend: AttentionBackend, window: int | None, inputs: AttentionInputs | None = None
    ) -> torch.Tensor:
        return backend.forward(
            self.queries,
            self.new_keys,
            self.new_values,
            self.kv,
            LAYER,
            inputs or self.inputs,
            window,
        )

    def wanted(self, window: int | None) -> torch.Tensor:
        """[T, Q, H] in float64 on the CPU."""
        heads = self.heads
        group = heads.num_heads // heads.num_kv_heads
        q_TKGH = self.queries.cpu().double().unflatten(1, (heads.num_kv_heads, group))
        rows = []
        for i, kv_len in enumerate(self.inputs.kv_lens):
            start, end = self.inputs.query_starts[i : i + 2]
            for row in range(start, end):
                last = kv_len - (end - row)
                first = 0 if window is None else max(0, last - window + 1)
                k_LKH = self.keys[i][first : last + 1].double()
                v_LKH = self.values[i][first : last + 1].double()
                scores = torch.einsum("kgh,lkh->kgl", q_TKGH[row], k_LKH)
                weights = (scores / math.sqrt(heads.head_dim)).softmax(-1)
                rows.append(torch.einsum("kgl,lkh->kgh", weights, v_LKH).flatten(0, 1))
        return torch.stack(rows)

    def _drawn(self, shapes: list[tuple[int, int]], seed: int) -> list[torch.Tensor]:
        """Keys or values of each sequence, on the CPU, of the storage's type."""
        size = (self.heads.num_kv_heads, self.heads.head_dim)
        return [
            draw(keys, *size, seed=seed + i).to(self.dtype) for i, (_, keys) in enumerate(shapes)
        ]

    def _inputs(
        self,
        starts: list[int],
        kv_lens: list[int],
        num_chunks: int,
        *,
        width: int = 0,
        bucket: int | None = None,
    ) -> AttentionInputs:
        width = width or max(map(len, self.pages))
        padding: list[list[int]] = [[]] * (len(kv_lens) - len(self.pages))
        table = [pages + [0] * (width - len(pages)) for pages in self.pages + padding]
        return AttentionInputs(
            query_starts=starts,
            kv_lens=kv_lens,
            page_table_NP=self._ints(table),
            places_T=self._ints(self.places.tolist()),
            page_size=self.page_size,
            num_chunks=num_chunks,
            query_starts_N1=self._ints(starts),
            kv_lens_N=self._ints(kv_lens),
            bucket=bucket,
        )

    def _ints(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=self._int, device=self.device)
