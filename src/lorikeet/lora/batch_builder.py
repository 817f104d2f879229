"""From the rows of a step to what a LoRA backend is told: groups of rows for matmuls, tiles for kernels.

A plan is made on the host; its arrays travel to the device with the step's other inputs, in one copy.

Shape legend: T tokens of the step, N rows (chunks and decode rows) of the step, J tiles, M rows of a tile.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Literal, Protocol

import numpy as np
import torch

from lorikeet.lora.device_pool import DevicePool
from lorikeet.ops.lora.cutting import CutTiles, RowRuns, cut_tiles, most_tiles, padded
from lorikeet.ops.lora.metadata import LoRABatch, RowGroup, Tiles
from lorikeet.ops.lora.tiles import DECODE_BLOCK_ROWS, PREFILL_BLOCK_ROWS, prefill_block

# An adapter whose rows lie in more runs than this is gathered; below, one matmul per run is cheaper than the copy.
_MAX_RUNS = 2
# Tiles of a captured step that is not captured for the most it may need: one for each 16 rows, and a few that are not full.
_FEW_MORE_TILES = 7
# Captured steps with prompts of up to this many tokens compute deltas beside the base layers, in small tiles: their
# matmuls leave the device as idle as a decode step's do.
_BESIDE_TOKENS = 256
# Tiles of such a step beside those that its tokens fill.
_MORE_PROMPT_TILES = 64


class LoRAPlan(Protocol):
    """A step's LoRA inputs on the host.

    Attributes:
        arrays: what has to be copied to the device, int32; may be none.
    """

    @property
    def arrays(self) -> list[np.ndarray]: ...

    def batch(self, tensors: Sequence[torch.Tensor]) -> LoRABatch:
        """The inputs, from ``arrays`` on the device. Uses the tensors' memory."""
        ...


class BatchBuilder(Protocol):
    """Makes the plan of each step."""

    def plan(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        logits_rows: Sequence[int] | None,
    ) -> LoRAPlan | None:
        """Which rows use which adapter.

        Args:
            slots: adapter slot of each of the N rows, in batch order; 0 is the base model.
            lengths: tokens of each row.
            logits_rows: token numbers in [0, T) whose logits are wanted, in the order of the logits; None for all.

        Returns:
            None if every slot is 0: such a batch has no LoRA work at all.
        """
        ...


class LoRABatchBuilder:
    """Groups for matmuls: what the ``torch`` backend takes."""

    def __init__(self, pool: DevicePool, device: torch.device | None = None) -> None:
        self._num_slots = pool.num_slots
        self._device = device or torch.device("cpu")

    def plan(
        self, slots: Sequence[int], lengths: Sequence[int], logits_rows: Sequence[int] | None
    ) -> GroupPlan | None:
        """See :class:`BatchBuilder`."""
        if not any(slots):
            return None
        _check_slots(slots, self._num_slots)
        ends = list(accumulate(lengths))
        runs = zip(slots, [0, *ends[:-1]], ends, strict=True)
        tokens = self._group(runs)
        if logits_rows is None:
            return GroupPlan(LoRABatch(tokens=tokens, logits=tokens))
        logits_slots = (slots[bisect_right(ends, token)] for token in logits_rows)
        logits_runs = ((slot, row, row + 1) for row, slot in enumerate(logits_slots))
        return GroupPlan(LoRABatch(tokens=tokens, logits=self._group(logits_runs)))

    def _group(self, runs: Iterable[tuple[int, int, int]]) -> tuple[RowGroup, ...]:
        """Runs (slot, start, stop) in ascending order -> groups, by first appearance."""
        by_slot: dict[int, list[tuple[int, int]]] = {}
        for slot, start, stop in runs:
            if slot == 0 or start == stop:
                continue
            ranges = by_slot.setdefault(slot, [])
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            else:
                ranges.append((start, stop))
        groups: list[RowGroup] = []
        for slot, ranges in by_slot.items():
            if len(ranges) <= _MAX_RUNS:
                groups.extend(RowGroup(slot, start, stop) for start, stop in ranges)
            else:
                rows = [row for start, stop in ranges for row in range(start, stop)]
                index_T = torch.tensor(rows, dtype=torch.int64, device=self._device)
                groups.append(RowGroup(slot, rows[0], rows[-1] + 1, index_T))
        return tuple(groups)


