"""CUDA graphs of the decode step: by batch size, by length where attention asks for it, without adapters and with.

A graph is a recording of kernel launches with their addresses. So everything that a captured step reads lies in
:class:`DecodeBuffers`, at a fixed place; a batch is padded to the next size that was captured. Graphs of all sizes share
one memory pool: only one runs at a time.

Shape legend: B rows of the largest batch, N rows of a step, P pages of the longest sequence of a graph.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lorikeet.attention.base import AttentionBackend, AttentionInputs
from lorikeet.kv.storage import KVStorage
from lorikeet.layers.batch import ForwardBatch
from lorikeet.lora.batch_builder import LoRAPlan, TileBatchBuilder, TilePlan
from lorikeet.ops.lora.metadata import LoRABatch
from lorikeet.worker.inputs import InputBuilder, StepLayout
from lorikeet.worker.pieces import unowned
from lorikeet.worker.staging import Upload, offsets_of, padded, upload, view_at

logger = logging.getLogger(__name__)

_NUM_FIELDS = 4


def default_sizes(max_rows: int) -> tuple[int, ...]:
    """Batch sizes worth a graph: 1, 2, 4, then multiples of 8, and the largest itself.

    A padded row costs little where weights are what is read: from 8 on padding stays below 8 rows.
    """
    sizes = {size for size in (1, 2, 4, *range(8, max_rows + 1, 8)) if size <= max_rows}
    return tuple(sorted(sizes | {max_rows}))


@dataclass(frozen=True, slots=True, order=True)
class GraphKey:
    """Which graph: rows of the batch, pages of its longest sequence at most, and tiles of adapters (0: none)."""

    rows: int
    pages: int
    tiles: int = 0


class DecodeBuffers:
    """The inputs of decode steps, at fixed places.

    Args:
        max_rows: rows of the largest captured batch (B).
        max_pages: pages of the longest sequence (P).
        lora: makes the adapters' inputs; None if no graph has adapters.
    """

    def __init__(
        self,
        max_rows: int,
        max_pages: int,
        kv: KVStorage,
        inputs: InputBuilder,
        lora: TileBatchBuilder | None = None,
    ) -> None:
        device = kv.k[0].device
        self._kv, self._inputs, self._max_rows = kv, inputs, max_rows
        self._device = device
        self.lora = lora
        lora_bytes = 4 * lora.decode_size(max_rows) if lora else 0
        # Room for the fields, the adapters' tiles, a dozen arrays of 8 bytes for the sampler, and the page tables as they
        # travel.
        self._data = torch.zeros(
            256 * 16 + lora_bytes + max_rows * (4 * _NUM_FIELDS + 8 * 12 + 4 * max_pages),
            dtype=torch.uint8,
            device=device,
        )
        # By width: kernels want the page tables of a batch without gaps.
        self._tables: dict[int, torch.Tensor] = {}
        self._starts_B1 = upload(np.arange(max_rows + 1, dtype=np.int32), device)
        fields = [np.empty(max_rows, dtype=np.int32)] * _NUM_FIELDS
        # The tiles follow the fields; what comes behind them has no fixed place and is not read by graphs.
        offsets, end = offsets_of(fields)
        self._tiles = self._data[end : end + lora_bytes].view(torch.int32)
        self._fields = [
            view_at(self._data, offset, (max_rows,), np.dtype(np.int32)) for offset in offsets
        ]

    @property
    def page_size(self) -> int:
        return self._kv.page_size

    def batch(self, key: GraphKey, kv_lens: list[int]) -> ForwardBatch:
        """The batch of a graph as it lies in the buffers."""
        rows = key.rows
        ids, positions, places, lens = (field[:rows] for field in self._fields)
        return ForwardBatch(
            input_ids_T=ids,
            positions_T=positions,
            attn=AttentionInputs(
                query_starts=list(range(rows + 1)),
                kv_lens=kv_lens,
                page_table_NP=self._table(key.pages)[:rows],
                places_T=places,
                page_size=self.page_size,
                num_chunks=0,
                query_starts_N1=self._starts_B1[: rows + 1],
                kv_lens_N=lens,
                bucket=rows,
            ),
            kv=self._kv,
            logits_rows_N=None,
            sampled_L=self._inputs.lanes.sampled_L,
            lora=self._lora_batch(key),
        )

    def fill(
        self,
        key: GraphKey,
        layout: StepLayout,
        more: list[np.ndarray],
        lora: LoRAPlan | None = None,
    ) -> tuple[ForwardBatch, list[torch.Tensor]]:
        """Bring a decode step to the device: its batch, and ``more`` arrays of N rows.

        Args:
            lora: the plan with ``key.tiles`` tiles.
        """
        num_rows, size = len(layout.lanes_N), self._max_rows
        places = self._inputs.places(layout.lanes_N, layout.positions_T)
        fields = [
            padded(array, size, value, np.int32)
            for array, value in (
                (layout.ids_T, 0),
                (layout.positions_T, 0),
                (places, -1),
                (layout.kv_lens_N, 1),
            )
        ]
        fields += [] if lora is None else lora.arrays
        table = self._inputs.page_table(layout)
        sent = Upload([*fields, *more, table], self._device, into=self._data)
        *_, table_NP = tensors = sent.tensors()
        self._table(key.pages)[:num_rows, : table.shape[1]].copy_(table_NP)
        kv_lens = layout.kv_lens_N.tolist() + [1] * (key.rows - num_rows)
        return self.batch(key, kv_lens), tensors[len(fields) : -1]

    def _lora_batch(self, key: GraphKey) -> LoRABatch | None:
        if self.lora is None or not key.tiles:
            return None
        return self.lora.decode_batch(self._tiles, key.rows, key.tiles)

    def _table(self, pages: int) -> torch.Tensor:
        table = self._tables.get(pages)
        if table is None:
            table = self._tables[pages] = torch.zeros(
                (self._max_rows, pages), dtype=torch.int32, device=self._device
            )
        return table

    def clear(self) -> None:
        """What is captured: rows that pad, and tiles of the base model."""
        ids, positions, places, lens = self._fields
        ids.zero_()
        positions.zero_()
        places.fill_(-1)
        lens.fill_(1)
        self._tiles.zero_()


class GraphRunner:
    """Captured decode steps.

    Args:
        sizes: batch sizes to capture.
        max_kv_len: length of the longest sequence.
    """

    def __init__(
        self,
        forward: Callable[[ForwardBatch], torch.Tensor],
        attention: AttentionBackend,
        buffers: DecodeBuffers,
        sizes: tuple[int, ...],
        max_kv_len: int,
    ) -> None:
        self._forward = forward
        self._attention = attention
        self.buffers = buffers
        self._sizes = tuple(sorted(sizes))
        self._lengths = {size: attention.graph_kv_lens(size, max_kv_len) for size in self._sizes}
        self._graphs: dict[GraphKey, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    @torch.inference_mode()
    def capture(self, pool: Any, *, progress: bool) -> None:
        """Capture every graph, the largest batch first so that smaller ones fit into its memory.

        Args:
            pool: of the memory that graphs share.
        """
        begin, before = time.monotonic(), torch.cuda.mem_get_info()[0]
        self.buffers.clear()
        keys = sorted(self.keys(), reverse=True)
        for key in tqdm(keys, desc="Capturing CUDA graphs", disable=not progress, unit="graph"):
            self._graphs[key] = self._capture(key, pool)
        torch.cuda.synchronize()
        logger.info(
            "Captured CUDA graphs: %d, of batches up to %d, %.1f s, %.2f GB",
            len(keys),
            self._sizes[-1],
            time.monotonic() - begin,
            (before - torch.cuda.mem_get_info()[0]) / 1e9,
        )

    def keys(self) -> set[GraphKey]:
        """Every graph that there is to capture."""
        lora = self.buffers.lora
        return {
            GraphKey(size, self._pages(length), tiles)
            for size in self._sizes
            for length in self._lengths[size]
            for tiles in (0, *(lora.tile_counts(size) if lora else ()))
        }

    def find(self, layout: StepLayout) -> tuple[GraphKey, TilePlan | None] | None:
        """The graph for a step, and what it is told of adapters.

        None if it has to run eagerly: prompts, a batch or a sequence that is too long, adapters of a backend that does
        not run in graphs.
        """
        num_rows = len(layout.lanes_N)
        if not layout.is_decode or num_rows > self._sizes[-1]:
            return None
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        lengths = self._lengths[size]
        index = bisect_left(lengths, int(layout.kv_lens_N.max()))
        if index == len(lengths):
            return None
        key = GraphKey(size, self._pages(lengths[index]))
        if not any(layout.slots):
            return key, None
        lora = self.buffers.lora
        plan = None if lora is None else lora.plan_decode(layout.slots, size)
        return None if plan is None else (replace(key, tiles=plan.num_tiles), plan)

    def run(
        self, layout: StepLayout, more: list[np.ndarray]
    ) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
        """Run a step: its logits (and those of more rows, at the end), valid until the next one; and ``more`` arrays on
        the device. None if it has to run eagerly."""
        found = self.find(layout)
        if found is None:
            return None
        key, lora = found
        batch, tensors = self.buffers.fill(key, layout, more, lora)
        self._attention.prepare(batch.attn)
        graph, logits = self._graphs[key]
        graph.replay()
        return logits, tensors

    def _pages(self, length: int) -> int:
        return -(-length // self.buffers.page_size)

    def _capture(self, key: GraphKey, pool: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        batch = self.buffers.batch(key, [1] * key.rows)
        # Once without capture: kernels are compiled and libraries make their workspaces, which a capture forbids.
        self._attention.prepare(batch.attn)
        self._forward(batch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = self._forward(batch)
        return graph, unowned(logits)
