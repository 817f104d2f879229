"""Attention of rows that decode, in Triton: one program for each row and key head, over all its keys.

FlashAttention's online softmax (arXiv 2205.14135) for a single query position: the query heads that share a key head are
the rows of a tile, which reads each key and value once.

Shape legend: N sequences, P pages of the longest page table, Q query heads, K key/value heads, G = Q / K, W head size,
B pages of the storage, S places of a page; in kernels also M rows of a tile (G and padding), L keys of one iteration.
"""

from __future__ import annotations

import math

import torch
import triton.language as tl

from lorikeet.ops.triton.early import early, follow
from lorikeet.ops.triton.launcher import check_rows, kernel, next_power_of_2

# With few rows each program loads more at a time; with many, there are enough programs to keep the device busy.
_FEW_ROWS = 32
# Elements of the keys of one iteration: 128 and 64 keys of 128, so that the stages fit into the memory of a multiprocessor.
_ELEMENTS_FEW_ROWS, _ELEMENTS = 2**14, 2**13
_NUM_STAGES = 3
# The fewest rows that a matrix unit takes.
_MIN_TILE_ROWS = 16


def decode_attention_triton(
    q_NQW: torch.Tensor,
    kv_BSKW: tuple[torch.Tensor, torch.Tensor],
    page_table_NP: torch.Tensor,
    kv_lens_N: torch.Tensor,
    scale: float,
    window: int | None,
    out_NQW: torch.Tensor,
) -> None:
    """Attend with one query for each sequence; page table and lengths are read on the device.

    Args:
        kv_BSKW: contiguous; places that no sequence owns may hold anything.
        kv_lens_N: keys of each sequence, at least 1.
        scale: of the scores.
        window: the newest keys that count; None for all.

    Raises:
        ValueError: an operand has another shape than the queries and pages ask for, or its last dimension has a stride.
    """
    num_rows, num_heads, size = q_NQW.shape
    _, page_size, num_kv_heads, _ = kv_BSKW[0].shape
    check_rows(q_NQW.shape, q_NQW, out_NQW)
    check_rows(torch.Size((*kv_BSKW[0].shape[:3], size)), *kv_BSKW)
    check_rows(torch.Size((num_rows,)), kv_lens_N)
    check_rows(torch.Size((num_rows, page_table_NP.shape[1])), page_table_NP)
    group = num_heads // num_kv_heads
    elements = _ELEMENTS_FEW_ROWS if num_rows < _FEW_ROWS else _ELEMENTS
    _attend[(num_kv_heads, num_rows)](
        q_NQW,
        *kv_BSKW,
        page_table_NP,
        kv_lens_N,
        out_NQW,
        page_table_NP.stride(0),
        scale * math.log2(math.e),
        WINDOW=window or 0,
        K=num_kv_heads,
        G=group,
        W=size,
        S=page_size,
        M=max(_MIN_TILE_ROWS, next_power_of_2(group)),
        L=elements // size,
        **early(q_NQW.device),
        num_warps=4,
        num_stages=_NUM_STAGES,
    )


# A step's prompts come first: where the rows that decode begin depends on their number.
@kernel("table_stride", shifting=("table_ptr", "lens_ptr"))
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    lens_ptr,
    out_ptr,
    table_stride,
    scale,
    WINDOW: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    M: tl.constexpr,
    L: tl.constexpr,
    EARLY: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lens_ptr + row)
    follow(EARLY)
    member_M1 = tl.arange(0, M)[:, None]
    at_1W = tl.arange(0, W)[None, :]
    at_MW = (row * K + head) * (G * W) + member_M1 * W + at_1W
    q_MW = tl.load(q_ptr + at_MW, mask=member_M1 < G, other=0.0)
    most_M = tl.full([M], float("-inf"), tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    out_MW = tl.zeros([M, W], tl.float32)
    first = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    # Every iteration has a key that counts, so no maximum stays at minus infinity.
    for begin in range(first // L * L, length, L):
        key_L = begin + tl.arange(0, L)
        # Places that were never written may hold anything: they are not even read.
        is_key_L = key_L < length
        page_L = tl.load(table_ptr + row * table_stride + key_L // S, mask=is_key_L, other=0)
        place_L = page_L.to(tl.int64) * S + key_L % S
        at_LW = (place_L * K + head)[:, None] * W + at_1W
        k_LW = tl.load(k_ptr + at_LW, mask=is_key_L[:, None], other=0.0)
        v_LW = tl.load(v_ptr + at_LW, mask=is_key_L[:, None], other=0.0)
        score_ML = tl.dot(q_MW, tl.trans(k_LW), input_precision="ieee") * scale
        counts_L = is_key_L & (key_L >= first)
        score_ML = tl.where(counts_L[None, :], score_ML, float("-inf"))
        newest_M = tl.maximum(most_M, tl.max(score_ML, axis=1))
        weight_ML = tl.exp2(score_ML - newest_M[:, None])
        fade_M = tl.exp2(most_M - newest_M)
        most_M = newest_M
        sum_M = sum_M * fade_M + tl.sum(weight_ML, axis=1)
        out_MW = tl.dot(
            weight_ML.to(v_LW.dtype), v_LW, out_MW * fade_M[:, None], input_precision="ieee"
        )
    out_MW = out_MW / sum_M[:, None]
    tl.store(out_ptr + at_MW, out_MW.to(out_ptr.dtype.element_ty), mask=member_M1 < G)
