"""FlashInfer's interface, as far as the backend uses it, on the CPU: it reads the same page lists and lengths, and computes
with plain torch. Shows that the backend describes a step rightly; how the kernels compute is shown on a GPU alone.

Shape legend: T queries of all sequences, Q query heads, K key heads, W head size, B pages, S places of a page, N
sequences, L keys of one sequence.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch


class _Wrapper:
    """What prefill and decode wrappers share."""

    def __init__(self, workspace: torch.Tensor, layout: str, **options: Any) -> None:
        assert workspace.dtype == torch.uint8
        assert layout == "NHD"
        self.options = options
        self.num_plans = 0

    def _planned(
        self,
        starts: torch.Tensor,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_lens: torch.Tensor,
        shape: tuple[int, int, int, int],
        options: dict[str, Any],
    ) -> None:
        for tensor in (starts, indptr, indices, last_lens):
            assert tensor.dtype == torch.int32
        assert options.pop("q_data_type") == options.pop("kv_data_type")
        assert len(indptr) == len(starts) == len(last_lens) + 1
        assert len(indices) == indptr[-1]
        self.starts, self.shape = starts.tolist(), shape
        self.pages = [indices[a:b] for a, b in pairwise(indptr.tolist())]
        size = shape[3]
        self.lengths = [
            (len(pages) - 1) * size + int(last)
            for pages, last in zip(self.pages, last_lens, strict=True)
        ]
        self.window_left, self.scale = options.pop("window_left"), options.pop("sm_scale")
        self.more = options
        self.num_plans += 1

    def run(
        self, q_TQW: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor
    ) -> torch.Tensor:
        num_heads, num_kv_heads, width, size = self.shape
        assert q_TQW.shape == (self.starts[-1], num_heads, width)
        assert kv[0].shape[1:] == (size, num_kv_heads, width)
        for i, (pages, length) in enumerate(zip(self.pages, self.lengths, strict=True)):
            part = slice(self.starts[i], self.starts[i + 1])
            window = self.window_left + 1 if self.window_left >= 0 else None
            out[part] = _attend(q_TQW[part], kv, pages, length, window, self.scale)
        return out


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        **options: Any,
    ) -> None:
        shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        parts = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._planned(*parts, shape, options)
        assert self.more == {"causal": True}


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **options: Any,
    ) -> None:
        if self.options.get("use_cuda_graph"):
            assert len(self.options["paged_kv_indptr_buffer"]) == len(indptr)
            assert len(self.options["paged_kv_last_page_len_buffer"]) == len(last_page_len)
            assert len(self.options["paged_kv_indices_buffer"]) >= len(indices)
        starts = torch.arange(len(indptr), dtype=torch.int32)
        shape = (num_qo_heads, num_kv_heads, head_dim, page_size)
        self._planned(starts, indptr, indices, last_page_len, shape, options)
        assert self.more == {}


def xqa(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    output: torch.Tensor,
    workspace_buffer: torch.Tensor,
    semaphores: torch.Tensor,
    num_kv_heads: int,
    page_size: int,
    *,
    q_scale: float,
    kv_scale: float,
    sliding_win_size: int,
    sm_count: int,
) -> None:
    assert q.is_contiguous()
    assert output.is_contiguous()
    assert page_table.is_contiguous()
    assert (page_table.dtype, seq_lens.dtype) == (torch.int32, torch.uint32)
    assert seq_lens.shape == (len(q), 1)
    assert k_cache.shape[1:] == (page_size, num_kv_heads, q.shape[-1])
    assert not semaphores.any()
    assert kv_scale == 1.0
    assert sm_count >= 1
    assert workspace_buffer.dtype == torch.uint8
    scale = q_scale * q.shape[-1] ** -0.5
    for row, length in enumerate(seq_lens[:, 0].tolist()):
        pages = page_table[row, : -(-length // page_size)]
        window = sliding_win_size or None
        output[row] = _attend(q[row], (k_cache, v_cache), pages, length, window, scale)


def _attend(
    q_TQW: torch.Tensor,
    kv_BSKW: tuple[torch.Tensor, torch.Tensor],
    pages: torch.Tensor,
    length: int,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    k_LKW, v_LKW = (pages_BSKW[pages.long()].flatten(0, 1)[:length] for pages_BSKW in kv_BSKW)
    q_TKGW = q_TQW.unflatten(1, (k_LKW.shape[1], -1)).double()
    scores = torch.einsum("tkgw,lkw->tkgl", q_TKGW, k_LKW.double()) * scale
    last_T = torch.arange(length - len(q_TQW), length)[:, None, None, None]
    key_L = torch.arange(length)
    hidden = key_L > last_T
    if window is not None:
        hidden = hidden | (key_L <= last_T - window)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("tkgl,lkw->tkgw", weights, v_LKW.double()).flatten(1, 2).to(q_TQW.dtype)


def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Make ``import flashinfer`` give this."""
    library, xqa_module = ModuleType("flashinfer"), ModuleType("flashinfer.xqa")
    library.__path__ = []
    for wrapper in (BatchPrefillWithPagedKVCacheWrapper, BatchDecodeWithPagedKVCacheWrapper):
        setattr(library, wrapper.__name__, wrapper)
    xqa_module.xqa = xqa  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    monkeypatch.setitem(sys.modules, "flashinfer.xqa", xqa_module)
    return library
