"""Linear layers that know their shard.

One class serves plain, packed, column- and row-parallel layers: what differs is a value, the :class:`ShardRule`. LoRA
slices its A and B by the same rule.

Shape legend: D input features, O output features, of this rank; leading dimensions are free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from lorikeet.layers.batch import ForwardBatch
from lorikeet.ops.activation import SiluMulOp
from lorikeet.parallel.group import TPGroup


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a layer's tensors live."""

    tp: TPGroup
    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int) -> nn.Parameter:
        """An uninitialised weight; loading fills it."""
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        return nn.Parameter(tensor, requires_grad=False)


@dataclass(frozen=True, slots=True)
class Part:
    """One module of the checkpoint inside a packed layer.

    Attributes:
        features: its output features, over all ranks.
        num_shards: into how many pieces a column layer cuts it. Fewer than ranks means that neighbouring ranks hold
            the same piece (key/value heads when there are more ranks than heads).
    """

    features: int
    num_shards: int


@dataclass(frozen=True, slots=True)
class ShardRule:
    """Which piece of a layer a rank holds. Ranges are half-open and count features of the whole layer.

    ``column``: the output features are divided, part by part; every rank sees the whole input. ``row``: the input
    features are divided; the ranks' outputs are summed. ``replicated``: nothing is divided.
    """

    kind: Literal["column", "row", "replicated"]
    rank: int
    size: int
    parts: tuple[Part, ...]

    def output_range(self, part: int) -> tuple[int, int]:
        """This rank's output features of a part, counted from the part's first."""
        whole = self.parts[part]
        if self.kind != "column":
            return 0, whole.features
        per_shard = _divide(whole.features, whole.num_shards)
        shard = self.rank * whole.num_shards // self.size
        return shard * per_shard, (shard + 1) * per_shard

    def input_range(self, in_features: int) -> tuple[int, int]:
        """This rank's piece of the whole layer's ``in_features``."""
        if self.kind != "row":
            return 0, in_features
        per_rank = _divide(in_features, self.size)
        return self.rank * per_rank, (self.rank + 1) * per_rank

    def local_offsets(self) -> tuple[int, ...]:
        """Where each part begins in this rank's output, and where the last one ends."""
        offsets = [0]
        for part in range(len(self.parts)):
            start, stop = self.output_range(part)
            offsets.append(offsets[-1] + stop - start)
        return tuple(offsets)


def _divide(features: int, pieces: int) -> int:
    if features % pieces:
        raise ValueError(f"{features} features cannot be divided into {pieces} equal pieces")
    return features // pieces


class Linear(nn.Module):
    """``y = x W^T + b``, sharded by ``rule``.

    ``local`` is what one rank computes alone; ``finish`` is what the group adds to it. A LoRA delta belongs between the
    two, so that a row-parallel layer still reduces once.

    Args:
        in_features: of the whole layer.
        gather_output: column layers only: ``finish`` returns the whole output on every rank.
    """

    def __init__(
        self,
        in_features: int,
        rule: ShardRule,
        placement: Placement,
        *,
        bias: bool,
        gather_output: bool = False,
    ) -> None:
        super().__init__()
        self.rule = rule
        self.in_features = in_features
        self._tp = placement.tp
        self._gather_output = gather_output
        start, stop = rule.input_range(in_features)
        num_outputs = rule.local_offsets()[-1]
        self.weight = placement.empty(num_outputs, stop - start)
        self.bias = placement.empty(num_outputs) if bias else None
        # The bias of a row layer is added once, after the sum over the ranks.
        self._bias_after_sum = rule.kind == "row" and rule.size > 1

    def local(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of the output: [..., D] -> [..., O]."""
        return functional.linear(x, self.weight, None if self._bias_after_sum else self.bias)

    def finish(self, y: torch.Tensor) -> torch.Tensor:
        """The output that the next layer sees, from :meth:`local`'s (plus a delta). May write into ``y``."""
        if self.rule.size == 1:
            return y
        if self.rule.kind == "row":
            y = self._tp.all_reduce(y)
            return y if self.bias is None else y + self.bias
        return self._tp.all_gather(y, -1) if self._gather_output else y

    def forward(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        return self.finish(self.local(x))

    def forward_split(self, x: torch.Tensor, batch: ForwardBatch) -> tuple[torch.Tensor, None]:
        """:meth:`forward`, and the delta that whoever reads the output has to add: none here (see ``lora/layers.py``)."""
        return self.forward(x, batch), None

    def forward_gated(
        self, x: torch.Tensor, batch: ForwardBatch, silu_mul: SiluMulOp
    ) -> torch.Tensor:
        """``silu_mul`` of :meth:`forward`, for packed gate and up projections."""
        return silu_mul(self.forward(x, batch))

    @torch.no_grad()
    def load_part(self, name: str, part: int, whole: torch.Tensor) -> None:
        """Copy this rank's piece of a checkpoint tensor.

        Args:
            name: ``weight`` or ``bias``.
            part: which of the packed modules the tensor belongs to.
            whole: the tensor of the whole module; any floating dtype.
        """
        begin, end = self.rule.local_offsets()[part : part + 2]
        piece = whole[slice(*self.rule.output_range(part))]
        if name == "weight":
            piece = piece[:, slice(*self.rule.input_range(self.in_features))]
        self.get_parameter(name)[begin:end].copy_(piece)


def column(tp: TPGroup, *parts: Part) -> ShardRule:
    """Rule of a layer whose output features are divided over the ranks."""
    return ShardRule("column", tp.rank, tp.size, parts)


def row(tp: TPGroup, out_features: int) -> ShardRule:
    """Rule of a layer whose input features are divided over the ranks."""
    return ShardRule("row", tp.rank, tp.size, (Part(out_features, 1),))
