"""Rows of a step -> groups by adapter."""

from __future__ import annotations

import random

import pytest
import torch

from lorikeet.lora.batch_builder import LoRABatchBuilder
from lorikeet.lora.device_pool import DevicePool
from lorikeet.ops.lora.metadata import RowGroup


@pytest.fixture(scope="module")
def builder(sites, layout) -> LoRABatchBuilder:
    return LoRABatchBuilder(DevicePool(sites, layout, torch.float32, torch.device("cpu")))


def _rows(group: RowGroup) -> list[int]:
    if group.index_T is None:
        return list(range(group.start, group.stop))
    return group.index_T.tolist()


def _slots_by_row(groups: tuple[RowGroup, ...]) -> dict[int, int]:
    found = {}
    for group in groups:
        for row in _rows(group):
            assert row not in found, f"row {row} is in two groups"
            found[row] = group.slot
    return found


def test_the_example_of_the_documentation(builder):
    batch = builder.build([2, 1, 0, 2, 0, 2], [3, 2, 1, 1, 1, 1], [2, 4, 5, 6, 7, 8])
    gathered, adjacent = batch.tokens
    assert (gathered.slot, _rows(gathered)) == (2, [0, 1, 2, 6, 8])
    assert (adjacent.slot, adjacent.start, adjacent.stop, adjacent.index_T) == (1, 3, 5, None)
    assert _slots_by_row(batch.logits) == {0: 2, 3: 2, 5: 2, 1: 1}


@pytest.mark.parametrize("slots", [[], [0], [0, 0, 0]])
def test_base_only_batches_are_none(builder, slots):
    assert builder.build(slots, [2] * len(slots), [0] * len(slots)) is None


def test_adjacent_rows_of_one_adapter_are_one_range(builder):
    batch = builder.build([3, 3, 3, 0], [4, 1, 1, 2], [3, 4, 5])
    assert batch.tokens == (RowGroup(3, 0, 6),)
    assert batch.logits == (RowGroup(3, 0, 3),)


def test_two_pieces_stay_ranges_and_three_are_gathered(builder):
    batch = builder.build([1, 0, 1], [5, 1, 5], [])
    assert batch.tokens == (RowGroup(1, 0, 5), RowGroup(1, 6, 11))
    (group,) = builder.build([1, 0, 1, 0, 1], [1] * 5, []).tokens
    assert group.index_T.tolist() == [0, 2, 4]
    assert (group.start, group.stop) == (0, 5)


def test_logits_rows_may_repeat_skip_and_come_in_any_order(builder):
    batch = builder.build([0, 2, 1], [2, 3, 1], [3, 4, 0, 4, 5])
    assert _slots_by_row(batch.logits) == {0: 2, 1: 2, 3: 2, 4: 1}


def test_no_logits_rows(builder):
    assert builder.build([1], [8], []).logits == ()


@pytest.mark.parametrize("slots", [[1, -1], [10_000]])
def test_slots_outside_of_the_pool_are_a_bug(builder, slots):
    with pytest.raises(AssertionError, match="not in the pool"):
        builder.build(slots, [1] * len(slots), [])


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_the_group_of_its_slot_and_base_rows_in_none(builder, seed):
    rng = random.Random(seed)
    slots = [rng.choice([0, 0, 1, 2, 3, 4]) for _ in range(rng.randint(1, 30))]
    slots[rng.randrange(len(slots))] = 1
    lengths = [rng.choice([1, 1, 1, 5]) for _ in slots]
    slot_T = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
    rows = [rng.randrange(len(slot_T)) for _ in range(rng.randint(0, 20))]
    batch = builder.build(slots, lengths, rows)
    assert _slots_by_row(batch.tokens) == {t: slot for t, slot in enumerate(slot_T) if slot}
    assert _slots_by_row(batch.logits) == {
        n: slot_T[row] for n, row in enumerate(rows) if slot_T[row]
    }
    for group in (*batch.tokens, *batch.logits):
        assert _rows(group) == sorted(_rows(group))
        assert group.start == _rows(group)[0]
        assert group.stop == _rows(group)[-1] + 1
