"""The table of token embeddings, divided over the ranks by token id.

Shape legend: T tokens, V token ids of this rank, D features.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from lorikeet.layers.batch import ForwardBatch
from lorikeet.layers.linear import Placement, row
from lorikeet.ops.embedding import EmbedOp, embed_torch


class VocabEmbedding(nn.Module):
    """Token ids to vectors.

    A look-up is a linear layer whose input is one-hot, so it is sharded like a row layer: each rank contributes the
    tokens that it holds and zeros for the others, and the contributions are summed.
    """

    def __init__(
        self,
        vocab_size: int,
        features: int,
        placement: Placement,
        embed: EmbedOp = embed_torch,
    ) -> None:
        super().__init__()
        self._embed = embed
        self.rule = row(placement.tp, features)
        self.in_features = vocab_size
        self._tp = placement.tp
        self._first, self._last = self.rule.input_range(vocab_size)
        self.weight = placement.empty(self._last - self._first, features)

    def local(self, ids_T: torch.Tensor) -> torch.Tensor:
        """This rank's contribution, [T, D], of ids that are all known."""
        if self.rule.size == 1:
            return functional.embedding(ids_T, self.weight)
        is_ours_T = (ids_T >= self._first) & (ids_T < self._last)
        rows_T = torch.where(is_ours_T, ids_T - self._first, 0)
        return functional.embedding(rows_T, self.weight) * is_ours_T.unsqueeze(-1)

    def finish(self, y_TD: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks. May write into ``y_TD``."""
        return self._tp.all_reduce(y_TD) if self.rule.size > 1 else y_TD

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """The vectors of the batch's tokens, [T, D]."""
        if self.rule.size == 1:
            return self._embed(batch.input_ids_T, self.weight, batch.sampled_L)
        return self.finish(self.local(batch.token_ids()))

    @torch.no_grad()
    def load_part(self, name: str, part: int, whole: torch.Tensor) -> None:
        """Copy this rank's rows of the checkpoint's table (see :meth:`Linear.load_part`)."""
        assert (name, part) == ("weight", 0)
        self.weight.copy_(whole[self._first : self._last])
