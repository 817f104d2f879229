"""Rows that decode, by a kernel of our own: where no library comes near the device's bandwidth (docs/decisions/0013).

Shape legend: N sequences, Q query heads, K key/value heads, W head size as it is stored, B pages of the storage, S places
of a page.
"""

from __future__ import annotations

import torch

from lorikeet.attention.base import AttentionInputs
from lorikeet.attention.flashinfer_plan import Shape
from lorikeet.ops.triton.attention import decode_attention_triton


class TritonDecode:
    """See :class:`lorikeet.attention.flashinfer.RowDecoder`; any number of keys, nothing to prepare."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def graph_kv_lens(self, bucket: int, longest: int) -> tuple[int, ...]:
        del bucket
        return (longest,)

    def prepare(self, inputs: AttentionInputs) -> None:
        del inputs

    def run(
        self,
        q_NQW: torch.Tensor,
        kv_BSKW: tuple[torch.Tensor, torch.Tensor],
        inputs: AttentionInputs,
        window: int | None,
        out_NQW: torch.Tensor,
    ) -> None:
        first = inputs.num_chunks
        decode_attention_triton(
            q_NQW,
            kv_BSKW,
            inputs.page_table_NP[first:],
            inputs.kv_lens_N[first:],
            self._shape.scale,
            window,
            out_NQW,
        )
