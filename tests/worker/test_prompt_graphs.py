"""Steps with prompts in pieces of graphs, on a CPU: what lies in the buffers, and the same replies as without."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from lorikeet import LLM
from lorikeet.core.plan import DecodeRow, PrefillChunk, SequenceStart, StepPlan
from lorikeet.core.request import SamplingParams
from lorikeet.kv.storage import KVStorage
from lorikeet.ops import rope
from lorikeet.ops.kv_store import store_kv_torch
from lorikeet.worker.inputs import InputBuilder, StepLayout
from lorikeet.worker.lanes import Lanes
from lorikeet.worker.prompt_graphs import (
    PromptBuffers,
    PromptGraphs,
    PromptKey,
    default_prompt_sizes,
)
from tests.support.peft_adapters import make_adapter
from tests.support.recorded_graph import RecordedGraph
from tests.support.tiny_models import make_tiny_model

CPU = torch.device("cpu")
PAGE = 4


def test_default_sizes() -> None:
    assert default_prompt_sizes(1) == (1,)
    assert default_prompt_sizes(100) == (32, 64, 100)
    assert default_prompt_sizes(1024)[-2:] == (896, 1024)
    assert default_prompt_sizes(1600)[-4:] == (1024, 1280, 1536, 1600)
    sizes = default_prompt_sizes(4096)
    assert list(sizes) == sorted(set(sizes))
    assert all(b - a <= max(32, b // 2) for a, b in pairwise(sizes))


class Tiles:
    """A builder whose one tile array is the slots of the sequences; there is room for two."""

    def prompt_shapes(self, tokens: int, wanted: int) -> Any:
        return ((2, 0),)

    def plan_prompt(self, slots: list[int], *rest: Any) -> list[np.ndarray] | None:
        return [np.asarray(slots, dtype=np.int32)] if len(slots) == 2 else None

    def prompt_batch(self, tensors: list[torch.Tensor], tokens: int, wanted: int) -> Any:
        return tensors[0]


class Rig:
    """Sequence 0 decodes its token 3, sequence 1 computes its first five of six tokens."""

    def __init__(self, slots: tuple[int, int] = (0, 0), logprob_start: int = -1) -> None:
        self.kv = KVStorage(1, 16, PAGE, 1, 2, torch.float32, "cpu")
        self.inputs = InputBuilder(self.kv, PAGE, CPU, None, Lanes(4, 8, CPU))
        first = StepPlan(step=0, starts=[self._start(0, [1, 2, 3], [5], slots[0])])
        first.chunks = [PrefillChunk(seq=0, start=0, end=3, new_page_ids=[], sample=True)]
        self.inputs.apply(first)
        self.plan = StepPlan(
            step=1,
            starts=[self._start(1, [4, 5, 6, 7, 8, 9], [7, 8], slots[1], logprob_start)],
            chunks=[PrefillChunk(seq=1, start=0, end=5, new_page_ids=[], sample=False)],
            rows=[DecodeRow(seq=0, position=3, new_page_ids=[])],
        )
        self.inputs.apply(self.plan)

    def _start(
        self, seq: int, tokens: list[int], pages: list[int], slot: int, logprob_start: int = -1
    ) -> SequenceStart:
        return SequenceStart(
            seq=seq,
            token_ids=tokens,
            num_prompt=len(tokens),
            num_cached=0,
            page_ids=pages,
            slot=slot,
            sampling=SamplingParams(),
            seed=0,
            logprob_start=logprob_start,
        )

    @property
    def layout(self) -> StepLayout:
        return self.inputs.lay_out(self.plan)

    def buffers(self, *sizes: int, tiles: Any = None) -> PromptBuffers:
        return PromptBuffers(sizes, self.kv, self.inputs, tiles)

    def graphs(self, *sizes: int, tiles: Any = None) -> PromptGraphs:
        unused: Any = None
        return PromptGraphs(unused, unused, self.buffers(*sizes, tiles=tiles), sizes, self.kv)


def test_a_step_lies_in_the_buffers_padded() -> None:
    rig = Rig()
    buffers = rig.buffers(8, 16)
    batch = buffers.batch(PromptKey(8))
    extra = np.asarray([0.5], dtype=np.float32)
    inputs, (got,) = buffers.fill(PromptKey(8), rig.layout, [], [extra])
    lane = rig.inputs.states[0].lane
    assert batch.input_ids_T.tolist() == [4, 5, 6, 7, 8, -1 - lane, 0, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 0, 0]
    assert batch.attn.places_T.tolist() == [28, 29, 30, 31, 32, 23, -1, -1]
    assert batch.logits_rows_N is not None
    assert batch.logits_rows_N.tolist() == [5, *[0] * 7]
    assert got.tolist() == [0.5]
    assert (inputs.num_chunks, inputs.kv_lens) == (1, [5, 4])
    assert inputs.query_starts == inputs.query_starts_N1.tolist() == [0, 5, 6]
    assert inputs.page_table_NP.tolist() == [[7, 8], [5, 0]]
    assert inputs.places_T.tolist() == [28, 29, 30, 31, 32, 23]
    assert inputs.kv_lens_N.tolist() == [5, 4]
    buffers.clear(PromptKey(8))
    assert batch.attn.places_T.tolist() == [-1] * 8
    assert not batch.input_ids_T.any()


def test_tiles_lie_behind_the_fields() -> None:
    rig = Rig((3, 0))
    tiles: Any = Tiles()
    buffers = rig.buffers(8, tiles=tiles)
    key = PromptKey(8, has_adapters=True)
    batch: Any = buffers.batch(key)
    buffers.fill(key, rig.layout, [np.asarray([0, 3], dtype=np.int32)], [])
    assert batch.lora.tolist() == [0, 3]
    assert buffers.batch(PromptKey(8)).lora is None


def test_which_steps_are_captured() -> None:
    rig = Rig()
    assert rig.graphs(8, 16)._find(rig.layout) == (PromptKey(8), [])
    assert rig.graphs(16)._find(rig.layout) == (PromptKey(16), [])
    assert rig.graphs(5)._find(rig.layout) is None, "too many tokens"
    adapted = Rig((3, 0))
    assert adapted.graphs(8)._find(adapted.layout) is None, "a backend without graphs"
    tiles: Any = Tiles()
    found = adapted.graphs(8, tiles=tiles)._find(adapted.layout)
    assert found is not None
    key, (slots,) = found
    assert key == PromptKey(8, has_adapters=True)
    assert slots.tolist() == [0, 3]
    tiles.plan_prompt = lambda *_: None
    assert adapted.graphs(8, tiles=tiles)._find(adapted.layout) is None, "too many tiles"


def test_more_wanted_rows_than_captured_ones_run_eagerly(monkeypatch) -> None:
    rig = Rig(logprob_start=0)
    assert rig.graphs(8)._find(rig.layout) is not None
    monkeypatch.setattr("lorikeet.worker.prompt_graphs._MAX_WANTED", 5)
    assert rig.graphs(8)._find(rig.layout) is None


@pytest.fixture
def recorded(monkeypatch) -> None:
    """torch.cuda as far as a capture needs it, on the CPU; and the store of K/V, which knows no -1 there."""
    for name in ("synchronize", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)

    def store(k: Any, v: Any, k_cache: Any, v_cache: Any, places_T: torch.Tensor) -> None:
        # The last place is of a page that these few sequences never get.
        store_kv_torch(k, v, k_cache, v_cache, places_T % len(k_cache))

    monkeypatch.setattr(rope, "store_kv_torch", store)


def capture(llm: LLM, *sizes: int) -> list[int]:
    """Let an engine run prompts in graphs. Returns a list that grows with the number of tokens of each such step."""
    worker: Any = llm._core._worker
    inputs = worker._inputs
    graphs = PromptGraphs(
        worker._network,
        worker._attention,
        PromptBuffers(sizes, inputs._kv, inputs),
        sizes,
        inputs._kv,
    )
    graphs.capture(None, progress=False)
    ran: list[int] = []

    def run(layout: StepLayout, more: list[np.ndarray]) -> Any:
        result = graphs.run(layout, more)
        if result is not None:
            ran.append(len(layout.ids_T))
        return result

    worker._graphs = [Mock(run=run)]
    return ran


@pytest.mark.parametrize(
    ("family", "more"),
    [("llama", {}), ("qwen3", {}), ("mistral", {"sliding_window": 6})],
)
def test_replies_are_those_of_an_eager_engine(
    tmp_path: Path, recorded, family: str, more: dict[str, Any]
) -> None:
    """Chunks, decode rows beside them, prefix hits, log-probabilities of prompts, adapters that run eagerly."""
    path = make_tiny_model(tmp_path, family, **more)
    adapter = make_adapter(path, tmp_path / "a")
    prompts = [
        [3 + (7 * i + j) % 90 for j in range(length)] for i, length in enumerate((30, 3, 17))
    ]
    options: Any = {
        "lora_paths": {"a": str(adapter)},
        "chunked_prefill_size": 16,
        "max_total_tokens": 512,
    }
    asked: Any = {
        "sampling_params": {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    with LLM(str(path), **options) as eager, LLM(str(path), **options) as captured:
        ran = capture(captured, 4, 16)
        for names in (None, None, [None, "a", None]):
            wanted, got = (
                llm.generate(input_ids=prompts, lora_path=names, **asked)
                for llm in (eager, captured)
            )
            for one, other in zip(wanted, got, strict=True):
                assert one["output_ids"] == other["output_ids"]
                for kind in ("input_token_logprobs", "output_token_logprobs"):
                    values = [
                        [value for value, *_ in reply["meta_info"][kind] if value is not None]
                        for reply in (one, other)
                    ]
                    assert values[0] == pytest.approx(values[1], abs=1e-4)
    assert 16 in ran, "chunks"
    assert min(ran) <= 4, "rows that decode"


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_vectors_are_those_of_an_eager_engine(tmp_path: Path, recorded, kind: Any) -> None:
    """A graph has no room for states: a step that pools runs eagerly, chunks before its sequence's end need not."""
    path = make_tiny_model(tmp_path)
    prompts = [[3 + (7 * i + j) % 90 for j in range(30)] for i in range(3)]
    options: Any = {"chunked_prefill_size": 16, "max_total_tokens": 512}
    with LLM(str(path), **options) as eager, LLM(str(path), **options) as captured:
        ran = capture(captured, 4, 16)
        wanted = eager.embed(input_ids=prompts, pooling=kind)
        for vector, right in zip(
            captured.embed(input_ids=prompts, pooling=kind), wanted, strict=True
        ):
            assert vector == pytest.approx(right, abs=1e-5)
    assert bool(ran) == (kind == "last")
