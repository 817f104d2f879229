"""Token ids to vectors, where some ids are known to the device alone.

Shape legend: T tokens, V token ids, D features, L lanes: one place per running sequence for the token it sampled last.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional


class EmbedOp(Protocol):
    """Looks the vectors of token ids up. Semantics::

        ids = where(ids >= 0, ids, tokens[-1 - ids])      # only with tokens
        return table[ids]

    An id below 0 stands for a token that an earlier step sampled and the host has not seen: id -1 is the token in lane
    0, id -2 the one in lane 1. Without ``tokens`` every id is at least 0. ``ids`` and ``tokens`` are int32 or int64;
    the result is [T, D] in the dtype of ``table``. No operand is written to.
    """

    def __call__(
        self,
        ids_T: torch.Tensor,
        table_VD: torch.Tensor,
        tokens_L: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


def embed_torch(
    ids_T: torch.Tensor, table_VD: torch.Tensor, tokens_L: torch.Tensor | None = None
) -> torch.Tensor:
    """Torch form of :class:`EmbedOp`."""
    if tokens_L is not None:
        # Known ids look up lane 0 and drop what they find, so that nothing waits to learn which ids are known.
        sampled_T = tokens_L.index_select(0, (-1 - ids_T).clamp(min=0))
        ids_T = torch.where(ids_T >= 0, ids_T, sampled_T)
    return functional.embedding(ids_T, table_VD)
