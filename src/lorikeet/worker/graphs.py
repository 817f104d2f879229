"""CUDA graphs of forward passes: which are captured, what they read, and which of them runs a step.

A graph is a recording of kernel launches with the addresses of their operands. So everything that it reads stays where
it is (:class:`FixedInputs`), and a step is padded to the next size that was captured: rows that pad store no K/V, and
nobody reads their results. There are two kinds of captured pass:

* of a **decode step**, by number of rows and length of the longest sequence: one graph, with attention in it;
* of a **step with prompts**, by number of tokens: graphs of everything but attention, which is called between them. It
  depends on how many prompts there are and how long each is, which a graph cannot follow; every other kernel sees a
  number of tokens alone. A decode step that has no pass of the first kind is run by one of these.

Both kinds are captured without adapters and with. Only one pass runs at a time, so all share one pool of memory and the
same inputs.

Shape legend: T tokens that a pass is captured for, t <= T those of a step, M rows whose logits are wanted, Q query
heads, H head size.
"""

from __future__ import annotations

import gc
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lorikeet.attention.base import AttentionBackend
from lorikeet.attention.cut import AttentionCall, CutAttention
from lorikeet.layers.batch import ForwardBatch
from lorikeet.lora.batch_builder import TileBatchBuilder, TilePlan
from lorikeet.worker.inputs import FixedInputs, InputBuilder, StepLayout
from lorikeet.worker.staging import ALIGNMENT, int_type

logger = logging.getLogger(__name__)

