"""The contract that every LoRA backend meets.

Shape legend: T rows of the activation, K input features, O output features of a site, R rank.

For a row t that uses slot s, and a slice j of the site at output features [o, o + O_j)::

    shrink:   h[t, j]             = A[s, j] @ x[t]                          R[s, j] numbers
    gather:   h[t, j]             = A[s, j][:, ids[t] - in_start]           0 if this rank does not hold the token
    expand_:  y[t, o : o + O_j]  += scale[s, j] * B[s, j] @ h[t, j]
    delta_:   expand_(y, shrink(x))

Sums are taken in float32 and y is rounded to its own type once. Rows in no group, and slices in which a slot has rank
0, are not touched. The two halves are separate because shrink needs only x: it can run beside the base layer's matmul.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch

from lorikeet.ops.lora.metadata import RowGroup, SiteTable

Shrunk = TypeVar("Shrunk")


class LoRABackend(Protocol[Shrunk]):
    """Adds low-rank deltas to the outputs of base layers. ``Shrunk`` is the backend's own form of h."""

    def shrink(self, x_TK: torch.Tensor, site: SiteTable, groups: Sequence[RowGroup]) -> Shrunk:
        """h of a linear site; does not change x. Valid until the next call of the same backend."""
        ...

    def gather(self, ids_T: torch.Tensor, site: SiteTable, groups: Sequence[RowGroup]) -> Shrunk:
        """h of an embedding site."""
        ...

    def expand_(
        self, y_TO: torch.Tensor, h: Shrunk, site: SiteTable, groups: Sequence[RowGroup]
    ) -> None:
        """Add the delta to ``y_TO`` in place; ``groups`` are those that made ``h``."""
        ...

    def delta_(
        self, y_TO: torch.Tensor, x_TK: torch.Tensor, site: SiteTable, groups: Sequence[RowGroup]
    ) -> None:
        """Add the delta of a linear site to ``y_TO`` in place."""
        ...
