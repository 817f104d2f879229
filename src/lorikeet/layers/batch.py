"""The inputs of one forward pass, as an argument of every layer: there is no global context.

Shape legend: T tokens of the step, N rows of T whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorikeet.attention.base import AttentionInputs
from lorikeet.kv.storage import KVStorage
from lorikeet.ops.lora.metadata import LoRABatch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForwardBatch:
    """What a step computes.

    Attributes:
        input_ids_T, positions_T: int64; tokens of a sequence are consecutive rows.
        logits_rows_N: int64; rows of T whose logits are wanted, in the order of the result. May repeat.
        lora: which row uses which adapter; None if all rows are the base model's.
        rope_lengths_T: int64; only for models whose frequencies depend on the sequence's length (``dynamic``), and only
            needed when a sequence is longer than ``max_position``: for each token the length that it is rotated for.
    """

    input_ids_T: torch.Tensor
    positions_T: torch.Tensor
    attn: AttentionInputs
    kv: KVStorage
    logits_rows_N: torch.Tensor
    lora: LoRABatch | None = None
    rope_lengths_T: torch.Tensor | None = None
