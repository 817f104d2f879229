"""Attention by FlashInfer: paged keys and values on an NVIDIA GPU.

Prompt chunks go through its paged prefill kernels, rows that decode through one of its ways or through a kernel of our
own; a step with both uses both, each on its own rows. The library's kernels are compiled when they are first used, and
kept on disk. Which way is taken when was measured: docs/decisions/0009-attention-on-a-gpu.md and 0013.

What a step needs beside its tensors (a *plan*: how the work is cut into parts) is worked out on the host, once for each
window size; XQA and our own kernel need none. Making one ends in a copy to the device; nothing waits for what the device
computes.

Shape legend: T tokens of the step, N sequences, P pages of the longest page table, Q query heads, K key/value heads,
H head size, W head size as it is stored, C token places in the cache, B pages of the storage, S places of a page,
I pages in use by the sequences at hand.
"""

from __future__ import annotations

import importlib
import itertools
from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from lorikeet.attention.base import AttentionInputs
from lorikeet.errors import ConfigError
from lorikeet.kv.storage import KVStorage

DECODE_PATHS = ("triton", "xqa", "fa2-tc")

# Our own kernel serves up to this many keys, and any number of keys from this many rows on. In between, only XQA keeps
# the device busy, because it cuts sequences into parts.
_SHORT_KEYS = 256
_MANY_ROWS = 32

# Head sizes that the prefill kernels are made for; other heads are stored with zeros behind them.
_STORED_HEAD_DIMS = (64, 128, 256)
_XQA_PAGE_SIZES = (16, 32, 64, 128)
# XQA cuts a sequence into parts until this many blocks run on each multiprocessor.
_XQA_BLOCKS_PER_SM = 1
# Keys that one of its blocks takes at a time, and the numbers of parts that are worth a graph of their own.
_XQA_TILE = 256
_XQA_PARTS = (1, 4, 16)
_XQA_SCRATCH_BYTES = 32 * 2**20
# One 4-byte counter for each sequence and key head.
_XQA_SEMAPHORE_BYTES = 2**20
# Partial results of sequences that FlashAttention-2 cuts into parts; the library refuses a plan that needs more.
_FA2_WORKSPACE_BYTES = 384 * 2**20


