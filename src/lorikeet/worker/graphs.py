"""CUDA graphs of the decode step, by batch size.

A graph is a recording of kernel launches with their addresses. So everything that a captured step reads lies in
:class:`DecodeBuffers`, at a fixed place; a batch is padded to the next size that was captured. Graphs of all sizes share
one memory pool: only one runs at a time.

Shape legend: B rows of the largest batch, N rows of a step, P pages of the longest possible sequence.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lorikeet.attention.base import AttentionBackend, AttentionInputs
from lorikeet.kv.storage import KVStorage
from lorikeet.layers.batch import ForwardBatch
from lorikeet.worker.inputs import InputBuilder, StepLayout
from lorikeet.worker.staging import Upload, offsets_of, upload, view_at

logger = logging.getLogger(__name__)

_NUM_FIELDS = 4


def default_sizes(max_rows: int) -> tuple[int, ...]:
    """Batch sizes worth a graph: 1, 2, 4, then multiples of 8, and the largest itself.

    A padded row costs little where weights are what is read: from 8 on padding stays below 8 rows.
    """
    sizes = {size for size in (1, 2, 4, *range(8, max_rows + 1, 8)) if size <= max_rows}
    return tuple(sorted(sizes | {max_rows}))


class DecodeBuffers:
    """The inputs of decode steps, at fixed places.

    Args:
        max_rows: rows of the largest captured batch (B).
        max_pages: pages of the longest sequence (P).
    """

    def __init__(self, max_rows: int, max_pages: int, kv: KVStorage, inputs: InputBuilder) -> None:
        device = kv.k[0].device
        self._kv, self._inputs, self._max_rows = kv, inputs, max_rows
        self._device = device
        # Room for the fields, a dozen arrays of 8 bytes for the sampler, and the page tables as they travel.
        self._data = torch.zeros(
            256 * 16 + max_rows * (4 * _NUM_FIELDS + 8 * 12 + 4 * max_pages),
            dtype=torch.uint8,
            device=device,
        )
        self._table_BP = torch.zeros((max_rows, max_pages), dtype=torch.int32, device=device)
        self._starts_B1 = upload(np.arange(max_rows + 1, dtype=np.int32), device)
        fields = [np.empty(max_rows, dtype=np.int32)] * _NUM_FIELDS
        offsets, _ = offsets_of(fields)
        self._fields = [
            view_at(self._data, offset, (max_rows,), np.dtype(np.int32)) for offset in offsets
        ]

    def batch(self, bucket: int, kv_lens: list[int]) -> ForwardBatch:
        """The batch of ``bucket`` rows as it lies in the buffers."""
        ids, positions, places, lens = (field[:bucket] for field in self._fields)
        return ForwardBatch(
            input_ids_T=ids,
            positions_T=positions,
            attn=AttentionInputs(
                query_starts=list(range(bucket + 1)),
                kv_lens=kv_lens,
                page_table_NP=self._table_BP[:bucket],
                slot_mapping_T=places,
                page_size=self._kv.page_size,
                num_chunks=0,
                query_starts_N1=self._starts_B1[: bucket + 1],
                kv_lens_N=lens,
                bucket=bucket,
            ),
            kv=self._kv,
            logits_rows_N=None,
            sampled_L=self._inputs.lanes.sampled_L,
        )

    def fill(
        self, bucket: int, layout: StepLayout, more: list[np.ndarray]
    ) -> tuple[ForwardBatch, list[torch.Tensor]]:
        """Bring a decode step to the device: its batch, and ``more`` arrays of N rows."""
        num_rows, size = len(layout.lanes_N), self._max_rows
        places = self._inputs.places(layout.lanes_N, layout.positions_T)
        fields = [
            _padded(layout.ids_T, size, 0),
            _padded(layout.positions_T, size, 0),
            _padded(places, size, -1),
            _padded(layout.kv_lens_N, size, 1),
        ]
        table = self._inputs.page_table(layout)
        sent = Upload([*fields, *more, table], self._device, into=self._data)
        *_, table_NP = tensors = sent.tensors()
        self._table_BP[:num_rows, : table.shape[1]].copy_(table_NP)
        kv_lens = layout.kv_lens_N.tolist() + [1] * (bucket - num_rows)
        return self.batch(bucket, kv_lens), tensors[_NUM_FIELDS:-1]

    def clear(self) -> None:
        """What is captured: rows that pad."""
        ids, positions, places, lens = self._fields
        ids.zero_()
        positions.zero_()
        places.fill_(-1)
        lens.fill_(1)


def _padded(array: np.ndarray, size: int, value: int) -> np.ndarray:
    padded = np.full(size, value, dtype=np.int32)
    padded[: len(array)] = array
    return padded


class GraphRunner:
    """Captured decode steps.

    Args:
        sizes: batch sizes to capture.
    """

    def __init__(
        self,
        forward: Callable[[ForwardBatch], torch.Tensor],
        attention: AttentionBackend,
        buffers: DecodeBuffers,
        sizes: tuple[int, ...],
    ) -> None:
        self._forward = forward
        self._attention = attention
        self.buffers = buffers
        self._sizes = tuple(sorted(sizes))
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: dict[int, torch.Tensor] = {}

    @torch.inference_mode()
    def capture(self, *, progress: bool) -> None:
        """Capture every size, the largest first so that smaller ones fit into its memory."""
        begin, before = time.monotonic(), torch.cuda.mem_get_info()[0]
        pool = torch.cuda.graph_pool_handle()
        self.buffers.clear()
        sizes = self._sizes[::-1]
        for size in tqdm(sizes, desc="Capturing CUDA graphs", disable=not progress, unit="graph"):
            self._capture(size, pool)
        torch.cuda.synchronize()
        logger.info(
            "Captured CUDA graphs: %d batch sizes up to %d, %.1f s, %.2f GB",
            len(sizes),
            sizes[0],
            time.monotonic() - begin,
            (before - torch.cuda.mem_get_info()[0]) / 1e9,
        )

    def bucket(self, layout: StepLayout) -> int | None:
        """The captured size for a step; None if it has to run eagerly: prompts, adapters, a batch or a sequence that is
        too long."""
        num_rows = len(layout.lanes_N)
        if not layout.is_decode or num_rows > self._sizes[-1] or any(layout.slots):
            return None
        most = self._attention.max_graph_kv_len
        if most is not None and int(layout.kv_lens_N.max()) > most:
            return None
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def replay(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits [bucket, V] of a batch of :meth:`DecodeBuffers.fill`; valid until the next replay."""
        bucket = batch.attn.bucket
        assert bucket is not None
        self._attention.prepare(batch.attn)
        self._graphs[bucket].replay()
        return self._logits[bucket]

    def _capture(self, size: int, pool: Any) -> None:
        batch = self.buffers.batch(size, [1] * size)
        # Once without capture: kernels are compiled and libraries make their workspaces, which a capture forbids.
        self._attention.prepare(batch.attn)
        self._forward(batch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self._logits[size] = self._forward(batch)
        self._graphs[size] = graph
