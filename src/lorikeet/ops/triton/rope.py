"""Rotary embedding and K/V store in Triton: a program takes a few heads of one token, whatever kind they are.

Shape legend: T tokens, Q query heads, K key/value heads, H head size, C token places in the cache, O features of the
packed projection = (Q + 2 K) H; G heads of one program, F the block that H/2 is padded to, a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorikeet.ops.rope import HeadShape, QKNorm
from lorikeet.ops.triton.early import early, follow
from lorikeet.ops.triton.launcher import cdiv, check_rows, kernel, next_power_of_2

_HEADS_PER_PROGRAM = 8
# Elements of one half of the heads that a warp holds: 16 bytes per thread in a 16-bit type.
_ELEMENTS_PER_WARP = 256


def rope_store_triton(
    qkv_TO: torch.Tensor,
    cos_sin_TH: torch.Tensor,
    k_cache_CKH: torch.Tensor,
    v_cache_CKH: torch.Tensor,
    places_T: torch.Tensor,
    shape: HeadShape,
    qk_norm: QKNorm | None = None,
    delta_TO: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton form of :class:`lorikeet.ops.rope.RopeStoreOp`.

    q is a contiguous tensor (what attention kernels read); k and v are views of another one. A token whose place is
    below 0, such as a row that pads a CUDA graph's batch, is rotated but not stored. The caches may be views with any
    stride of places and heads.

    Raises:
        ValueError: an operand does not fit the heads, or its last dimension has a stride.
    """
    num_tokens, heads = qkv_TO.shape[0], shape.num_heads + 2 * shape.num_kv_heads
    token_shape = torch.Size((num_tokens, heads * shape.head_dim))
    check_rows(token_shape, qkv_TO, delta_TO)
    check_rows(torch.Size((num_tokens, shape.head_dim)), cos_sin_TH)
    check_rows(torch.Size((num_tokens,)), places_T)
    place = torch.Size((k_cache_CKH.shape[0], shape.num_kv_heads, shape.head_dim))
    check_rows(place, k_cache_CKH, v_cache_CKH)
    q_TQH = qkv_TO.new_empty((num_tokens, shape.num_heads, shape.head_dim))
    kv_TXH = qkv_TO.new_empty((num_tokens, 2 * shape.num_kv_heads, shape.head_dim))
    block_half = next_power_of_2(shape.head_dim // 2)
    _rope_store[(num_tokens, cdiv(heads, _HEADS_PER_PROGRAM))](
        qkv_TO,
        delta_TO,
        cos_sin_TH,
        places_T,
        q_TQH,
        kv_TXH,
        k_cache_CKH,
        v_cache_CKH,
        None if qk_norm is None else qk_norm.q_weight_H,
        None if qk_norm is None else qk_norm.k_weight_H,
        qkv_TO.stride(0),
        0 if delta_TO is None else delta_TO.stride(0),
        cos_sin_TH.stride(0),
        k_cache_CKH.stride(0),
        k_cache_CKH.stride(1),
        v_cache_CKH.stride(0),
        v_cache_CKH.stride(1),
        0.0 if qk_norm is None else qk_norm.eps,
        Q=shape.num_heads,
        K=shape.num_kv_heads,
        H=shape.head_dim,
        G=_HEADS_PER_PROGRAM,
        F=block_half,
        **early(qkv_TO.device),
        num_warps=max(1, _HEADS_PER_PROGRAM * block_half // _ELEMENTS_PER_WARP),
    )
    return q_TQH, kv_TXH[:, : shape.num_kv_heads], kv_TXH[:, shape.num_kv_heads :]


@triton.jit
def _load_halves(ptr, mask, H: tl.constexpr):
    """Both halves of each head, float32."""
    a_GF = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    b_GF = tl.load(ptr + H // 2, mask=mask, other=0.0).to(tl.float32)
    return a_GF, b_GF


@triton.jit
def _store_halves(ptr, a_GF, b_GF, mask, H: tl.constexpr):
    tl.store(ptr, a_GF, mask=mask)
    tl.store(ptr + H // 2, b_GF, mask=mask)


@triton.jit
def _round(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def _normalise(
    a_GF,
    b_GF,
    q_weight_ptr,
    k_weight_ptr,
    eps,
    is_q_GF,
    is_half_1F,
    H: tl.constexpr,
    dtype: tl.constexpr,
):
    """RMSNorm of each head, with the weight of query heads where those are and of key heads elsewhere."""
    q_a_1F, q_b_1F = _load_halves(q_weight_ptr, is_half_1F, H)
    k_a_1F, k_b_1F = _load_halves(k_weight_ptr, is_half_1F, H)
    # Padding of a head is 0 and adds nothing to the sum.
    scale_G1 = tl.rsqrt(tl.sum(a_GF * a_GF + b_GF * b_GF, axis=1) / H + eps)[:, None]
    a_GF = _round(a_GF * scale_G1, dtype) * tl.where(is_q_GF, q_a_1F, k_a_1F)
    b_GF = _round(b_GF * scale_G1, dtype) * tl.where(is_q_GF, q_b_1F, k_b_1F)
    return _round(a_GF, dtype), _round(b_GF, dtype)


@kernel()
def _rope_store(
    qkv_ptr,
    delta_ptr,
    cos_sin_ptr,
    places_ptr,
    q_ptr,
    kv_ptr,
    k_cache_ptr,
    v_cache_ptr,
    q_weight_ptr,
    k_weight_ptr,
    qkv_stride,
    delta_stride,
    cos_sin_stride,
    k_place_stride,
    k_head_stride,
    v_place_stride,
    v_head_stride,
    eps,
    Q: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    F: tl.constexpr,
    EARLY: tl.constexpr,
):
    follow(EARLY)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(places_ptr + token).to(tl.int64)
    head_G1 = (tl.program_id(1) * G + tl.arange(0, G))[:, None]
    half_1F = tl.arange(0, F)[None, :]
    is_half_1F = half_1F < H // 2
    exists_GF = (head_G1 < Q + 2 * K) & is_half_1F
    is_q_GF = (head_G1 < Q) & is_half_1F
    is_k_GF = (head_G1 >= Q) & (head_G1 < Q + K) & is_half_1F
    is_v_GF = (head_G1 >= Q + K) & exists_GF

    # a and b are the two halves of each head.
    at_GF = head_G1 * H + half_1F
    a_GF, b_GF = _load_halves(qkv_ptr + token * qkv_stride + at_GF, exists_GF, H)
    cos_1F, sin_1F = _load_halves(cos_sin_ptr + token * cos_sin_stride + half_1F, is_half_1F, H)
    if delta_ptr is not None:
        delta_at_ptr = delta_ptr + token * delta_stride + at_GF
        delta_a_GF, delta_b_GF = _load_halves(delta_at_ptr, exists_GF, H)
        # Rounded as a projection that held the delta already would have been.
        a_GF = _round(a_GF + delta_a_GF, dtype)
        b_GF = _round(b_GF + delta_b_GF, dtype)
    x_a_GF, x_b_GF = a_GF, b_GF
    if q_weight_ptr is not None:
        q_at_ptr, k_at_ptr = q_weight_ptr + half_1F, k_weight_ptr + half_1F
        x_a_GF, x_b_GF = _normalise(
            a_GF, b_GF, q_at_ptr, k_at_ptr, eps, is_q_GF, is_half_1F, H, dtype
        )

    # Value heads stay as they came.
    a_GF = tl.where(is_v_GF, a_GF, x_a_GF * cos_1F - x_b_GF * sin_1F).to(dtype)
    b_GF = tl.where(is_v_GF, b_GF, x_b_GF * cos_1F + x_a_GF * sin_1F).to(dtype)

    _store_halves(q_ptr + token * (Q * H) + at_GF, a_GF, b_GF, is_q_GF, H)
    kv_at_GF = token * (2 * K * H) + at_GF - Q * H
    _store_halves(kv_ptr + kv_at_GF, a_GF, b_GF, is_k_GF | is_v_GF, H)
    # All heads or none: a token without a place is stored nowhere.
    is_stored_G1 = head_G1 < tl.where(place >= 0, Q + 2 * K, 0)
    k_at_G1 = place * k_place_stride + (head_G1 - Q) * k_head_stride
    _store_halves(k_cache_ptr + k_at_G1 + half_1F, a_GF, b_GF, is_k_GF & is_stored_G1, H)
    v_at_G1 = place * v_place_stride + (head_G1 - Q - K) * v_head_stride
    _store_halves(v_cache_ptr + v_at_G1 + half_1F, a_GF, b_GF, is_v_GF & is_stored_G1, H)