@dataclass(frozen=True, slots=True)
class Shape:
    """What all calls of one model have in common.

    Attributes:
        num_heads, num_kv_heads: of this rank.
        stored_dim: head size in the storage, at least ``head_dim``.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    stored_dim: int
    page_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True, slots=True)
class Pages:
    """The pages of some sequences of a step, one after the other.

    Attributes:
        starts: int32 on the host; sequence i has entries [starts[i], starts[i + 1]) of ``pages_I``.
        last_lens: int32 on the host: places in use of each sequence's last page.
        pages_I: int32 on the device.
    """

    starts: torch.Tensor
    last_lens: torch.Tensor
    pages_I: torch.Tensor


class Planned:
    """One of FlashInfer's wrappers, which hold a plan. A plan is written into one pinned buffer and copied from there, so
    the next one must not be made before that copy is done."""

    def __init__(self, wrapper: Any, shape: Shape) -> None:
        self.wrapper = wrapper
        self._shape = shape
        self._copied: torch.cuda.Event | None = None

    def plan(self, *indices: torch.Tensor, window: int | None, **options: Any) -> Any:
        """Plan for sequences; returns the wrapper, ready to run.

        Args:
            indices: what tells the wrapper where the sequences lie.
            options: passed on.
        """
        shape = self._shape
        if self._copied is not None:
            self._copied.synchronize()
        self.wrapper.plan(
            *indices,
            shape.num_heads,
            shape.num_kv_heads,
            shape.stored_dim,
            shape.page_size,
            window_left=-1 if window is None else window - 1,
            sm_scale=shape.scale,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
            **options,
        )
        if shape.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()
        return self.wrapper


class RowDecoder(Protocol):
    """Attention for rows with one query each: a kernel that takes any number of keys and needs nothing prepared, unless a
    way of its own says otherwise."""

    def graph_kv_lens(self, bucket: int, longest: int) -> tuple[int, ...]:
        """See :class:`lorikeet.attention.base.AttentionBackend`."""
        del bucket
        return (longest,)

    def prepare(self, inputs: AttentionInputs) -> None:
        """Do what depends on the step but not on the layer."""

    def run(
        self,
        q_NQW: torch.Tensor,
        kv_BSKW: tuple[torch.Tensor, torch.Tensor],
        inputs: AttentionInputs,
        window: int | None,
        out_NQW: torch.Tensor,
        /,
    ) -> None: ...


class FlashInferBackend:
    """See :class:`lorikeet.attention.base.AttentionBackend`.

    Args:
        num_heads, num_kv_heads: of this rank.
        page_size: of the storage.
        dtype: of queries, keys and values.
        decode: one of ``DECODE_PATHS``; None takes the fastest for each step where XQA runs (Hopper, pages of 16 to 128),
            else ``fa2-tc``.
        prefill: ``fa2``, or ``fa3``, which is for Hopper and takes minutes to compile.

    Raises:
        ConfigError: FlashInfer is not installed, or does not serve such a type, head size or page size on this device.

    Attributes:
        name: ``flashinfer``, or ``fa3`` if that is what prompts go through.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        decode: str | None = None,
        prefill: str = "fa2",
    ) -> None:
        self.name = "fa3" if prefill == "fa3" else "flashinfer"
        if dtype not in (torch.float16, torch.bfloat16):
            raise ConfigError(
                f"--attention-backend {self.name} serves float16 and bfloat16, not "
                f"{str(dtype).removeprefix('torch.')}; --attention-backend sdpa serves it"
            )
        stored_dim = self.storage_head_dim(head_dim)
        self._shape = Shape(num_heads, num_kv_heads, head_dim, stored_dim, page_size, dtype, device)
        library = _load_library()
        is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
        if prefill == "fa3" and not is_hopper:
            raise ConfigError(
                "--attention-backend fa3 needs a GPU of the Hopper generation (compute capability 9.0); allowed on this "
                "one: flashinfer, sdpa"
            )
        self._paths = _decode_paths(decode, self._shape, is_hopper=is_hopper)
        workspace = torch.empty(_FA2_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._prefill = _Prefill(library, self._shape, workspace, prefill)
        self._decoders = {
            path: _make_decoder(path, library, self._shape, workspace) for path in set(self._paths)
        }
        self._inputs: AttentionInputs | None = None

    def storage_head_dim(self, head_dim: int) -> int:
        for stored_dim in _STORED_HEAD_DIMS:
            if head_dim <= stored_dim:
                return stored_dim
        raise ConfigError(
            f"--attention-backend flashinfer serves heads of at most {_STORED_HEAD_DIMS[-1]}, the model's have "
            f"{head_dim}; --attention-backend sdpa serves them"
        )

    def graph_kv_lens(self, bucket: int, longest: int) -> tuple[int, ...]:
        path = self._path_of(bucket, longest)
        lengths = self._decoders[path].graph_kv_lens(bucket, longest)
        if path == self._path_of(bucket, _SHORT_KEYS):
            return lengths
        return (_SHORT_KEYS, *(length for length in lengths if length > _SHORT_KEYS))

    def prepare(self, inputs: AttentionInputs) -> None:
        self._inputs = inputs
        self._prefill.prepare()
        self._decoder_of(inputs).prepare(inputs)

    def forward(
        self,
        q_TQH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        kv: KVStorage,
        layer: int,
        inputs: AttentionInputs,
        window: int | None,
    ) -> torch.Tensor:
        if inputs is not self._inputs:
            self.prepare(inputs)
        shape = self._shape
        padding = shape.stored_dim - shape.head_dim
        q_TQW = functional.pad(q_TQH, (0, padding)) if padding else q_TQH.contiguous()
        page = (shape.page_size, shape.num_kv_heads, shape.stored_dim)
        kv_BSKW = (kv.k[layer].view(-1, *page), kv.v[layer].view(-1, *page))
        out_TQW = torch.empty_like(q_TQW)
        first = inputs.query_starts[inputs.num_chunks]
        if first > 0:
            self._prefill.run(q_TQW[:first], kv_BSKW, inputs, window, out_TQW[:first])
        if first < len(q_TQW):
            self._decoder_of(inputs).run(q_TQW[first:], kv_BSKW, inputs, window, out_TQW[first:])
        return out_TQW[..., : shape.head_dim].contiguous()

    def _path_of(self, num_rows: int, num_keys: int) -> str:
        usual, long_few = self._paths
        return long_few if num_keys > _SHORT_KEYS and num_rows < _MANY_ROWS else usual

    def _decoder_of(self, inputs: AttentionInputs) -> RowDecoder:
        # A graph serves all lengths that its page table has room for.
        num_keys = inputs.page_table_NP.shape[1] * self._shape.page_size
        return self._decoders[self._path_of(len(inputs.kv_lens) - inputs.num_chunks, num_keys)]


class _PlannedAttention(ABC):
    """Attention by wrappers that hold a plan, which is made once in a step for each window size.

    Args:
        workspace: for partial results; all wrappers of a model share one.
    """

    def __init__(self, library: Any, shape: Shape, workspace: torch.Tensor) -> None:
        self._library = library
        self._shape = shape
        self._workspace = workspace
        # Two of them take turns: the copy that one has to wait for is a step old, and done by then.
        self._turns = defaultdict[int | None, "itertools.cycle[Planned]"](
            lambda: itertools.cycle((self._new(), self._new()))
        )
        self._ready: dict[int | None, Any] = {}

    def run(
        self,
        q_TQW: torch.Tensor,
        kv_BSKW: tuple[torch.Tensor, torch.Tensor],
        inputs: AttentionInputs,
        window: int | None,
        out_TQW: torch.Tensor,
    ) -> None:
        wrapper = self._ready.get(window)
        if wrapper is None:
            wrapper = self._ready[window] = self._plan(inputs, window)
        wrapper.run(q_TQW, kv_BSKW, out=out_TQW)

    @abstractmethod
    def _plan(self, inputs: AttentionInputs, window: int | None) -> Any:
        """Plan for the step's sequences; returns a wrapper."""

    @abstractmethod
    def _new(self) -> Planned:
        """A wrapper without a plan."""


class _Prefill(_PlannedAttention):
    """Prompt chunks: the first ``num_chunks`` sequences of a step."""

    def __init__(self, library: Any, shape: Shape, workspace: torch.Tensor, backend: str) -> None:
        super().__init__(library, shape, workspace)
        self._backend = backend
        self._pages: Pages | None = None

    def prepare(self) -> None:
        self._ready.clear()
        self._pages = None

    def _plan(self, inputs: AttentionInputs, window: int | None) -> Any:
        if self._pages is None:
            self._pages = pages_of(inputs, 0, inputs.num_chunks)
        pages = self._pages
        starts = np.asarray(inputs.query_starts[: inputs.num_chunks + 1], dtype=np.int32)
        return next(self._turns[window]).plan(
            on_host(starts, inputs),
            pages.starts,
            pages.pages_I,
            pages.last_lens,
            window=window,
            causal=True,
        )

    def _new(self) -> Planned:
        make = self._library.BatchPrefillWithPagedKVCacheWrapper
        return Planned(make(self._workspace, "NHD", backend=self._backend), self._shape)


class TritonDecode(RowDecoder):
    """Rows that decode, by a kernel of our own: where no library comes near the device's bandwidth (docs/decisions/0013)."""

    def __init__(self, shape: Shape) -> None:
        # Triton need not be there where the library alone is used.
        from lorikeet.ops.triton.attention import decode_attention_triton

        self._shape = shape
        self._attend = decode_attention_triton

    def run(
        self,
        q_NQW: torch.Tensor,
        kv_BSKW: tuple[torch.Tensor, torch.Tensor],
        inputs: AttentionInputs,
        window: int | None,
        out_NQW: torch.Tensor,
    ) -> None:
        first = inputs.num_chunks
        self._attend(
            q_NQW,
            kv_BSKW,
            inputs.page_table_NP[first:],
            inputs.kv_lens_N[first:],
            self._shape.scale,
            window,
            out_NQW,
        )


class _XQA(RowDecoder):
    """Rows that decode, by a kernel that reads page table and lengths on the device and cuts the work by itself."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._call = importlib.import_module("flashinfer.xqa").xqa
        device = shape.device
        # Counters that the kernel leaves as it found them, at zero.
        self._semaphores = torch.zeros(_XQA_SEMAPHORE_BYTES, dtype=torch.uint8, device=device)
        self._scratch = torch.empty(_XQA_SCRATCH_BYTES, dtype=torch.uint8, device=device)
        self._num_blocks = 1
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self._num_blocks = properties.multi_processor_count * _XQA_BLOCKS_PER_SM

    def graph_kv_lens(self, bucket: int, longest: int) -> tuple[int, ...]:
        """The kernel cuts each sequence into as many parts as the *longest possible* one has tiles, or as there are
        idle multiprocessors; merging many empty parts takes as long as attending to a short sequence."""
        num_blocks = bucket * self._shape.num_kv_heads
        most_parts = max(1, self._num_blocks // num_blocks)
        lengths = [parts * _XQA_TILE for parts in _XQA_PARTS if parts < most_parts]
        return (*(length for length in lengths if length < longest), longest)

    def run(
        self,
        q_NQW: torch.Tensor,
        kv_BSKW: tuple[torch.Tensor, torch.Tensor],
        inputs: AttentionInputs,
        window: int | None,
        out_NQW: torch.Tensor,
    ) -> None:
        shape, first = self._shape, inputs.num_chunks
        # The kernel has one more dimension, for beams; and scales by the size of the heads that it sees.
        self._call(
            q_NQW.unsqueeze(1),
            *kv_BSKW,
            inputs.page_table_NP[first:],
            inputs.kv_lens_N[first:].view(torch.uint32).unsqueeze(1),
            out_NQW.unsqueeze(1),
            self._scratch,
            self._semaphores,
            shape.num_kv_heads,
            shape.page_size,
            q_scale=shape.scale * shape.stored_dim**0.5,
            kv_scale=1.0,
            sliding_win_size=window or 0,
            sm_count=self._num_blocks,
        )


class _FA2Decode(_PlannedAttention, RowDecoder):
    """Rows that decode, by FlashAttention-2: where XQA does not run.

    A captured step keeps using the wrapper that it was captured with, so each bucket and window has its own.
    """

    def __init__(self, library: Any, shape: Shape, workspace: torch.Tensor) -> None:
        super().__init__(library, shape, workspace)
        self._captured: dict[tuple[int, int | None], Planned] = {}
        self._page_buffer = torch.empty(0, dtype=torch.int32, device=shape.device)

    def prepare(self, inputs: AttentionInputs) -> None:
        self._ready.clear()
        if inputs.bucket is None:
            return
        # A replay calls no forward: what the layers of this bucket use is planned here.
        pages = None
        for bucket, window in self._captured:
            if bucket == inputs.bucket:
                pages = pages or pages_of(inputs, 0, bucket)
                self._ready[window] = self._plan(inputs, window, pages)

    def _plan(self, inputs: AttentionInputs, window: int | None, pages: Pages | None = None) -> Any:
        pages = pages or pages_of(inputs, inputs.num_chunks, len(inputs.kv_lens))
        if inputs.bucket is None:
            planned = next(self._turns[window])
        else:
            key = (inputs.bucket, window)
            if key not in self._captured:
                self._captured[key] = self._new_captured(inputs)
            planned = self._captured[key]
        return planned.plan(pages.starts, pages.pages_I, pages.last_lens, window=window)

    def _new(self, **more: Any) -> Planned:
        make = self._library.BatchDecodeWithPagedKVCacheWrapper
        wrapper = make(self._workspace, "NHD", use_tensor_cores=True, backend="fa2", **more)
        return Planned(wrapper, self._shape)

    def _new_captured(self, inputs: AttentionInputs) -> Planned:
        bucket = len(inputs.kv_lens)
        device = self._shape.device
        # Only one bucket runs at a time, and its pages are written before: all share one buffer.
        most_pages = inputs.page_table_NP.numel()
        if self._page_buffer.numel() < most_pages:
            self._page_buffer = torch.zeros(most_pages, dtype=torch.int32, device=device)
        return self._new(
            use_cuda_graph=True,
            paged_kv_indptr_buffer=torch.zeros(bucket + 1, dtype=torch.int32, device=device),
            paged_kv_indices_buffer=self._page_buffer,
            paged_kv_last_page_len_buffer=torch.zeros(bucket, dtype=torch.int32, device=device),
        )


def _load_library() -> Any:
    try:
        return importlib.import_module("flashinfer")
    except ImportError as error:
        raise ConfigError(
            f"--attention-backend flashinfer needs FlashInfer, which does not load ({error}): "
            "pip install 'lorikeet[gpu]', or use --attention-backend sdpa"
        ) from error


def _decode_paths(decode: str | None, shape: Shape, *, is_hopper: bool) -> tuple[str, str]:
    """The paths for most steps, and for few rows with many keys; raises ConfigError if ``decode`` cannot be taken."""
    fits_xqa = shape.page_size in _XQA_PAGE_SIZES
    if decode is None:
        return ("triton", "xqa") if is_hopper and fits_xqa else ("fa2-tc", "fa2-tc")
    if decode not in DECODE_PATHS:
        raise ConfigError(f"no decode path {decode!r}; there are: {', '.join(DECODE_PATHS)}")
    if decode == "xqa" and not fits_xqa:
        raise ConfigError(
            f"XQA serves pages of {', '.join(map(str, _XQA_PAGE_SIZES))} tokens, not {shape.page_size}"
        )
    return decode, decode


def _make_decoder(path: str, library: Any, shape: Shape, workspace: torch.Tensor) -> RowDecoder:
    if path == "triton":
        return TritonDecode(shape)
    if path == "xqa":
        return _XQA(shape)
    return _FA2Decode(library, shape, workspace)


def pages_of(inputs: AttentionInputs, first: int, last: int) -> Pages:
    """The pages of sequences [first, last), taken out of the page table without waiting for the device."""
    kv_lens = np.asarray(inputs.kv_lens[first:last], dtype=np.int32)
    counts = -(-kv_lens // inputs.page_size)
    starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    width = inputs.page_table_NP.shape[1]
    # Entry i of sequence n is entry n * width + i of the flat table.
    jumps = np.arange(first, last, dtype=np.int32) * width - starts[:-1]
    entries = np.arange(starts[-1], dtype=np.int32) + np.repeat(jumps, counts)
    table = inputs.page_table_NP
    entries_I = on_host(entries, inputs).to(table.device, non_blocking=True)
    return Pages(
        starts=on_host(starts, inputs),
        last_lens=on_host((kv_lens - 1) % inputs.page_size + 1, inputs),
        pages_I=table.view(-1).index_select(0, entries_I).to(torch.int32),
    )


def on_host(array: np.ndarray, inputs: AttentionInputs) -> torch.Tensor:
    """The array as a tensor; pinned if the step is a GPU's, so that copies of it need not wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if inputs.page_table_NP.is_cuda else tensor
