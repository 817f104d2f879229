"""Where LoRA enters the model: layers that compose a base layer and add the adapters' delta to its local output.

Shape legend: T tokens of the step, N rows whose logits are wanted, D input features, O output features, as this rank
holds them.

The delta is added between ``local`` and ``finish`` of the base layer, so a row-parallel layer (and a divided embedding)
needs no second all-reduce: each rank adds the part of the delta that its share of A makes, and one sum completes both.

In captured decode steps (``LoRABatch.is_beside``) the delta is computed while the base layer's matmul runs on a stream of
its own, and where nothing reduces in between it is not added at all: it travels beside the output to the op that
reads that next (:meth:`LoRALinear.forward_split`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from lorikeet.layers.batch import ForwardBatch
from lorikeet.layers.linear import ShardRule
from lorikeet.ops.activation import SiluMulOp
from lorikeet.ops.lora.api import LoRABackend
from lorikeet.ops.lora.metadata import AdapterRows, LoRABatch, SiteTable


class SplitLayer(Protocol):
    """A base layer whose communication is a step of its own."""

    rule: ShardRule

    def local(self, x: torch.Tensor, /) -> torch.Tensor:
        """This rank's part of the output; a new tensor."""
        ...

    def finish(self, y: torch.Tensor, /) -> torch.Tensor:
        """The whole output from every rank's part."""
        ...


class LoRAStreams:
    """The stream on which base layers run beside their deltas; its work is ordered, so one serves all layers."""

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)
        self._forked = torch.cuda.Event()
        self._joined = torch.cuda.Event()

    def fork(self) -> None:
        """What is queued on the current stream from now on may run beside what :meth:`beside` queues."""
        self._forked.record()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is queued inside runs behind everything that was queued before the last :meth:`fork`.

        Tensors made inside may be freed after :meth:`join`: their memory serves this stream again only behind the next
        fork, which is behind whatever read them.
        """
        self._side.wait_event(self._forked)
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        """The current stream waits for what was queued beside it."""
        self._joined.record(self._side)
        torch.cuda.current_stream().wait_event(self._joined)


class LoRALinear(nn.Module):
    """A linear layer with adapters.

    Args:
        base: the layer to compose, of any sharding.
        table: page tables of this site in the device pool.
        reads_logits_rows: True for the LM head, which sees only the rows whose logits are wanted.
        streams: None computes deltas in line.
    """

    def __init__(
        self,
        base: SplitLayer,
        table: SiteTable,
        backend: LoRABackend[Any, Any],
        *,
        reads_logits_rows: bool = False,
        streams: LoRAStreams | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self._table = table
        self._backend = backend
        self._reads_logits_rows = reads_logits_rows
        self._streams = streams
        self._out_features = base.rule.local_offsets()[-1]
        # What ``finish`` sums or gathers has to hold the delta already.
        self._may_travel = base.rule.size == 1 or base.rule.kind == "column"

    def forward(self, x_TD: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """[T, D] -> [T, O] (before ``finish``); N rows in place of T for the LM head."""
        y_TO, delta_TO = self.forward_split(x_TD, batch)
        return y_TO if delta_TO is None else y_TO.add_(delta_TO)

    def forward_split(
        self, x_TD: torch.Tensor, batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """:meth:`forward` as (y, delta), to be added by whoever reads y next; None if nothing is left to add."""
        lora = batch.lora
        if lora is None:
            return self.base.finish(self.base.local(x_TD)), None
        rows = self._rows(lora)
        if not lora.is_beside or self._reads_logits_rows:
            h = self._backend.shrink(x_TD, self._table, rows)
            y_TO = self.base.local(x_TD)
            self._backend.expand_(y_TO, h, self._table, rows)
            return self.base.finish(y_TO), None
        y_TO, delta_TO = self._local_beside(x_TD, rows)
        if self._may_travel:
            return self.base.finish(y_TO), delta_TO
        return self.base.finish(y_TO.add_(delta_TO)), None

    def forward_gated(
        self, x_TD: torch.Tensor, batch: ForwardBatch, silu_mul: SiluMulOp
    ) -> torch.Tensor:
        """``silu_mul`` of :meth:`forward`, [T, D] -> [T, O / 2]; column layers only."""
        lora = batch.lora
        if lora is None or lora.is_beside:
            return silu_mul(*self.forward_split(x_TD, batch))
        # One pass over a long prompt's y in place of two.
        h = self._backend.shrink(x_TD, self._table, lora.tokens)
        return self._backend.silu_mul(self.base.local(x_TD), h, self._table, lora.tokens)

    def _local_beside(
        self, x_TD: torch.Tensor, rows: AdapterRows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._streams is None:
            delta_TO = self._delta(x_TD, rows)
            return self.base.local(x_TD), delta_TO
        # The delta stays on the current stream: there its first kernel may begin before x is done (``ops/triton/early.py``),
        # which it could not behind the event that the other stream waits for.
        self._streams.fork()
        delta_TO = self._delta(x_TD, rows)
        with self._streams.beside():
            y_TO = self.base.local(x_TD)
        self._streams.join()
        return y_TO, delta_TO

    def _delta(self, x_TD: torch.Tensor, rows: AdapterRows) -> torch.Tensor:
        h = self._backend.shrink(x_TD, self._table, rows)
        delta_TO = x_TD.new_empty((x_TD.shape[0], self._out_features))
        self._backend.expand_into(delta_TO, h, self._table, rows)
        return delta_TO

    def _rows(self, lora: LoRABatch) -> AdapterRows:
        return lora.logits if self._reads_logits_rows else lora.tokens


class LoRAEmbedding(nn.Module):
    """A token embedding with adapters: A is indexed by token id."""

    def __init__(self, base: SplitLayer, table: SiteTable, backend: LoRABackend[Any, Any]) -> None:
        super().__init__()
        self.base = base
        self._table = table
        self._backend = backend

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """The vectors of the batch's tokens, [T, D]."""
        ids_T = batch.token_ids()
        y_TD = self.base.local(ids_T)
        if batch.lora is not None:
            rows = batch.lora.tokens
            h = self._backend.gather(ids_T, self._table, rows)
            self._backend.expand_(y_TD, h, self._table, rows)
        return self.base.finish(y_TD)
