"""Rows of a step -> groups by adapter."""

from __future__ import annotations

import random

import pytest
import torch

from lorikeet.lora.batch_builder import (
    LoRABatchBuilder,
    TileBatchBuilder,
    make_batch_builder,
)
from lorikeet.lora.device_pool import DevicePool
from lorikeet.ops.lora.metadata import NO_ROW, RowGroup, Tiles
from tests.support.lora_runner import batch_of


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
    batch = batch_of(builder.plan([2, 1, 0, 2, 0, 2], [3, 2, 1, 1, 1, 1], [2, 4, 5, 6, 7, 8]))
    gathered, adjacent = batch.tokens
    assert (gathered.slot, _rows(gathered)) == (2, [0, 1, 2, 6, 8])
    assert (adjacent.slot, adjacent.start, adjacent.stop, adjacent.index_T) == (1, 3, 5, None)
    assert _slots_by_row(batch.logits) == {0: 2, 3: 2, 5: 2, 1: 1}


@pytest.mark.parametrize("slots", [[], [0], [0, 0, 0]])
def test_base_only_batches_are_none(builder, slots):
    assert builder.plan(slots, [2] * len(slots), [0] * len(slots)) is None


def test_adjacent_rows_of_one_adapter_are_one_range(builder):
    batch = batch_of(builder.plan([3, 3, 3, 0], [4, 1, 1, 2], [3, 4, 5]))
    assert batch.tokens == (RowGroup(3, 0, 6),)
    assert batch.logits == (RowGroup(3, 0, 3),)


def test_two_runs_stay_ranges_and_three_are_gathered(builder):
    batch = batch_of(builder.plan([1, 0, 1], [5, 1, 5], []))
    assert batch.tokens == (RowGroup(1, 0, 5), RowGroup(1, 6, 11))
    (group,) = batch_of(builder.plan([1, 0, 1, 0, 1], [1] * 5, [])).tokens
    assert group.index_T.tolist() == [0, 2, 4]
    assert (group.start, group.stop) == (0, 5)


def test_logits_rows_may_repeat_skip_and_come_in_any_order(builder):
    batch = batch_of(builder.plan([0, 2, 1], [2, 3, 1], [3, 4, 0, 4, 5]))
    assert _slots_by_row(batch.logits) == {0: 2, 1: 2, 3: 2, 4: 1}


def test_no_logits_rows(builder):
    assert batch_of(builder.plan([1], [8], [])).logits == ()


@pytest.mark.parametrize("slots", [[1, -1], [10_000]])
def test_slots_outside_of_the_pool_are_a_bug(builder, slots):
    with pytest.raises(AssertionError, match="not in the pool"):
        builder.plan(slots, [1] * len(slots), [])


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_the_group_of_its_slot_and_base_rows_in_none(builder, seed):
    rng = random.Random(seed)
    slots = [rng.choice([0, 0, 1, 2, 3, 4]) for _ in range(rng.randint(1, 30))]
    slots[rng.randrange(len(slots))] = 1
    lengths = [rng.choice([1, 1, 1, 5]) for _ in slots]
    slot_T = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
    rows = [rng.randrange(len(slot_T)) for _ in range(rng.randint(0, 20))]
    batch = batch_of(builder.plan(slots, lengths, rows))
    assert _slots_by_row(batch.tokens) == {t: slot for t, slot in enumerate(slot_T) if slot}
    assert _slots_by_row(batch.logits) == {
        n: slot_T[row] for n, row in enumerate(rows) if slot_T[row]
    }
    for group in (*batch.tokens, *batch.logits):
        assert _rows(group) == sorted(_rows(group))
        assert group.start == _rows(group)[0]
        assert group.stop == _rows(group)[-1] + 1


@pytest.fixture(scope="module", params=["triton", "csgmv"])
def tile_builder(request, sites, layout) -> TileBatchBuilder:
    pool = DevicePool(sites, layout, torch.float32, torch.device("cpu"))
    builder = make_batch_builder(request.param, pool, torch.device("cpu"), max_chunk=32)
    assert isinstance(builder, TileBatchBuilder)
    return builder


def _slots_by_tiled_row(tiles: Tiles) -> dict[int, int]:
    found = {}
    for slot, row_M in zip(tiles.slot_J.tolist(), tiles.rows_JM.tolist(), strict=True):
        for row in row_M:
            if row != NO_ROW:
                assert row not in found, f"row {row} is in two tiles"
                found[row] = slot
    return found


def test_a_plan_of_groups_has_nothing_to_copy(builder):
    plan = builder.plan([1, 0], [2, 1], None)
    assert plan.arrays == []
    assert plan.batch([]) == batch_of(builder.plan([1, 0], [2, 1], [0, 1, 2]))
    assert builder.plan([0], [2], None) is None


@pytest.mark.parametrize("slots", [[], [0], [0, 0, 0]])
def test_base_only_batches_have_no_plan(tile_builder, slots):
    assert tile_builder.plan(slots, [2] * len(slots), None) is None
    assert tile_builder.plan_decode(slots, 4) is None


@pytest.mark.parametrize("slots", [[1, -1], [10_000]])
def test_tiles_of_slots_outside_of_the_pool_are_a_bug(tile_builder, slots):
    with pytest.raises(AssertionError, match="not in the pool"):
        tile_builder.plan(slots, [1] * len(slots), None)
    with pytest.raises(AssertionError, match="not in the pool"):
        tile_builder.plan_decode(slots, 8)


