"""The decoder of every supported family.

Shape legend: T tokens of a step, N rows of T whose logits are wanted, D hidden features, H head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lorikeet.attention.base import AttentionBackend
from lorikeet.layers.attention import Attention, AttentionShape
from lorikeet.layers.batch import ForwardBatch
from lorikeet.layers.embedding import VocabEmbedding
from lorikeet.layers.linear import Linear, Part, Placement, column
from lorikeet.layers.mlp import GatedMLP
from lorikeet.layers.norm import RMSNorm
from lorikeet.layers.rotary import RotaryEmbedding
from lorikeet.models.spec import ModelSpec
from lorikeet.ops.select import Ops


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm that first adds what the previous one left to the residual stream."""

    def __init__(
        self,
        layer: int,
        spec: ModelSpec,
        placement: Placement,
        ops: Ops,
        attention: AttentionBackend,
    ) -> None:
        super().__init__()
        shape = AttentionShape(
            hidden_size=spec.hidden_size,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            qkv_bias=spec.qkv_bias,
            o_bias=spec.o_bias,
            qk_norm_eps=spec.rms_norm_eps if spec.qk_norm else None,
        )
        window = spec.sliding_windows[layer]
        self.input_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, placement, ops.rms_norm)
        self.attention = Attention(layer, window, shape, placement, ops, attention)
        self.mlp_norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, placement, ops.rms_norm)
        self.mlp = GatedMLP(
            spec.hidden_size, spec.intermediate_size, placement, ops, bias=spec.mlp_bias
        )

    def forward(
        self,
        x_TD: torch.Tensor,
        delta_TD: torch.Tensor | None,
        residual_TD: torch.Tensor | None,
        cos_sin_TH: torch.Tensor,
        batch: ForwardBatch,
        rows_N: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Run the layer; returns (output, delta still to be added to it, residual stream), which the next norm adds up.

        Args:
            rows_N: ``batch.logits_rows_N`` for a last layer, of which nobody reads other rows: past attention it computes
                those alone, [N, D].
        """
        x_TD, sum_TD = self.input_norm(x_TD, residual_TD, delta_TD)
        x_TD, delta_TD = self.attention(x_TD, cos_sin_TH, batch, rows_N)
        if rows_N is not None:
            sum_TD, batch = sum_TD.index_select(0, rows_N), batch.narrowed()
        x_TD, sum_TD = self.mlp_norm(x_TD, sum_TD, delta_TD)
        x_TD, delta_TD = self.mlp(x_TD, batch)
        return x_TD, delta_TD, sum_TD


class Decoder(nn.Module):
    """Embedding, layers, norm, LM head. Weights are uninitialised until ``models/weights.py`` has filled them.

    Module paths (``layers.3.attention.qkv_proj``) are those of ``ModelSpec.lora_sites``: LoRA layers take the place of
    these modules. With tied embeddings the LM head holds the embedding's own parameter.
    """

    def __init__(
        self, spec: ModelSpec, placement: Placement, attention: AttentionBackend, ops: Ops
    ) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = VocabEmbedding(spec.vocab_size, spec.hidden_size, placement, ops.embed)
        self.layers = nn.ModuleList(
            DecoderLayer(layer, spec, placement, ops, attention) for layer in range(spec.num_layers)
        )
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, placement, ops.rms_norm)
        vocab = column(placement.tp, Part(spec.vocab_size, placement.tp.size))
        self.lm_head = Linear(spec.hidden_size, vocab, placement, bias=False, gather_output=True)
        self._rotary = RotaryEmbedding(
            spec.rope, spec.head_dim, placement.device, spec.max_context_length
        )
        self._begin: Callable[[ForwardBatch], None] | None = None

    def on_begin(self, begin: Callable[[ForwardBatch], None]) -> None:
        """Call ``begin`` with every batch before its first layer, in whatever way the batch is run, and so in the CUDA
        graph of its pass."""
        self._begin = begin

    def tie(self) -> None:
        """Let the LM head be the embedding table."""
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Logits of the rows that are wanted, [N, V] in the weights' type; stores the step's keys and values in
        ``batch.kv``."""
        return self.lm_head(self._states(batch, batch.logits_rows_N), batch)

    def wanted_states(self, batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What :meth:`head` makes logits of, [N, D], and the states of the rows that are pooled, [P, D], if any.

        Together with :meth:`head` this is :meth:`forward`, for steps whose logits are computed in pieces.
        """
        if batch.pooled_rows_P is None:
            return self._states(batch, batch.logits_rows_N), None
        assert batch.logits_rows_N is not None
        x_TD = self._states(batch)
        return (
            x_TD.index_select(0, batch.logits_rows_N),
            x_TD.index_select(0, batch.pooled_rows_P),
        )

    def head(self, x_ND: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """Logits of states behind the final norm, [N, D] -> [N, V]; of ``batch`` only ``lora.logits`` counts."""
        return self.lm_head(x_ND, batch)

    def forward_pooled(self, batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`forward`, and the states behind the final norm of the rows that are pooled, [P, D]."""
        assert batch.logits_rows_N is not None
        assert batch.pooled_rows_P is not None
        x_TD = self._states(batch)
        logits_NV = self.lm_head(x_TD.index_select(0, batch.logits_rows_N), batch)
        return logits_NV, x_TD.index_select(0, batch.pooled_rows_P)

    def _states(self, batch: ForwardBatch, rows_N: torch.Tensor | None = None) -> torch.Tensor:
        """States behind the final norm, [T, D]; of ``batch.logits_rows_N`` alone if those are given, [N, D]."""
        if self._begin is not None:
            self._begin(batch)
        cos_sin_TH = self._rotary.cos_sin(batch)
        x_TD: torch.Tensor = self.embed_tokens(batch)
        delta_TD: torch.Tensor | None = None
        residual_TD: torch.Tensor | None = None
        last = self.layers[-1]
        for layer in self.layers:
            rows = rows_N if layer is last else None
            x_TD, delta_TD, residual_TD = layer(
                x_TD, delta_TD, residual_TD, cos_sin_TH, batch, rows
            )
        return self.norm(x_TD, residual_TD, delta_TD)[0]