class GroupPlan:
    """A plan whose groups are complete: nothing has to be copied."""

    def __init__(self, batch: LoRABatch) -> None:
        self._batch = batch

    @property
    def arrays(self) -> list[np.ndarray]:
        return []

    def batch(self, tensors: Sequence[torch.Tensor]) -> LoRABatch:
        assert not tensors
        return self._batch


class TileBatchBuilder:
    """Tiles for kernels: what ``triton`` and ``csgmv`` take.

    Args:
        backend: ``triton`` gives every sequence tiles of its own, ``csgmv`` every adapter.
        max_block: most rows of a tile; at least 16.
    """

    def __init__(
        self,
        pool: DevicePool,
        backend: Literal["triton", "csgmv"],
        *,
        max_block: int = PREFILL_BLOCK_ROWS,
    ) -> None:
        self._num_slots = pool.num_slots
        self._max_adapters = pool.layout.max_loras_per_batch
        self._max_block = max_block
        by_adapter = backend == "csgmv"
        self._cut = partial(cut_tiles, by_adapter=by_adapter)
        self._most = partial(most_tiles, by_adapter=by_adapter)

    def plan(
        self, slots: Sequence[int], lengths: Sequence[int], logits_rows: Sequence[int] | None
    ) -> TilePlan | None:
        """See :class:`BatchBuilder`: for a step that runs eagerly. Deltas are added to the base layers' outputs."""
        if not any(slots):
            return None
        runs = self._runs(slots, lengths)
        has_adapter_N = runs.slots_N > 0
        num_rows = int(runs.lengths_N[has_adapter_N].sum())
        num_adapters = len(np.unique(runs.slots_N[has_adapter_N]))
        block = prefill_block(num_rows, num_adapters, self._max_block)
        tokens = self._cut(runs, block)
        num_tokens = int(runs.lengths_N.sum())
        if logits_rows is None or np.array_equal(logits_rows, np.arange(num_tokens)):
            return TilePlan(tokens, num_tokens)
        logits = self._cut_rows(runs, logits_rows, DECODE_BLOCK_ROWS)
        return TilePlan(tokens, num_tokens, logits, len(logits_rows))

    def plan_decode(
        self, slots: Sequence[int], bucket: int, num_tiles: int | None = None
    ) -> TilePlan | None:
        """A step of one token for each row, padded to ``bucket`` rows, whose logits are all wanted: for a CUDA graph.
        Deltas are computed beside the base layers.

        Args:
            num_tiles: one of :meth:`tile_counts`, each of which has a graph of its own; None takes the least that fits.

        Returns:
            None if every slot is 0 and no number of tiles is given.
        """
        if num_tiles is None and not any(slots):
            return None
        padding = bucket - len(slots)
        runs = self._runs([*slots, 0], [1] * len(slots) + [padding])
        tiles = self._cut(runs, DECODE_BLOCK_ROWS)
        if num_tiles is None:
            num_tiles = next(n for n in self.tile_counts(bucket) if n >= len(tiles.slot_J))
        return TilePlan(padded(tiles, num_tiles), bucket, is_captured=True, is_beside=True)

    def tile_counts(self, bucket: int) -> tuple[int, ...]:
        """Numbers of tiles that steps of ``bucket`` rows are captured for, ascending; the last one always suffices."""
        most = self._most(bucket, self._max_adapters, DECODE_BLOCK_ROWS)
        few = -(-bucket // DECODE_BLOCK_ROWS) + _FEW_MORE_TILES
        return (most,) if few >= most else (few, most)

    def plan_prompt(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        logits_rows: Sequence[int],
        num_tokens: int,
        num_wanted: int,
    ) -> TilePlan | None:
        """A step with prompts, padded to ``num_tokens`` rows of which ``num_wanted`` have logits: for CUDA graphs.

        Returns:
            Tiles of :meth:`prompt_shapes`; None if the step needs more of them.
        """
        runs = self._runs([*slots, 0], [*lengths, num_tokens - sum(lengths)])
        padding = num_wanted - len(logits_rows)
        (num_tiles, block), (num_logits_tiles, logits_block) = self.prompt_shapes(
            num_tokens, num_wanted
        )
        tokens = self._cut(runs, block)
        logits = self._cut_rows(runs, logits_rows, logits_block, padding)
        if len(tokens.slot_J) > num_tiles or len(logits.slot_J) > num_logits_tiles:
            return None
        return TilePlan(
            padded(tokens, num_tiles),
            num_tokens,
            padded(logits, num_logits_tiles),
            num_wanted,
            is_captured=True,
            is_beside=num_tokens <= _BESIDE_TOKENS,
        )

    def prompt_shapes(
        self, num_tokens: int, num_wanted: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """(J, M) of the tokens' tiles, and of those of the rows whose logits are wanted, in captured steps."""
        small = num_tokens <= _BESIDE_TOKENS
        block = DECODE_BLOCK_ROWS if small else min(PREFILL_BLOCK_ROWS, self._max_block)
        return self._prompt_shape(num_tokens, block), self._prompt_shape(
            num_wanted, DECODE_BLOCK_ROWS
        )

    def _prompt_shape(self, num_rows: int, block: int) -> tuple[int, int]:
        most = self._most(num_rows, self._max_adapters, block)
        return min(most, -(-num_rows // block) + _MORE_PROMPT_TILES), block

    def _cut_rows(
        self, runs: RowRuns, rows: Sequence[int], block: int, padding: int = 0
    ) -> CutTiles:
        """Tiles of some rows, in the order in which they are wanted, and of more rows of the base model behind them."""
        ends_N = np.cumsum(runs.lengths_N)
        of_row = np.searchsorted(ends_N, np.asarray(rows, dtype=np.int64), side="right")
        slots = np.concatenate((runs.slots_N[of_row], np.zeros(padding, dtype=np.int64)))
        return self._cut(RowRuns(slots, np.ones_like(slots)), block)

    def _runs(self, slots: Sequence[int], lengths: Sequence[int]) -> RowRuns:
        _check_slots(slots, self._num_slots)
        return RowRuns(np.asarray(slots, dtype=np.int64), np.asarray(lengths, dtype=np.int64))


class TilePlan:
    """Tiles on the host: of the tokens, and of the rows whose logits are wanted if those are others.

    Args:
        is_captured: the step replays CUDA graphs, which later steps replay with other tiles: all may have an adapter.
        is_beside: see :class:`LoRABatch`.
    """

    def __init__(
        self,
        tokens: CutTiles,
        num_tokens: int,
        logits: CutTiles | None = None,
        num_logits: int = 0,
        *,
        is_captured: bool = False,
        is_beside: bool = False,
    ) -> None:
        self._parts = [(tokens, num_tokens)]
        if logits is not None:
            self._parts.append((logits, num_logits))
        self._is_captured = is_captured
        self._is_beside = is_beside

    @property
    def num_tiles(self) -> int:
        """Tiles of the tokens."""
        return len(self._parts[0][0].slot_J)

    @property
    def arrays(self) -> list[np.ndarray]:
        """One int32 array per set of tiles: rows [J, M], then slots [J]. Rows first: kernels like them aligned."""
        return [np.concatenate((cut.rows_JM.reshape(-1), cut.slot_J)) for cut, _ in self._parts]

    def batch(self, tensors: Sequence[torch.Tensor]) -> LoRABatch:
        """See :class:`LoRAPlan`."""
        tiles = [
            _tiles_at(data, cut, num_rows, len(cut.slot_J) if self._is_captured else cut.num_used)
            for data, (cut, num_rows) in zip(tensors, self._parts, strict=True)
        ]
        return LoRABatch(tokens=tiles[0], logits=tiles[-1], is_beside=self._is_beside)


def _tiles_at(data: torch.Tensor, cut: CutTiles, num_rows: int, num_used: int) -> Tiles:
    """``cut`` on the device, from its array in :attr:`TilePlan.arrays`."""
    end = cut.rows_JM.size
    return Tiles(data[end:], data[:end].view(cut.rows_JM.shape), num_rows, num_used)


def make_batch_builder(
    backend: Literal["torch", "triton", "csgmv"],
    pool: DevicePool,
    device: torch.device,
    *,
    max_chunk: int = PREFILL_BLOCK_ROWS,
) -> LoRABatchBuilder | TileBatchBuilder:
    """The builder that goes with a backend.

    Args:
        max_chunk: most rows of a tile of ``csgmv`` (``--max-lora-chunk-size``).
    """
    if backend == "torch":
        return LoRABatchBuilder(pool, device)
    if backend == "triton":
        return TileBatchBuilder(pool, "triton")
    return TileBatchBuilder(pool, "csgmv", max_block=max_chunk)


def _check_slots(slots: Sequence[int], num_slots: int) -> None:
    assert min(slots) >= 0, f"slots {slots} are not in the pool"
    assert max(slots) < num_slots, f"slots {slots} are not in the pool of {num_slots}"