@pytest.mark.parametrize("seed", range(10))
def test_every_row_is_in_a_tile_of_its_slot(tile_builder, seed):
    rng = random.Random(seed)
    slots = [1, *(rng.choice([0, 0, 1, 2, 3, 4]) for _ in range(rng.randint(1, 20)))]
    lengths = [rng.choice([1, 1, 70]) for _ in slots]
    slot_T = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
    rows = [rng.randrange(len(slot_T)) for _ in range(rng.randint(0, 20))]
    batch = batch_of(tile_builder.plan(slots, lengths, rows))
    assert not batch.is_beside
    assert (batch.tokens.num_rows, batch.logits.num_rows) == (len(slot_T), len(rows))
    assert _slots_by_tiled_row(batch.tokens) == dict(enumerate(slot_T))
    assert _slots_by_tiled_row(batch.logits) == {n: slot_T[row] for n, row in enumerate(rows)}
    for tiles in (batch.tokens, batch.logits):
        assert (tiles.slot_J[: tiles.num_used] > 0).all()
        assert not tiles.slot_J[tiles.num_used :].any()


def test_long_chunks_get_large_tiles_up_to_the_limit(sites, layout):
    pool = DevicePool(sites, layout, torch.float32, torch.device("cpu"))
    for backend, block in (("csgmv", 32), ("triton", 64)):
        builder = make_batch_builder(backend, pool, torch.device("cpu"), max_chunk=32)
        assert batch_of(builder.plan([1, 2], [500, 40], [499])).tokens.rows_JM.shape[1] == block
        assert batch_of(builder.plan([1, 2, 3], [50, 40, 1], [0])).tokens.rows_JM.shape[1] == 16


@pytest.mark.parametrize("rows", [None, [0, 1, 2]])
def test_rows_whose_logits_are_all_wanted_share_the_tiles(tile_builder, rows):
    plan = tile_builder.plan([1, 0, 2], [1, 1, 1], rows)
    assert len(plan.arrays) == 1
    batch = batch_of(plan)
    assert batch.logits is batch.tokens


@pytest.mark.parametrize("bucket", [1, 2, 4, 8, 24, 64, 256])
def test_captured_steps_have_all_rows_and_a_number_of_tiles_that_was_captured(tile_builder, bucket):
    counts = tile_builder.tile_counts(bucket)
    assert list(counts) == sorted(set(counts))
    rng = random.Random(bucket)
    for num_rows in {1, (bucket + 1) // 2, bucket}:
        slots = [1, *(rng.randint(0, 4) for _ in range(num_rows - 1))]
        plan = tile_builder.plan_decode(slots, bucket)
        (array,) = plan.arrays
        assert plan.num_tiles in counts
        assert len(array) == plan.num_tiles * 17
        batch = batch_of(plan)
        assert batch.is_beside
        assert batch.tokens.num_used == plan.num_tiles
        assert batch.logits is batch.tokens
        padding = [0] * (bucket - num_rows)
        assert _slots_by_tiled_row(batch.tokens) == dict(enumerate([*slots, *padding]))
        most = batch_of(tile_builder.plan_decode(slots, bucket, counts[-1]))
        assert most.tokens.num_used == counts[-1]
        assert _slots_by_tiled_row(most.tokens) == _slots_by_tiled_row(batch.tokens)


def test_few_adapters_need_few_tiles(sites, layout):
    pool = DevicePool(sites, layout, torch.float32, torch.device("cpu"))
    builder = TileBatchBuilder(pool, "csgmv")
    assert builder.tile_counts(64) == (8,)  # 4 adapters and the base, at most
    segments = TileBatchBuilder(pool, "triton")
    few, many = segments.tile_counts(64)
    assert segments.plan_decode([1, *[0] * 40], 64).num_tiles == few
    assert segments.plan_decode([1] * 40, 64).num_tiles == many


@pytest.mark.parametrize("num_tokens", [32, 64, 256, 512, 1024])
def test_captured_prompts_have_all_rows_and_as_many_tiles_as_were_captured(
    tile_builder, num_tokens
):
    num_wanted = min(num_tokens, 256)
    shapes = tile_builder.prompt_shapes(num_tokens, num_wanted)
    rng = random.Random(num_tokens)
    for fill in (1, num_tokens // 2 + 1, num_tokens):
        slots, lengths = [2], [min(fill, 9)]
        while (left := fill - sum(lengths)) > 0:
            slots.append(rng.choice([0, 1, 2, 4]))
            lengths.append(min(left, rng.choice([1, 20, 200])))
        slot_T = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
        rows = [rng.randrange(fill) for _ in range(rng.randint(0, min(num_wanted, 40)))]
        plan = tile_builder.plan_prompt(slots, lengths, rows, num_tokens, num_wanted)
        sizes = [len(array) for array in plan.arrays]
        assert sizes == [tiles * (block + 1) for tiles, block in shapes]
        batch = batch_of(plan)
        assert batch.is_beside == (num_tokens <= 256)
        padding = [0] * (num_tokens - fill)
        assert _slots_by_tiled_row(batch.tokens) == dict(enumerate([*slot_T, *padding]))
        wanted = [*(slot_T[row] for row in rows), *[0] * (num_wanted - len(rows))]
        assert _slots_by_tiled_row(batch.logits) == dict(enumerate(wanted))
        for tiles in (batch.tokens, batch.logits):
            assert tiles.num_used == len(tiles.slot_J), "a replay may use all of them"


def test_a_step_of_too_many_segments_is_not_captured(sites, layout):
    pool = DevicePool(sites, layout, torch.float32, torch.device("cpu"))
    many = ([1] * 200, [1] * 200, list(range(200)), 256, 256)
    assert TileBatchBuilder(pool, "triton").plan_prompt(*many) is None
    assert TileBatchBuilder(pool, "csgmv").plan_prompt(*many) is not None