_PROMPT_SIZES = (32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
_PROMPT_STEP = 256  # between larger sizes
# Rows of a step with prompts whose logits may be wanted. The LM head reads its weights for one row as for that many.
_MAX_WANTED = 256
# Arrays of a step at most, and numbers of 8 bytes among them that the sampler adds for each sequence.
_MAX_ARRAYS, _SAMPLER_NUMBERS = 32, 12


def default_decode_sizes(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows worth a graph: 1, 2, 4, then multiples of 8, and the largest itself.

    A padded row costs little where weights are what is read: from 8 on padding stays below 8 rows.
    """
    sizes = {size for size in (1, 2, 4, *range(8, max_rows + 1, 8)) if size <= max_rows}
    return tuple(sorted(sizes | {max_rows}))


def default_prompt_sizes(max_tokens: int) -> tuple[int, ...]:
    """Numbers of tokens worth graphs: dense enough that padding stays a small part, and the largest itself."""
    sizes = {*_PROMPT_SIZES, *range(_PROMPT_SIZES[-1], max_tokens, _PROMPT_STEP), max_tokens}
    return tuple(sorted(size for size in sizes if size <= max_tokens))


@dataclass(frozen=True, slots=True, order=True)
class GraphKey:
    """Which captured pass.

    Attributes:
        num_tokens: rows that it computes (T).
        num_pages: of a decode step, pages of its longest sequence at most. 0: it has prompts, and attention is called
            between its graphs.
        num_tiles: tiles of adapters. 0: no row has one.
    """

    num_tokens: int
    num_pages: int = 0
    num_tiles: int = 0

    @property
    def is_decode(self) -> bool:
        return self.num_pages > 0

    @property
    def num_wanted(self) -> int | None:
        """Rows whose logits are computed; None: all, of a decode step."""
        return None if self.is_decode else min(self.num_tokens, _MAX_WANTED)


class CapturedPass:
    """A forward pass as CUDA graphs, captured on the current stream.

    Its tensors share their memory with other graphs, which write there as soon as they were read: so the graphs of a pass
    are replayed in order, and all of them.

    Args:
        pool: of the memory that graphs share.
        left_out: the attention that ``forward`` calls, if that is to happen between graphs.

    Attributes:
        result: what ``forward`` returned; valid from one replay to the next of any pass.
    """

    def __init__(
        self,
        forward: Callable[[], torch.Tensor],
        pool: Any,
        left_out: CutAttention | None = None,
    ) -> None:
        self._pool = pool
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._calls: list[tuple[AttentionCall, torch.Tensor]] = []
        with nullcontext() if left_out is None else left_out.cut(self._cut):
            self._begin()
            try:
                result = forward()
            finally:
                # Also after an error: a stream that is left capturing can do nothing else.
                self._graphs[-1].capture_end()
        self.result = unowned(result)

    def replay(self, batch: ForwardBatch, attention: AttentionBackend) -> None:
        """Queue the pass for a step whose inputs are there; what lies in rows beyond its t does not matter.

        Args:
            attention: computes what was left out, for t rows.
        """
        attn, num_tokens = batch.attn, batch.attn.query_starts[-1]
        for graph, (call, out_TQH) in zip(self._graphs, self._calls, strict=False):
            graph.replay()
            q, k, v = call.q_TQH[:num_tokens], call.k_TKH[:num_tokens], call.v_TKH[:num_tokens]
            attended = attention.forward(q, k, v, batch.kv, call.layer, attn, call.window)
            out_TQH[:num_tokens].copy_(attended)
        self._graphs[-1].replay()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        graph.capture_begin(self._pool)

    def _cut(self, call: AttentionCall) -> torch.Tensor:
        """End a graph where attention is called, and begin the next with its result."""
        # Of the graphs' memory, like everything that is made during a capture.
        out_TQH = torch.empty_like(call.q_TQH, memory_format=torch.contiguous_format)
        self._graphs[-1].capture_end()
        kept = replace(
            call,
            q_TQH=unowned(call.q_TQH),
            k_TKH=unowned(call.k_TKH),
            v_TKH=unowned(call.v_TKH),
        )
        self._calls.append((kept, unowned(out_TQH)))
        self._begin()
        return out_TQH


class GraphRunner:
    """Captures passes and runs steps by them.

    Args:
        forward: the network, with ``attention`` inside.
        lora: plans steps with adapters; None if those run eagerly.
        decode_sizes: numbers of rows to capture decode steps for.
        prompt_sizes: numbers of tokens to capture steps with prompts for.
        max_kv_len: length of the longest sequence.
    """

    def __init__(
        self,
        forward: Callable[[ForwardBatch], torch.Tensor],
        attention: CutAttention,
        inputs: InputBuilder,
        lora: TileBatchBuilder | None,
        *,
        decode_sizes: Sequence[int],
        prompt_sizes: Sequence[int],
        max_kv_len: int,
    ) -> None:
        self._forward = forward
        self._attention = attention
        self._inputs = inputs
        self._lora = lora
        self._decode_sizes = sorted(decode_sizes)
        self._prompt_sizes = sorted(prompt_sizes)
        self._lengths = {
            size: attention.graph_kv_lens(size, max_kv_len) for size in self._decode_sizes
        }
        self._captured: dict[GraphKey, tuple[CapturedPass, FixedInputs]] = {}
        device = inputs.lanes.sampled_L.device
        self._int = int_type(device)
        self._data = torch.zeros(self._most_bytes(), dtype=torch.uint8, device=device)
        # By width: kernels want the page tables of a batch without gaps.
        self._tables: dict[int, torch.Tensor] = {}
        for num_pages in {key.num_pages for key in self.keys() if key.is_decode}:
            zeros = np.zeros((self._decode_sizes[-1], num_pages), dtype=self._int)
            self._tables[num_pages] = torch.from_numpy(zeros).to(device)

    @torch.inference_mode()
    def capture(self, *, progress: bool) -> None:
        """Capture every pass. Those of the most tokens come first: smaller ones fit into their memory."""
        gc.collect()
        torch.cuda.empty_cache()
        begin, before = time.monotonic(), torch.cuda.mem_get_info()[0]
        keys, pool = self.keys(), torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for key in tqdm(keys, desc="Capturing CUDA graphs", disable=not progress, unit="pass"):
                self._captured[key] = self._capture(key, pool)
        torch.cuda.synchronize()
        logger.info(
            "Captured CUDA graphs: %d decode steps of up to %d rows, %d steps with prompts of up to %d tokens, %.1f s, "
            "%.2f GB",
            sum(key.is_decode for key in keys),
            max(self._decode_sizes, default=0),
            sum(not key.is_decode for key in keys),
            max(self._prompt_sizes, default=0),
            time.monotonic() - begin,
            (before - torch.cuda.mem_get_info()[0]) / 1e9,
        )

    def keys(self) -> list[GraphKey]:
        """Every pass that there is to capture, in that order."""
        prompts = {key for size in self._prompt_sizes for key in self._with_tiles(GraphKey(size))}
        decodes = {
            key
            for size, lengths in self._lengths.items()
            for length in lengths
            for key in self._with_tiles(GraphKey(size, self._num_pages(length)))
        }
        return [*sorted(prompts, reverse=True), *sorted(decodes, reverse=True)]

    def find(self, layout: StepLayout) -> tuple[GraphKey, TilePlan | None] | None:
        """The captured pass for a step, and its tiles of adapters.

        None if it has to run eagerly: more tokens, rows, keys, wanted logits or tiles than were captured, or adapters of
        a backend that does not run in graphs.
        """
        key = self._decode_key(layout) or self._prompt_key(layout)
        if key is None:
            return None
        if not any(layout.slots):
            return key, None
        plan = self._plan(key, layout)
        return None if plan is None else (replace(key, num_tiles=plan.num_tiles), plan)

    def run(
        self, layout: StepLayout, more: list[np.ndarray]
    ) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
        """Run a step: logits of the rows that are wanted (and of others behind them), valid until the next step; and
        ``more`` arrays on the device. None if it has to run eagerly, and nothing was done."""
        found = self.find(layout)
        if found is None:
            return None
        key, plan = found
        captured, fixed = self._captured[key]
        batch, tensors = self._inputs.stage(layout, more, fixed, plan)
        self._attention.prepare(batch.attn)
        captured.replay(batch, self._attention)
        return captured.result, tensors

    def fixed_inputs(self, key: GraphKey) -> FixedInputs:
        """The inputs of a pass. All passes share them, but for page tables of different widths."""
        return FixedInputs(
            data=self._data,
            num_tokens=key.num_tokens,
            num_wanted=key.num_wanted,
            table_NP=self._tables[key.num_pages][: key.num_tokens] if key.is_decode else None,
        )

    def padding(self, key: GraphKey) -> tuple[StepLayout, TilePlan | None]:
        """A step of nothing but rows that pad, and its tiles: what a pass is captured with."""
        layout = self._inputs.padding(key.num_tokens, is_decode=key.is_decode)
        return layout, self._plan(key, layout) if key.num_tiles else None

    def _capture(self, key: GraphKey, pool: Any) -> tuple[CapturedPass, FixedInputs]:
        layout, plan = self.padding(key)
        fixed = self.fixed_inputs(key)
        batch, _ = self._inputs.stage(layout, [], fixed, plan)
        # Once without capture: kernels are compiled and libraries make their workspaces, which a capture forbids.
        self._attention.prepare(batch.attn)
        self._forward(batch)
        torch.cuda.synchronize()
        # What the allocator keeps from that is no use to a graph, and a capture cannot take it back.
        torch.cuda.empty_cache()
        left_out = None if key.is_decode else self._attention
        return CapturedPass(lambda: self._forward(batch), pool, left_out), fixed

    def _with_tiles(self, key: GraphKey) -> list[GraphKey]:
        """The pass without adapters, and those with them."""
        if self._lora is None:
            return [key]
        if key.num_wanted is None:
            counts = self._lora.tile_counts(key.num_tokens)
        else:
            counts = (self._lora.prompt_shapes(key.num_tokens, key.num_wanted)[0][0],)
        return [key, *(replace(key, num_tiles=count) for count in counts)]

    def _decode_key(self, layout: StepLayout) -> GraphKey | None:
        size = _fitting(self._decode_sizes, len(layout.lanes_N)) if layout.is_decode else None
        if size is None:
            return None
        length = _fitting(self._lengths[size], int(layout.kv_lens_N.max()))
        return None if length is None else GraphKey(size, self._num_pages(length))

    def _prompt_key(self, layout: StepLayout) -> GraphKey | None:
        size = _fitting(self._prompt_sizes, len(layout.ids_T))
        if size is None or len(layout.logits_rows) > min(size, _MAX_WANTED):
            return None
        return GraphKey(size)

    def _plan(self, key: GraphKey, layout: StepLayout) -> TilePlan | None:
        """Tiles of a step, as many as the pass has; None if there is none with that many."""
        if self._lora is None:
            return None
        if key.num_wanted is None:
            return self._lora.plan_decode(layout.slots, key.num_tokens, key.num_tiles or None)
        lengths = layout.lengths_N.tolist()
        return self._lora.plan_prompt(
            layout.slots, lengths, layout.logits_rows, key.num_tokens, key.num_wanted
        )

    def _num_pages(self, length: int) -> int:
        return -(-length // self._inputs.page_size)

    def _most_bytes(self) -> int:
        """Bytes of the arrays of a step, at most."""
        num_tokens = max(*self._decode_sizes, *self._prompt_sizes)
        num_lanes, num_pages = self._inputs.lanes.pages_LP.shape
        num_sequences = min(num_lanes, num_tokens)
        plans = [self.padding(key)[1] for key in self.keys() if key.num_tiles]
        tiles = max((sum(a.nbytes for a in plan.arrays) for plan in plans if plan), default=0)
        # Page tables, and seven arrays of a number for each token or sequence, of which query starts have one more.
        numbers = num_sequences * num_pages + 8 * num_tokens
        sampling = _SAMPLER_NUMBERS * 8 * num_sequences
        return _MAX_ARRAYS * ALIGNMENT + tiles + numbers * np.dtype(self._int).itemsize + sampling


def _fitting(sizes: Sequence[int], number: int) -> int | None:
    """The least of ``sizes``, which ascend, that is not below a number."""
    index = bisect_left(sizes, number)
    return sizes[index] if index < len(sizes) else None


class _Memory:
    """Bytes of the device, for ``torch.as_tensor``: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def unowned(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, which may be given to others meanwhile: for tensors of a graph, written anew by each replay.

    Graphs would need the memory of all their tensors that anybody holds, each of its own.
    """
    if not tensor.is_cuda:
        return tensor
    span = 1 + sum(
        (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    memory = _Memory(tensor.data_ptr(), span * tensor.element_size())
    flat = torch.as_tensor(memory, device=tensor.device)
    return flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
