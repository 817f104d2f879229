"""From the rows of a step to the groups of rows that share an adapter.

Shape legend: T tokens of the step, N rows (chunks and decode rows) of the step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch

from lorikeet.lora.device_pool import DevicePool
from lorikeet.ops.lora.metadata import LoRABatch, RowGroup

# An adapter whose rows lie in more pieces than this is gathered; below, one matmul per piece is cheaper than the copy.
_MAX_PIECES = 2


class LoRABatchBuilder:
    """Builds the :class:`LoRABatch` of each step."""

    def __init__(self, pool: DevicePool, device: torch.device | None = None) -> None:
        self._num_slots = pool.num_slots
        self._device = device or torch.device("cpu")

    def build(
        self, slots: Sequence[int], lengths: Sequence[int], logits_rows: Sequence[int]
    ) -> LoRABatch | None:
        """Group the rows of a step by adapter.

        Args:
            slots: adapter slot of each of the N rows, in batch order; 0 is the base model.
            lengths: tokens of each row.
            logits_rows: token numbers in [0, T) whose logits are wanted, in the order of the logits.

        Returns:
            None if every slot is 0: such a batch has no LoRA work at all.
        """
        if not any(slots):
            return None
        outside = [slot for slot in slots if not 0 <= slot < self._num_slots]
        assert not outside, f"slots {outside} are not in the pool"
        ends = list(accumulate(lengths))
        pieces = zip(slots, [0, *ends[:-1]], ends, strict=True)
        logits_slots = (slots[bisect_right(ends, token)] for token in logits_rows)
        logits_pieces = ((slot, row, row + 1) for row, slot in enumerate(logits_slots))
        return LoRABatch(tokens=self._group(pieces), logits=self._group(logits_pieces))

    def _group(self, pieces: Iterable[tuple[int, int, int]]) -> tuple[RowGroup, ...]:
        """Pieces (slot, start, stop) in ascending order -> groups, by first appearance."""
        by_slot: dict[int, list[tuple[int, int]]] = {}
        for slot, start, stop in pieces:
            if slot == 0 or start == stop:
                continue
            ranges = by_slot.setdefault(slot, [])
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            else:
                ranges.append((start, stop))
        groups: list[RowGroup] = []
        for slot, ranges in by_slot.items():
            if len(ranges) <= _MAX_PIECES:
                groups.extend(RowGroup(slot, start, stop) for start, stop in ranges)
            else:
                rows = [row for start, stop in ranges for row in range(start, stop)]
                index_T = torch.tensor(rows, dtype=torch.int64, device=self._device)
                groups.append(RowGroup(slot, rows[0], rows[-1] + 1, index_T))
        return tuple(groups)
