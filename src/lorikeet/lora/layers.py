"""Where LoRA enters the model: layers that compose a base layer and add the adapters' delta to its local output.

Shape legend: T tokens of the step, N rows whose logits are wanted, D input features, O output features, as this rank
holds them.

The delta is added between ``local`` and ``finish`` of the base layer, so a row-parallel layer (and a divided embedding)
needs no second all-reduce: each rank adds the part of the delta that its share of A makes, and one sum completes both.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from lorikeet.layers.batch import ForwardBatch
from lorikeet.ops.lora.api import LoRABackend
from lorikeet.ops.lora.metadata import LoRABatch, RowGroup, SiteTable


class SplitLayer(Protocol):
    """A base layer whose communication is a step of its own."""

    def local(self, x: torch.Tensor, /) -> torch.Tensor:
        """This rank's part of the output; a new tensor."""
        ...

    def finish(self, y: torch.Tensor, /) -> torch.Tensor:
        """The whole output from every rank's part."""
        ...


class LoRALinear(nn.Module):
    """A linear layer with adapters.

    Args:
        base: the layer to compose, of any sharding.
        table: page tables of this site in the device pool.
        reads_logits_rows: True for the LM head, which sees only the rows whose logits are wanted.
    """

    def __init__(
        self,
        base: SplitLayer,
        table: SiteTable,
        backend: LoRABackend[Any],
        *,
        reads_logits_rows: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        self._table = table
        self._backend = backend
        self._reads_logits_rows = reads_logits_rows

    def forward(self, x_TD: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """[T, D] -> [T, O] (before ``finish``); N rows in place of T for the LM head."""
        y_TO = self.base.local(x_TD)
        if batch.lora is not None:
            groups = self._groups(batch.lora)
            self._backend.delta_(y_TO, x_TD, self._table, groups)
        return self.base.finish(y_TO)

    def _groups(self, lora: LoRABatch) -> tuple[RowGroup, ...]:
        return lora.logits if self._reads_logits_rows else lora.tokens


class LoRAEmbedding(nn.Module):
    """A token embedding with adapters: A is indexed by token id."""

    def __init__(self, base: SplitLayer, table: SiteTable, backend: LoRABackend[Any]) -> None:
        super().__init__()
        self.base = base
        self._table = table
        self._backend = backend

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """The vectors of the batch's tokens, [T, D]."""
        ids_T = batch.token_ids()
        y_TD = self.base.local(ids_T)
        if batch.lora is not None:
            groups = batch.lora.tokens
            h = self._backend.gather(ids_T, self._table, groups)
            self._backend.expand_(y_TD, h, self._table, groups)
        return self.base.finish(y_TD)
