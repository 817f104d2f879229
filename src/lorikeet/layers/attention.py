"""Self-attention: packed QKV projection, rotary embedding with the store of K/V, attention, output projection.

Shape legend: T tokens, D hidden features, O features of the packed projection, Q query heads, K key/value heads,
H head size; heads are those of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lorikeet.attention.base import AttentionBackend
from lorikeet.layers.batch import ForwardBatch
from lorikeet.layers.linear import Linear, Part, Placement, column, row
from lorikeet.layers.norm import RMSNorm
from lorikeet.ops.rope import HeadShape, QKNorm
from lorikeet.ops.select import Ops


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Sizes of the whole model's attention, over all ranks."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    o_bias: bool
    qk_norm_eps: float | None


class Attention(nn.Module):
    """One layer's attention.

    Args:
        layer: index into the K/V storage.
        window: sliding window in tokens; None means all.
        shape: ``qk_norm_eps`` is None for models without q/k norm.
    """

    def __init__(
        self,
        layer: int,
        window: int | None,
        shape: AttentionShape,
        placement: Placement,
        ops: Ops,
        backend: AttentionBackend,
    ) -> None:
        super().__init__()
        self._layer, self._window, self._ops, self._backend = layer, window, ops, backend
        tp = placement.tp
        # With more ranks than key/value heads, ranks share one: each still holds a whole head.
        kv_shards = min(tp.size, shape.num_kv_heads)
        self._heads = HeadShape(
            shape.num_heads // tp.size, shape.num_kv_heads // kv_shards, shape.head_dim
        )
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        kv = Part(kv_size, kv_shards)
        self.qkv_proj = Linear(
            shape.hidden_size,
            column(tp, Part(q_size, tp.size), kv, kv),
            placement,
            bias=shape.qkv_bias,
        )
        self.o_proj = Linear(q_size, row(tp, shape.hidden_size), placement, bias=shape.o_bias)
        self._qk_norm: QKNorm | None = None
        if shape.qk_norm_eps is not None:
            self.q_norm = RMSNorm(shape.head_dim, shape.qk_norm_eps, placement, ops.rms_norm)
            self.k_norm = RMSNorm(shape.head_dim, shape.qk_norm_eps, placement, ops.rms_norm)
            self._qk_norm = QKNorm(self.q_norm.weight, self.k_norm.weight, shape.qk_norm_eps)

    def forward(
        self,
        x_TD: torch.Tensor,
        cos_sin_TH: torch.Tensor,
        batch: ForwardBatch,
        rows_N: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend: [T, D] -> [T, D], and a delta that is still to be added to it. Stores the tokens' keys and values in
        ``batch.kv``.

        Args:
            rows_N: ``batch.logits_rows_N`` to get those rows alone, [N, D].
        """
        qkv_TO, delta_TO = self.qkv_proj.forward_split(x_TD, batch)
        # The storage may be wider than a head (see AttentionBackend.storage_head_dim).
        size = self._heads.head_dim
        q_TQH, k_TKH, v_TKH = self._ops.rope_store(
            qkv_TO,
            cos_sin_TH,
            batch.kv.k[self._layer][..., :size],
            batch.kv.v[self._layer][..., :size],
            batch.attn.places_T,
            self._heads,
            self._qk_norm,
            delta_TO,
        )
        o_TQH = self._backend.forward(
            q_TQH, k_TKH, v_TKH, batch.kv, self._layer, batch.attn, self._window
        )
        if rows_N is None:
            return self.o_proj.forward_split(o_TQH.flatten(1), batch)
        return self.o_proj.forward_split(o_TQH.index_select(0, rows_N).flatten(1), batch.narrowed())
