"""What lies on the device when a step runs: in fresh memory, or padded at the fixed place of a captured pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lorikeet.core.plan import DecodeRow, PrefillChunk, StepPlan
from lorikeet.worker.graphs import GraphKey
from tests.support.graph_rig import PAGE, DecodeTiles, GraphRig, PromptTiles, sequence

EXTRA = np.asarray([0.5, 2.0], dtype=np.float32)


def test_the_rows_of_a_mixed_step() -> None:
    """Chunks first; rows wanted for prompt log-probabilities before those that sample."""
    rig = GraphRig((0, 0))
    plan = StepPlan(
        step=2,
        starts=[sequence(7, [4, 5, 6, 7, 8], [11, 12], logprob_start=2)],
        chunks=[PrefillChunk(seq=7, start=0, end=4, new_page_ids=[], sample=False)],
        rows=[DecodeRow(seq=1, position=3, new_page_ids=[])],
    )
    layout = rig.lay_out(plan)
    lane = rig.lane(1)
    batch, _ = rig.inputs.stage(layout, [])
    assert batch.input_ids_T.tolist() == [4, 5, 6, 7, -1 - lane]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 3]
    assert batch.attn.places_T.tolist() == [44, 45, 46, 47, 6 * PAGE + 3]
    assert batch.attn.query_starts == [0, 4, 5]
    assert (batch.attn.num_chunks, batch.attn.kv_lens) == (1, [4, 4])
    assert batch.attn.bucket is None
    assert layout.prompt_rows == [(7, 2, 3)]
    assert batch.logits_rows_N is not None
    assert batch.logits_rows_N.tolist() == [1, 2, 3, 4]
    assert layout.sampled == [1]


def test_a_decode_step_lies_in_fixed_inputs_padded_to_its_bucket() -> None:
    rig = GraphRig((0, 0))
    runner = rig.runner()
    rig.decode(3)
    layout = rig.decode(4, (9,))
    batch, (got,) = rig.inputs.stage(layout, [EXTRA], runner.fixed_inputs(GraphKey(4, 8)))
    assert batch.attn.bucket == 4
    lanes = [rig.lane(seq) for seq in (0, 1)]
    assert batch.input_ids_T.tolist() == [-1 - lanes[0], -1 - lanes[1], 0, 0]
    assert batch.positions_T.tolist() == [4, 4, 0, 0]
    assert batch.attn.places_T.tolist() == [9 * PAGE, 10 * PAGE, -1, -1]
    assert batch.attn.kv_lens_N.tolist() == batch.attn.kv_lens == [5, 5, 1, 1]
    assert batch.attn.page_table_NP[:2, :2].tolist() == [[5, 9], [6, 10]]
    assert batch.attn.query_starts_N1.tolist() == batch.attn.query_starts == [0, 1, 2, 3, 4]
    assert batch.logits_rows_N is None, "those of all rows"
    assert got.tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    "key", [GraphKey(64, 8), GraphKey(64, 8, 2), GraphKey(64), GraphKey(64, 0, 1)]
)
def test_every_step_of_a_pass_lies_where_its_capture_read(key: GraphKey) -> None:
    """However many sequences there are, and whatever else travels with them."""
    rig = GraphRig((3,) * 40, num_lanes=40)
    runner = rig.runner(lora=DecodeTiles(), decode_sizes=(1, 64), prompt_sizes=(64,))
    fixed = runner.fixed_inputs(key)

    def addresses(layout: Any, plan: Any, *more: np.ndarray) -> list[int]:
        batch, _ = rig.inputs.stage(layout, list(more), fixed, plan)
        attn = batch.attn
        read = [batch.input_ids_T, batch.positions_T, attn.places_T]
        if key.is_decode:
            read += [attn.kv_lens_N, attn.query_starts_N1, attn.page_table_NP]
        read += [value for value in (batch.logits_rows_N, batch.lora) if value is not None]
        return [tensor.data_ptr() for tensor in read]

    padding, plan = runner.padding(key)
    captured = addresses(padding, plan)
    assert addresses(rig.decode(3), plan, EXTRA) == captured
    assert addresses(rig.decode(4, (9,)), plan, EXTRA, EXTRA) == captured
    for seq in range(39):
        rig.inputs.close(seq)
    assert addresses(rig.decode(5), plan) == captured


def test_a_step_with_prompts_lies_in_fixed_inputs_padded() -> None:
    rig = GraphRig((0,))
    layout = rig.mixed()
    runner = rig.runner(prompt_sizes=(8, 16))
    key = GraphKey(8)
    fixed = runner.fixed_inputs(key)
    batch, _ = rig.inputs.stage(runner.padding(key)[0], [], fixed)
    assert batch.logits_rows_N is not None
    assert batch.attn.places_T.tolist() == [-1] * 8
    assert not batch.input_ids_T.any()
    step, (got,) = rig.inputs.stage(layout, [EXTRA[:1]], fixed)
    assert batch.input_ids_T.tolist() == [4, 5, 6, 7, 8, -1 - rig.lane(0), 0, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 0, 0]
    assert batch.attn.places_T.tolist() == [28, 29, 30, 31, 32, 23, -1, -1]
    assert batch.logits_rows_N.tolist() == [5, *[0] * 7]
    assert got.tolist() == [0.5]
    inputs = step.attn
    assert (inputs.num_chunks, inputs.kv_lens) == (1, [5, 4])
    assert inputs.query_starts == inputs.query_starts_N1.tolist() == [0, 5, 6]
    assert inputs.page_table_NP.tolist() == [[7, 8], [5, 0]]
    assert inputs.places_T.tolist() == [28, 29, 30, 31, 32, 23]
    assert inputs.kv_lens_N.tolist() == [5, 4]
    assert inputs.bucket is None, "attention is told of the step alone"
    rig.inputs.stage(runner.padding(key)[0], [], fixed)
    assert batch.attn.places_T.tolist() == [-1] * 8
    assert not batch.input_ids_T.any()


def test_tiles_lie_at_one_place_whatever_travels_behind_them() -> None:
    rig = GraphRig((0, 3))
    runner = rig.runner(lora=DecodeTiles())
    key, plan = runner.find(rig.decode(3)) or pytest.fail("no pass")
    captured: Any
    captured, _ = rig.inputs.stage(runner.padding(key)[0], [], runner.fixed_inputs(key), plan)
    step: Any
    step, (got,) = rig.inputs.stage(rig.decode(4, (9,)), [EXTRA], runner.fixed_inputs(key), plan)
    assert captured.lora.tolist() == [0, 3]
    assert captured.lora.data_ptr() == step.lora.data_ptr()
    assert got.tolist() == [0.5, 2.0]


def test_tiles_of_a_step_with_prompts() -> None:
    rig = GraphRig((0,))
    layout = rig.mixed()
    tiles = PromptTiles()
    runner = rig.runner(lora=tiles, prompt_sizes=(8,))
    batch: Any
    fixed = runner.fixed_inputs(GraphKey(8, num_tiles=2))
    batch, _ = rig.inputs.stage(layout, [], fixed, tiles.plan_prompt([0, 3]))
    assert batch.lora.tolist() == [0, 3]
    base, _ = rig.inputs.stage(layout, [], runner.fixed_inputs(GraphKey(8)))
    assert base.lora is None


def test_everything_that_a_step_brings_has_room() -> None:
    """All lanes, with page tables as long as they get, and the sampler's numbers."""
    rig = GraphRig((0,) * 100, num_lanes=100, max_pages=64)
    runner = rig.runner(prompt_sizes=(100,), decode_sizes=(1,))
    layout = rig.decode(255, tuple(range(63)))
    assert layout.page_table_NP.shape == (100, 64)
    more = [np.arange(100, dtype=np.int64)] * 12
    _, got = rig.inputs.stage(layout, more, runner.fixed_inputs(GraphKey(100)))
    assert all(tensor.tolist() == list(range(100)) for tensor in got)
