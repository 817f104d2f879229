"""An attention backend that can be left out of a forward pass, so that the rest can be captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lorikeet.attention.base import AttentionBackend, AttentionInputs
from lorikeet.kv.storage import KVStorage


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One layer's call: the arguments of :meth:`AttentionBackend.forward` that do not depend on the step."""

    q_TQH: torch.Tensor
    k_TKH: torch.Tensor
    v_TKH: torch.Tensor
    layer: int
    window: int | None


# Is called instead of the backend; returns [T, Q, H], contiguous.
Attend = Callable[[AttentionCall], torch.Tensor]


class CutAttention:
    """A backend whose calls can be led elsewhere for a while."""

    def __init__(self, backend: AttentionBackend) -> None:
        self.backend = backend
        self._instead: Attend | None = None

    @property
    def name(self) -> str:
        return self.backend.name

    def storage_head_dim(self, head_dim: int) -> int:
        return self.backend.storage_head_dim(head_dim)

    def graph_kv_lens(self, bucket: int, longest: int) -> tuple[int, ...]:
        return self.backend.graph_kv_lens(bucket, longest)

    def prepare(self, inputs: AttentionInputs) -> None:
        self.backend.prepare(inputs)

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
        if self._instead is None:
            return self.backend.forward(q_TQH, k_TKH, v_TKH, kv, layer, inputs, window)
        return self._instead(AttentionCall(q_TQH, k_TKH, v_TKH, layer, window))

    @contextmanager
    def cut(self, instead: Attend) -> Iterator[None]:
        """Calls go to ``instead`` as long as the context lasts."""
        self._instead = instead
        try:
            yield
        finally:
            self._instead = None
