"""Tiles of rows, and a Triton backend beside the reference, for tests of LoRA kernels.

Shape legend: T rows, K input features, O output features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lorikeet.ops.lora import reference
from lorikeet.ops.lora.cutting import RowRuns, cut_tiles, padded
from lorikeet.ops.lora.metadata import LoRABatch, Tiles
from lorikeet.ops.lora.triton.backend import TritonBackend
from tests.support.lora_tables import PAGE_RANKS, RandomSite, add_delta_, groups_of
from tests.support.numerics import ROUNDING, assert_close

# h is rounded to the adapter's type for the second product, the delta once more when it is written by itself.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def tiles_of(
    slot_T: Sequence[int],
    block: int,
    *,
    by_adapter: bool = True,
    num_tiles: int | None = None,
    device: str = "cpu",
) -> Tiles:
    """Tiles of rows with the given slots, each a sequence of one token."""
    slots_T = np.asarray(slot_T, dtype=np.int64)
    runs = RowRuns(slots_T, np.ones_like(slots_T))
    tiles = cut_tiles(runs, block, by_adapter=by_adapter)
    if num_tiles is not None:
        tiles = padded(tiles, num_tiles)
    slot_J, rows_JM = (
        torch.from_numpy(array).to(device) for array in (tiles.slot_J, tiles.rows_JM)
    )
    return Tiles(slot_J, rows_JM, len(slot_T), tiles.num_used if num_tiles is None else num_tiles)


class KernelCase:
    """One site, its rows, and what the kernels make of them.

    Args:
        slot_T: adapter slot of each row.
        beside: as in a captured step: deltas are written by themselves too.
        num_tiles: with tiles that pad, of which any might have an adapter.
    """

    def __init__(
        self,
        site: RandomSite,
        slot_T: Sequence[int],
        *,
        block: int = 16,
        by_adapter: bool = True,
        beside: bool = False,
        num_tiles: int | None = None,
        deterministic: bool = False,
    ) -> None:
        self.site, self.slot_T, self._beside = site, list(slot_T), beside
        pool_E = site.table.slices[0].pool_E
        self.dtype, self.device = pool_E.dtype, pool_E.device
        self.tiles = tiles_of(
            slot_T,
            block,
            by_adapter=by_adapter,
            num_tiles=num_tiles,
            device=self.device.type,
        )
        self.backend = TritonBackend(
            site.page_table, page_ranks=PAGE_RANKS, deterministic=deterministic
        )
        self.begin()

    def begin(self) -> None:
        batch = LoRABatch(self.tiles, self.tiles, is_beside=self._beside)
        self.backend.begin(batch)

    def add(self, y_TO: torch.Tensor, x_TK: torch.Tensor) -> torch.Tensor:
        """A copy of y with the delta."""
        y_TO = y_TO.clone()
        add_delta_(self.backend, y_TO, x_TK, self.site.table, self.tiles)
        return y_TO

    def alone(self, x_TK: torch.Tensor, out_features: int) -> torch.Tensor:
        """The delta by itself, in memory that held NaN."""
        out_TO = torch.full(
            (len(x_TK), out_features), torch.nan, dtype=self.dtype, device=self.device
        )
        h = self.backend.shrink(x_TK, self.site.table, self.tiles)
        self.backend.expand_into(out_TO, h, self.site.table, self.tiles)
        return out_TO

    def gated(self, y_T2I: torch.Tensor, x_TK: torch.Tensor) -> torch.Tensor:
        """silu-mul of y plus the delta."""
        h = self.backend.shrink(x_TK, self.site.table, self.tiles)
        return self.backend.silu_mul(y_T2I, h, self.site.table, self.tiles)

    def expected(self, y_TO: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y plus the delta by the reference, in float32; on a GPU by dense matmuls in float64, which are faster."""
        if self.device.type != "cpu":
            return self._dense(y_TO, x)
        groups = groups_of(self.slot_T, gathered=True)
        return reference.delta(y_TO.float(), x, self.site.table, groups)

    def _dense(self, y_TO: torch.Tensor, x_TK: torch.Tensor) -> torch.Tensor:
        y_TO, slot_T = y_TO.double(), torch.tensor(self.slot_T, device=self.device)
        for (slot, part), (A_RK, B_OR, scale) in self.site.weights.items():
            rows = (slot_T == slot).nonzero()[:, 0]
            table = self.site.table.slices[part]
            out = slice(table.offset, table.offset + table.out_features)
            A_RK, B_OR = A_RK.to(self.device).double(), B_OR.to(self.device).double()
            y_TO[rows, out] += scale * (x_TK[rows].double() @ A_RK.T) @ B_OR.T
        return y_TO.float()

    def check(self, x_TK: torch.Tensor, y_TO: torch.Tensor) -> None:
        """Every row, added to y and, in a captured step, alone."""
        zeros_TO = torch.zeros_like(y_TO)
        delta_TO = self.expected(zeros_TO, x_TK)
        got_TO = self.add(y_TO, x_TK)
        bound = TOLERANCES[self.dtype] * delta_TO.norm() + ROUNDING[self.dtype] * y_TO.norm()
        error = (got_TO.float() - y_TO.float() - delta_TO).norm()
        assert error <= bound, f"relative error {error / bound:.2f} of the allowed"
        untouched_TO = delta_TO == 0
        assert torch.equal(got_TO[untouched_TO], y_TO[untouched_TO])
        if self._beside:
            self.begin()
            alone_TO = self.alone(x_TK, y_TO.shape[1])
            assert_close("delta", alone_TO.float(), delta_TO, TOLERANCES[self.dtype])
            assert not alone_TO[untouched_TO].any()
