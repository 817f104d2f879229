"""Rotary embedding of queries and keys, and the store of keys and values: all that happens between the QKV projection
and attention.

Shape legend: T tokens, Q query heads, K key/value heads, H head size, C token places in the cache, O features of the
packed projection = (Q + 2 K) H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from lorikeet.ops.norm import rms_norm_torch


@dataclass(frozen=True, slots=True)
class HeadShape:
    """How the packed projection's features divide into heads, on this rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class QKNorm:
    """RMSNorm of each query and key head before the rotation."""

    q_weight_H: torch.Tensor
    k_weight_H: torch.Tensor
    eps: float


class RopeStoreOp(Protocol):
    """Rotates queries and keys, and stores keys and values. Semantics, with an absent ``delta`` taken as 0::

        q, k, v = split(qkv + delta)                     # [T, Q, H], [T, K, H], [T, K, H]
        q, k = rms_norm(q), rms_norm(k)                  # only with qk_norm
        q, k = rotate(q), rotate(k)
        k_cache[places], v_cache[places] = k, v
        return q, k, v

    ``rotate`` maps the halves (a, b) of a head to (a cos - b sin, b cos + a sin), in float32. ``cos_sin`` is float32
    [T, H]: cos in the first H/2 columns, sin in the others. Writes to the caches and to nothing else; the results may
    be views of ``qkv``.
    """

    def __call__(
        self,
        qkv_TO: torch.Tensor,
        cos_sin_TH: torch.Tensor,
        k_cache_CKH: torch.Tensor,
        v_cache_CKH: torch.Tensor,
        places_T: torch.Tensor,
        shape: HeadShape,
        qk_norm: QKNorm | None = None,
        delta_TO: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


def rope_store_torch(
    qkv_TO: torch.Tensor,
    cos_sin_TH: torch.Tensor,
    k_cache_CKH: torch.Tensor,
    v_cache_CKH: torch.Tensor,
    places_T: torch.Tensor,
    shape: HeadShape,
    qk_norm: QKNorm | None = None,
    delta_TO: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Torch form of :class:`RopeStoreOp`."""
    if delta_TO is not None:
        qkv_TO = qkv_TO + delta_TO
    num_rotated = shape.num_heads + shape.num_kv_heads
    heads_TXH = qkv_TO.unflatten(-1, (num_rotated + shape.num_kv_heads, shape.head_dim))
    if qk_norm is None:
        # Queries and keys rotate alike, so both are rotated by one set of calls.
        qk_TXH = rotate_torch(heads_TXH[:, :num_rotated], cos_sin_TH)
    else:
        q_TQH, k_TKH = heads_TXH[:, : shape.num_heads], heads_TXH[:, shape.num_heads : num_rotated]
        q_TQH, _ = rms_norm_torch(q_TQH, qk_norm.q_weight_H, qk_norm.eps)
        k_TKH, _ = rms_norm_torch(k_TKH, qk_norm.k_weight_H, qk_norm.eps)
        qk_TXH = rotate_torch(torch.cat((q_TQH, k_TKH), dim=1), cos_sin_TH)
    q_TQH, k_TKH = qk_TXH[:, : shape.num_heads], qk_TXH[:, shape.num_heads :]
    v_TKH = heads_TXH[:, num_rotated:]
    store_kv_torch(k_TKH, v_TKH, k_cache_CKH, v_cache_CKH, places_T)
    return q_TQH, k_TKH, v_TKH


def rotate_torch(x_TXH: torch.Tensor, cos_sin_TH: torch.Tensor) -> torch.Tensor:
    """Rotate every head of ``x`` by its token's angles; float32 inside, the dtype of ``x`` outside."""
    cos_TH, sin_TH = (half.unsqueeze(1) for half in cos_sin_TH.chunk(2, dim=-1))
    a_TXH, b_TXH = x_TXH.float().chunk(2, dim=-1)
    rotated_TXH = torch.cat(
        (a_TXH * cos_TH - b_TXH * sin_TH, b_TXH * cos_TH + a_TXH * sin_TH), dim=-1
    )
    return rotated_TXH.to(x_TXH.dtype)


def store_kv_torch(
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    k_cache_CKH: torch.Tensor,
    v_cache_CKH: torch.Tensor,
    places_T: torch.Tensor,
) -> None:
    """Store the keys and values of T tokens at their places in the cache. Semantics::

        k_cache[places] = k
        v_cache[places] = v

    Writes to the two caches. Places must be distinct.
    """
    k_cache_CKH.index_copy_(0, places_T, k_TKH)
    v_cache_CKH.index_copy_(0, places_T, v_TKH)
