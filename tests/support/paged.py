"""Running a decoder on token lists, with its keys and values in scattered pages of poisoned memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lorikeet.attention.base import AttentionInputs
from lorikeet.attention.sdpa import SDPABackend
from lorikeet.kv.storage import KVStorage
from lorikeet.layers.batch import ForwardBatch
from lorikeet.models.build import build_model
from lorikeet.models.decoder import Decoder
from lorikeet.models.spec import read_model_spec
from lorikeet.parallel.group import SingleRank

PAGE_SIZE = 4


def load_model(path: Path, *, dtype: torch.dtype = torch.float32) -> Decoder:
    """The checkpoint at ``path``, on one rank."""
    return build_model(
        path,
        read_model_spec(path),
        dtype=dtype,
        device="cpu",
        load_format="auto",
        tp=SingleRank(),
        attention=SDPABackend(),
        progress=False,
    )


class PagedRunner:
    """Holds sequences between steps. Pages are handed out in random order; what was never written is NaN."""

    def __init__(
        self,
        model: Decoder,
        *,
        num_pages: int = 128,
        num_kv_heads: int | None = None,
        seed: int = 0,
    ) -> None:
        spec = model.spec
        self.model = model
        self.kv = KVStorage(
            num_layers=spec.num_layers,
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            num_kv_heads=num_kv_heads or spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=model.norm.weight.dtype,
            device="cpu",
        )
        for tensor in (*self.kv.k, *self.kv.v):
            tensor.fill_(torch.nan)
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed))
        self._free: list[int] = order.tolist()
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    def step(
        self,
        parts: Mapping[int, Sequence[int]],
        rows: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Append tokens to sequences (number -> new tokens) in one batch; logits of all new tokens, or of ``rows``."""
        batch = self.batch(parts, rows)
        with torch.inference_mode():
            return self.model(batch)

    def batch(
        self,
        parts: Mapping[int, Sequence[int]],
        rows: Sequence[int] | None = None,
    ) -> ForwardBatch:
        """The batch of :meth:`step`; pages are taken and lengths advance."""
        ids: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        starts, kv_lens = [0], []
        for seq, tokens in parts.items():
            begin = self._lengths.get(seq, 0)
            end = self._lengths[seq] = begin + len(tokens)
            pages = self._pages.setdefault(seq, [])
            while len(pages) * PAGE_SIZE < end:
                pages.append(self._free.pop())
            ids += tokens
            positions += range(begin, end)
            places += [pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(begin, end)]
            starts.append(len(ids))
            kv_lens.append(end)
        tables = [self._pages[seq] for seq in parts]
        width = max(map(len, tables))
        return ForwardBatch(
            input_ids_T=torch.tensor(ids),
            positions_T=torch.tensor(positions),
            attn=AttentionInputs(
                query_starts=starts,
                kv_lens=kv_lens,
                page_table_NP=torch.tensor([t + [0] * (width - len(t)) for t in tables]),
                places_T=torch.tensor(places),
                page_size=PAGE_SIZE,
                num_chunks=len(tables),
                query_starts_N1=torch.tensor(starts),
                kv_lens_N=torch.tensor(kv_lens),
            ),
            kv=self.kv,
            logits_rows_N=torch.tensor(
                range(len(ids)) if rows is None else rows, dtype=torch.int64
            ),
        )
