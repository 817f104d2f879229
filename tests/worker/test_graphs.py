"""What a captured decode step reads, without capturing one (tests/e2e/test_gpu.py does)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lorikeet.core.plan import DecodeRow, PrefillChunk, SequenceStart, StepPlan
from lorikeet.core.request import SamplingParams
from lorikeet.kv.storage import KVStorage
from lorikeet.worker.graphs import DecodeBuffers, GraphKey, GraphRunner, default_sizes
from lorikeet.worker.inputs import InputBuilder, StepLayout
from lorikeet.worker.lanes import Lanes

CPU = torch.device("cpu")
PAGE = 4


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (20, (1, 2, 4, 8, 16, 20)),
        (32, (1, 2, 4, 8, 16, 24, 32)),
    ],
)
def test_default_sizes(most: int, sizes: tuple[int, ...]) -> None:
    assert default_sizes(most) == sizes


class Rig:
    def __init__(self, slots: tuple[int, ...] = (0, 0)) -> None:
        self.kv = KVStorage(1, 16, PAGE, 1, 2, torch.float32, "cpu")
        self.inputs = InputBuilder(self.kv, PAGE, CPU, None, Lanes(4, 8, CPU))
        self.buffers = DecodeBuffers(4, 8, self.kv, self.inputs)
        plan = StepPlan(step=0)
        for seq, slot in enumerate(slots):
            plan.starts.append(
                SequenceStart(
                    seq=seq,
                    token_ids=[1, 2, 3],
                    num_prompt=3,
                    num_cached=0,
                    page_ids=[5 + seq],
                    slot=slot,
                    sampling=SamplingParams(),
                    seed=0,
                )
            )
            plan.chunks.append(PrefillChunk(seq=seq, start=0, end=3, new_page_ids=[], sample=True))
        self.inputs.apply(plan)
        self.prefill = self.inputs.lay_out(plan)

    def decode(self, position: int, new_pages: tuple[int, ...] = ()) -> StepLayout:
        rows = [
            DecodeRow(seq=seq, position=position, new_page_ids=[page + seq for page in new_pages])
            for seq in self.inputs.states
        ]
        plan = StepPlan(step=1, rows=rows)
        self.inputs.apply(plan)
        return self.inputs.lay_out(plan)

    def runner(self, *lengths: int, sizes: tuple[int, ...] = (1, 4)) -> GraphRunner:
        class Attention:
            def graph_kv_lens(self, bucket: int, longest: int) -> tuple[int, ...]:
                return lengths or (longest,)

        attention: Any = Attention()
        return GraphRunner(lambda batch: torch.empty(0), attention, self.buffers, sizes, 32)


def test_a_step_lies_in_the_buffers_padded_to_its_bucket() -> None:
    rig = Rig()
    rig.decode(3)
    layout = rig.decode(4, (9,))
    extra = np.asarray([0.5, 2.0], dtype=np.float32)
    batch, (got,) = rig.buffers.fill(GraphKey(4, 8), layout, [extra])
    assert batch.attn.bucket == 4
    lanes = [rig.inputs.states[seq].lane for seq in (0, 1)]
    assert batch.input_ids_T.tolist() == [-1 - lanes[0], -1 - lanes[1], 0, 0]
    assert batch.positions_T.tolist() == [4, 4, 0, 0]
    assert batch.attn.places_T.tolist() == [9 * PAGE, 10 * PAGE, -1, -1]
    assert batch.attn.kv_lens_N.tolist() == batch.attn.kv_lens == [5, 5, 1, 1]
    assert batch.attn.page_table_NP[:2, :2].tolist() == [[5, 9], [6, 10]]
    assert batch.attn.query_starts_N1.tolist() == batch.attn.query_starts == [0, 1, 2, 3, 4]
    assert got.tolist() == [0.5, 2.0]


def test_the_next_step_lies_at_the_same_place() -> None:
    rig = Rig()
    first, _ = rig.buffers.fill(GraphKey(2, 8), rig.decode(3), [])
    second, _ = rig.buffers.fill(GraphKey(4, 8), rig.decode(4, (9,)), [])
    for before, after in (
        (first.input_ids_T, second.input_ids_T),
        (first.positions_T, second.positions_T),
        (first.attn.places_T, second.attn.places_T),
        (first.attn.kv_lens_N, second.attn.kv_lens_N),
        (first.attn.page_table_NP, second.attn.page_table_NP),
    ):
        assert before.data_ptr() == after.data_ptr()


def test_which_steps_have_a_graph() -> None:
    rig = Rig()
    assert rig.runner().find(rig.prefill) is None
    layout = rig.decode(3)
    assert rig.runner().find(layout) == (GraphKey(4, 8), None)
    assert rig.runner(3, 32).find(layout) == (GraphKey(4, 8), None)
    assert rig.runner(4, 32).find(layout) == (GraphKey(4, 1), None)
    assert rig.runner(3).find(layout) is None, "a sequence is too long"
    one = Rig((0,))
    assert one.runner().find(one.decode(3)) == (GraphKey(1, 8), None)
    many = Rig((0, 0, 0, 0))
    assert many.runner(sizes=(1, 2)).find(many.decode(3)) is None, "too many rows"
    adapted = Rig((0, 3))
    assert adapted.runner().find(adapted.decode(3)) is None, "a backend without graphs"
    assert rig.runner(4, 32).keys() == {GraphKey(n, pages) for n in (1, 4) for pages in (1, 8)}


class Tiles:
    """A builder whose tiles are the slots of the rows, one each."""

    def tile_counts(self, bucket: int) -> tuple[int, ...]:
        return (2, bucket) if bucket > 2 else (bucket,)

    def decode_size(self, bucket: int) -> int:
        return bucket

    def plan_decode(self, slots: list[int], bucket: int) -> Any:
        class Plan:
            num_tiles = next(n for n in Tiles().tile_counts(bucket) if n >= len(slots))
            arrays = (np.asarray(slots + [0] * (num_tiles - len(slots)), dtype=np.int32),)

        plan: Any = Plan()
        plan.arrays = list(plan.arrays)
        return plan if any(slots) else None

    def decode_batch(self, data: torch.Tensor, bucket: int, num_tiles: int) -> Any:
        return data[:num_tiles]


def test_steps_with_adapters_have_graphs_of_their_own() -> None:
    """Beside those without; the tiles lie at one place, whatever travels behind them."""
    rig = Rig((0, 3))
    tiles: Any = Tiles()
    rig.buffers = DecodeBuffers(4, 8, rig.kv, rig.inputs, tiles)
    runner = rig.runner()
    assert {key.tiles for key in runner.keys()} == {0, 1, 2, 4}  # noqa: SIM118  no mapping
    found = runner.find(rig.decode(3))
    assert found is not None
    key, plan = found
    assert key == GraphKey(4, 8, 2)
    captured: Any = rig.buffers.batch(key, [1] * 4)
    extra = np.asarray([0.5, 2.0], dtype=np.float32)
    batch, (got,) = rig.buffers.fill(key, rig.decode(4, (9,)), [extra], plan)
    assert captured.lora.tolist() == [0, 3]
    assert captured.lora.data_ptr() == batch.lora.data_ptr()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    assert got.tolist() == [0.5, 2.0]
    base = Rig()
    base.buffers = DecodeBuffers(4, 8, base.kv, base.inputs, tiles)
    assert base.runner().find(base.decode(3)) == (GraphKey(4, 8), None), "nobody uses an adapter"


def test_the_rows_of_a_mixed_step() -> None:
    """Chunks first; rows wanted for prompt log-probabilities before those that sample."""
    rig = Rig()
    plan = StepPlan(
        step=2,
        starts=[
            SequenceStart(
                seq=7,
                token_ids=[4, 5, 6, 7, 8],
                num_prompt=5,
                num_cached=0,
                page_ids=[11, 12],
                slot=0,
                sampling=SamplingParams(),
                seed=0,
                logprob_start=2,
            )
        ],
        chunks=[PrefillChunk(seq=7, start=0, end=4, new_page_ids=[], sample=False)],
        rows=[DecodeRow(seq=1, position=3, new_page_ids=[])],
    )
    rig.inputs.apply(plan)
    layout = rig.inputs.lay_out(plan)
    lane = rig.inputs.states[1].lane
    batch, _ = rig.inputs.stage(layout, [])
    assert batch.input_ids_T.tolist() == [4, 5, 6, 7, -1 - lane]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 3]
    assert batch.attn.places_T.tolist() == [44, 45, 46, 47, 6 * PAGE + 3]
    assert batch.attn.query_starts == [0, 4, 5]
    assert (batch.attn.num_chunks, batch.attn.kv_lens) == (1, [4, 4])
    assert layout.prompt_rows == [(7, 2, 3)]
    assert batch.logits_rows_N is not None
    assert batch.logits_rows_N.tolist() == [1, 2, 3, 4]
    assert layout.sampled == [1]
