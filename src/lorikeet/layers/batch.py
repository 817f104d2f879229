"""The inputs of one forward pass, as an argument of every layer: there is no global context.

Shape legend: T tokens of the step, N rows of T whose logits are wanted, P rows of T that are pooled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lorikeet.attention.base import AttentionInputs
from lorikeet.kv.storage import KVStorage
from lorikeet.ops.lora.metadata import LoRABatch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForwardBatch:
    """The inputs of a step.

    Attributes:
        input_ids_T: tokens of a sequence are consecutive rows. An id below 0 is a token that an earlier step sampled
            and that the host need not know yet: ``sampled_L[-1 - id]``.
        positions_T: of the tokens in their sequences.
        sampled_L: the newest sampled token of each lane (``worker/inputs.py``); None if every id is known.
        logits_rows_N: rows of T whose logits are wanted, in the order of the result. May repeat. None: all rows.
        pooled_rows_P: rows of T whose states behind the final norm are wanted, for ``Decoder.forward_pooled``.
        lora: which row uses which adapter; None if all rows are the base model's.
    """

    input_ids_T: torch.Tensor
    positions_T: torch.Tensor
    attn: AttentionInputs
    kv: KVStorage
    logits_rows_N: torch.Tensor | None
    sampled_L: torch.Tensor | None = None
    pooled_rows_P: torch.Tensor | None = None
    lora: LoRABatch | None = None

    def token_ids(self) -> torch.Tensor:
        """``input_ids_T`` with every id known, [T]."""
        if self.sampled_L is None:
            return self.input_ids_T
        ids_T = self.input_ids_T
        sampled_T = self.sampled_L.index_select(0, (-1 - ids_T).clamp_min(0))
        return torch.where(ids_T < 0, sampled_T.to(ids_T.dtype), ids_T)

    def narrowed(self) -> ForwardBatch:
        """The batch for what follows the last attention: it sees only the rows of T whose logits are wanted."""
        if self.lora is None:
            return self
        return replace(self, lora=replace(self.lora, tokens=self.lora.logits))
