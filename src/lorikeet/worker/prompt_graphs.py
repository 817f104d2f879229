"""CUDA graphs of steps with prompts, in pieces around attention: by number of tokens, without adapters and with.

A step of few tokens is over sooner on the device than its launches are made one by one. Its inputs lie at fixed places,
padded to the next number of tokens that was captured; the rows that pad store nothing and nobody reads their results.

Shape legend: T tokens and M wanted rows that a step is captured for.
"""

from __future__ import annotations

import gc
import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lorikeet.attention.base import AttentionInputs
from lorikeet.attention.cut import AttentionCall, CutAttention
from lorikeet.kv.storage import KVStorage
from lorikeet.layers.batch import ForwardBatch
from lorikeet.lora.batch_builder import TileBatchBuilder
from lorikeet.worker.inputs import InputBuilder, StepLayout
from lorikeet.worker.pieces import Pieces
from lorikeet.worker.staging import Upload, int_type, offsets_of, padded, view_at

logger = logging.getLogger(__name__)

_SIZES = (32, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
_STEP = 256  # between larger sizes
# Rows whose logits may be wanted. The LM head reads its weights for one row as for that many.
_MAX_WANTED = 256


def default_prompt_sizes(most: int) -> tuple[int, ...]:
    """Numbers of tokens worth graphs: dense enough that padding stays a small part, and the largest itself."""
    sizes = {*_SIZES, *range(_SIZES[-1], most, _STEP), most}
    return tuple(sorted(size for size in sizes if size <= most))


@dataclass(frozen=True, slots=True, order=True)
class PromptKey:
    """Which pass: for how many tokens, and whether for adapters."""

    tokens: int
    has_adapters: bool = False

    @property
    def wanted(self) -> int:
        """Rows whose logits are computed."""
        return min(self.tokens, _MAX_WANTED)


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    pieces: Pieces
    logits_MV: torch.Tensor


class PromptBuffers:
    """The inputs of captured steps, at fixed places.

    Args:
        sizes: numbers of tokens that are captured.
        lora: makes the adapters' inputs; None if no step has adapters.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        kv: KVStorage,
        inputs: InputBuilder,
        lora: TileBatchBuilder | None = None,
    ) -> None:
        self.lora = lora
        self._kv, self._inputs = kv, inputs
        self._device = kv.k[0].device
        self._int = int_type(self._device)
        keys = [PromptKey(size, has_adapters=True) for size in sizes]
        most = max(offsets_of(self._arrays(key))[1] for key in keys)
        self._data = torch.zeros(most, dtype=torch.uint8, device=self._device)

    def batch(self, key: PromptKey) -> ForwardBatch:
        """The inputs as they lie in the buffers, of one prompt as far as attention can tell."""
        arrays = self._arrays(key)
        offsets, _ = offsets_of(arrays)
        ids, positions, places, wanted, *tiles = (
            view_at(self._data, offset, array.shape, array.dtype)
            for offset, array in zip(offsets, arrays, strict=True)
        )
        num_pages = -(-key.tokens // self._kv.page_size)
        return ForwardBatch(
            input_ids_T=ids,
            positions_T=positions,
            attn=AttentionInputs(
                query_starts=[0, key.tokens],
                kv_lens=[key.tokens],
                page_table_NP=ids.new_zeros((1, num_pages)),
                places_T=places,
                page_size=self._kv.page_size,
                num_chunks=1,
                query_starts_N1=ids.new_tensor([0, key.tokens]),
                kv_lens_N=ids.new_tensor([key.tokens]),
            ),
            kv=self._kv,
            logits_rows_N=wanted,
            sampled_L=self._inputs.lanes.sampled_L,
            lora=self.lora.prompt_batch(tiles, key.tokens, key.wanted)
            if self.lora and tiles
            else None,
        )

    def clear(self, key: PromptKey) -> None:
        """What is captured: rows that pad, and tiles of the base model."""
        self._send(key, self._arrays(key), [])

    def fill(
        self,
        key: PromptKey,
        layout: StepLayout,
        tiles: list[np.ndarray],
        more: list[np.ndarray],
    ) -> tuple[AttentionInputs, list[torch.Tensor]]:
        """Bring a step to the device: what attention is told, and ``more`` arrays.

        Args:
            tiles: of :meth:`TileBatchBuilder.plan_prompt`; none for a key without adapters.
        """
        places_T = self._inputs.places(
            np.repeat(layout.lanes_N, layout.lengths_N), layout.positions_T
        )
        wanted = np.asarray(layout.logits_rows, dtype=self._int)
        fields = [
            padded(layout.ids_T, key.tokens, 0, self._int),
            padded(layout.positions_T, key.tokens, 0, self._int),
            padded(places_T, key.tokens, -1, self._int),
            padded(wanted, key.wanted, 0, self._int),
            *tiles,
        ]
        attention = self._inputs.attention_arrays(layout)
        tensors = self._send(key, fields, [*attention, *more])
        slots_T = tensors[2][: len(places_T)]
        rest = tensors[len(fields) :]
        inputs = self._inputs.attention_inputs(layout, slots_T, rest[: len(attention)])
        return inputs, rest[len(attention) :]

    def _send(
        self, key: PromptKey, fields: list[np.ndarray], more: list[np.ndarray]
    ) -> list[torch.Tensor]:
        """All arrays in one copy, and the fields from there to their places; ``more`` may have any size."""
        sent = Upload([*fields, *more], self._device)
        _, size = offsets_of(fields)
        self._data[:size].copy_(sent.data[:size])
        return sent.tensors()

    def _arrays(self, key: PromptKey) -> list[np.ndarray]:
        """What :meth:`fill` brings, for no tokens at all."""
        nothing = np.zeros(key.tokens, dtype=self._int)
        fields = [nothing, nothing, nothing - 1, nothing[: key.wanted]]
        if self.lora is not None and key.has_adapters:
            shapes = self.lora.prompt_shapes(key.tokens, key.wanted)
            fields += [np.zeros(rows * (block + 1), dtype=np.int32) for rows, block in shapes]
        return fields


class PromptGraphs:
    """Captured steps that have prompts.

    Args:
        forward: the network, with ``attention`` inside.
        sizes: numbers of tokens to capture.
    """

    def __init__(
        self,
        forward: Callable[[ForwardBatch], torch.Tensor],
        attention: CutAttention,
        buffers: PromptBuffers,
        sizes: tuple[int, ...],
        kv: KVStorage,
    ) -> None:
        self._forward = forward
        self._attention = attention
        self._buffers = buffers
        self._sizes = tuple(sorted(sizes))
        self._kv = kv
        self._captured: dict[PromptKey, _Captured] = {}

    @torch.inference_mode()
    def capture(self, pool: Any, *, progress: bool) -> None:
        """Capture every pass, the largest first so that smaller ones fit into its memory.

        Args:
            pool: of the memory that graphs share.
        """
        begin, before = time.monotonic(), torch.cuda.mem_get_info()[0]
        kinds = (False, True) if self._buffers.lora else (False,)
        keys = [PromptKey(size, kind) for size in reversed(self._sizes) for kind in kinds]
        gc.collect()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for key in tqdm(
                keys, desc="Capturing prompt steps", disable=not progress, unit="graph"
            ):
                self._captured[key] = self._capture(key, pool)
        torch.cuda.synchronize()
        logger.info(
            "Captured prompt steps: %d, of up to %d tokens, %.1f s, %.2f GB",
            len(keys),
            self._sizes[-1],
            time.monotonic() - begin,
            (before - torch.cuda.mem_get_info()[0]) / 1e9,
        )

    def run(
        self, layout: StepLayout, more: list[np.ndarray]
    ) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
        """Run a step: logits of the rows that are wanted (and of more, at the end), valid until the next one; and
        ``more`` arrays on the device.

        None if it has to run eagerly: more tokens or wanted rows than were captured, adapters of a backend that does not
        run in graphs, or in too many pieces.
        """
        found = self._find(layout)
        if found is None:
            return None
        key, tiles = found
        inputs, tensors = self._buffers.fill(key, layout, tiles, more)
        backend = self._attention.backend
        backend.prepare(inputs)

        def attend(call: AttentionCall) -> torch.Tensor:
            return backend.forward(
                call.q_TQH, call.k_TKH, call.v_TKH, self._kv, call.layer, inputs, call.window
            )

        captured = self._captured[key]
        captured.pieces.replay(attend, len(layout.ids_T))
        return captured.logits_MV, tensors

    def _find(self, layout: StepLayout) -> tuple[PromptKey, list[np.ndarray]] | None:
        num_tokens = len(layout.ids_T)
        if num_tokens > self._sizes[-1]:
            return None
        key = PromptKey(self._sizes[bisect_left(self._sizes, num_tokens)], any(layout.slots))
        if len(layout.logits_rows) > key.wanted:
            return None
        if not key.has_adapters:
            return key, []
        lora = self._buffers.lora
        if lora is None:
            return None
        lengths = layout.lengths_N.tolist()
        tiles = lora.plan_prompt(layout.slots, lengths, layout.logits_rows, key.tokens, key.wanted)
        return None if tiles is None else (key, tiles)

    def _capture(self, key: PromptKey, pool: Any) -> _Captured:
        self._buffers.clear(key)
        batch = self._buffers.batch(key)
        # Once without capture: kernels are compiled and libraries make their workspaces, which a capture forbids.
        self._attention.prepare(batch.attn)
        self._forward(batch)
        torch.cuda.synchronize()
        pieces = Pieces(pool)
        return _Captured(pieces, pieces.capture(lambda: self._forward(batch), self._attention))
