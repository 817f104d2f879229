"""The ranks that compute one model together, as a layer sees them."""

from __future__ import annotations

from typing import Protocol

import torch


class TPGroup(Protocol):
    """A tensor-parallel group. Collectives are called by every rank in the same order.

    Attributes:
        rank: this process' number, from 0.
        size: how many ranks there are.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks. May write into ``tensor``; only the returned tensor is the sum."""
        ...

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The ranks' tensors, concatenated along ``dim`` in rank order."""
        ...


class SingleRank:
    """A group of one: every collective is the identity."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor
