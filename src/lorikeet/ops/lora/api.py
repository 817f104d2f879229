"""The contract that every LoRA backend meets.

Shape legend: T rows of the activation, K input features, O output features of a site, R rank.

For a row t that uses slot s, and a slice j of the site at output features [o, o + O_j)::

    shrink:   h[t, j]             = A[s, j] @ x[t]                          R[s, j] numbers
    gather:   h[t, j]             = A[s, j][:, ids[t] - in_start]           0 if this rank does not hold the token
    expand_:  y[t, o : o + O_j]  += scale[s, j] * B[s, j] @ h[t, j]
    expand_into:  out = 0; expand_(out, h)
    silu_mul: silu_mul(expand_(y, h))                                       of a packed gate and up

Sums are taken in float32 and y is rounded to its own type once. Rows that use no adapter, and slices in which a slot has
rank 0, are not touched. The halves are separate because shrink needs only x: it can run beside the base layer's matmul.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

from lorikeet.ops.lora.metadata import LoRABatch, SiteTable

# The form in which a backend takes the rows of each adapter: row groups, or tiles.
Rows = TypeVar("Rows", contravariant=True)
Shrunk = TypeVar("Shrunk")


class LoRABackend(Protocol[Rows, Shrunk]):
    """Adds low-rank deltas to the outputs of base layers. ``Shrunk`` is the backend's own form of h.

    Every site calls ``shrink`` or ``gather`` at most once between two calls of ``begin``.
    """

    def begin(self, batch: LoRABatch) -> None:
        """Prepare a forward pass: all calls until the next ``begin`` are about the rows of ``batch``."""
        ...

    def shrink(self, x_TK: torch.Tensor, site: SiteTable, rows: Rows, /) -> Shrunk:
        """Compute h of a linear site; does not change x."""
        ...

    def gather(self, ids_T: torch.Tensor, site: SiteTable, rows: Rows, /) -> Shrunk:
        """Compute h of an embedding site."""
        ...

    def expand_(self, y_TO: torch.Tensor, h: Shrunk, site: SiteTable, rows: Rows, /) -> None:
        """Add the delta to ``y_TO`` in place; ``rows`` are those that made ``h``."""
        ...

    def expand_into(self, out_TO: torch.Tensor, h: Shrunk, site: SiteTable, rows: Rows, /) -> None:
        """Write the delta alone: zeros for rows and features that no adapter changes."""
        ...

    def silu_mul(
        self, y_T2I: torch.Tensor, h: Shrunk, site: SiteTable, rows: Rows, /
    ) -> torch.Tensor:
        """Compute silu(gate) * up of y plus the delta, [T, I]; y may be written to."""
        ...
