"""Which captured pass runs a step, what a pass computes, and the same replies as without; graphs are recorded on the CPU
(tests/e2e/test_gpu.py captures real ones)."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from lorikeet import LLM
from lorikeet.attention import sdpa
from lorikeet.attention.cut import CutAttention
from lorikeet.ops import rope
from lorikeet.ops.rope import store_kv_torch
from lorikeet.worker.graphs import (
    CapturedPass,
    GraphKey,
    GraphRunner,
    default_decode_sizes,
    default_prompt_sizes,
    unowned,
)
from lorikeet.worker.inputs import StepLayout
from tests.support.graph_rig import DecodeTiles, GraphRig, PromptTiles
from tests.support.peft_adapters import make_adapter
from tests.support.recorded_graph import RecordedGraph
from tests.support.tiny_models import make_tiny_model

T, Q, H = 8, 2, 4
UNUSED: Any = None


@pytest.fixture
def recorded(monkeypatch) -> None:
    """torch.cuda as far as a capture needs it, on the CPU; and the store of K/V, which knows no -1 there."""
    for name in ("synchronize", "Stream", "current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)

    def store(k: Any, v: Any, k_cache: Any, v_cache: Any, places_T: torch.Tensor) -> None:
        # The last place is of a page that these few sequences never get.
        store_kv_torch(k, v, k_cache, v_cache, places_T % len(k_cache))

    monkeypatch.setattr(rope, "store_kv_torch", store)
    monkeypatch.setattr(sdpa, "_is_captured", lambda _: RecordedGraph.is_any_capturing)


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
def test_default_sizes_of_decode_steps(most: int, sizes: tuple[int, ...]) -> None:
    assert default_decode_sizes(most) == sizes


def test_default_sizes_of_steps_with_prompts() -> None:
    assert default_prompt_sizes(1) == (1,)
    assert default_prompt_sizes(100) == (32, 64, 100)
    assert default_prompt_sizes(1024)[-2:] == (896, 1024)
    assert default_prompt_sizes(1600)[-4:] == (1024, 1280, 1536, 1600)
    sizes = default_prompt_sizes(4096)
    assert list(sizes) == sorted(set(sizes))
    assert all(b - a <= max(32, b // 2) for a, b in pairwise(sizes))


def test_which_decode_steps_have_a_pass() -> None:
    rig = GraphRig((0, 0))
    assert rig.runner().find(rig.prefill) is None
    layout = rig.decode(3)
    assert rig.runner().find(layout) == (GraphKey(4, 8), None)
    assert rig.runner(3, 32).find(layout) == (GraphKey(4, 8), None)
    assert rig.runner(4, 32).find(layout) == (GraphKey(4, 1), None)
    assert rig.runner(3).find(layout) is None, "a sequence is too long"
    one = GraphRig((0,))
    assert one.runner().find(one.decode(3)) == (GraphKey(1, 8), None)
    many = GraphRig((0, 0, 0, 0))
    layout = many.decode(3)
    assert many.runner(decode_sizes=(1, 2)).find(layout) is None, "too many rows"
    with_prompts = many.runner(decode_sizes=(1, 2), prompt_sizes=(4,))
    assert with_prompts.find(layout) == (GraphKey(4), None), "a step like any other"
    adapted = GraphRig((0, 3))
    assert adapted.runner().find(adapted.decode(3)) is None, "a backend without graphs"
    keys = rig.runner(4, 32).keys()
    assert set(keys) == {GraphKey(n, pages) for n in (1, 4) for pages in (1, 8)}


def test_decode_steps_with_adapters_have_passes_of_their_own() -> None:
    """Beside those without."""
    rig = GraphRig((0, 3))
    runner = rig.runner(lora=DecodeTiles())
    assert {key.num_tiles for key in runner.keys()} == {0, 1, 2, 4}  # noqa: SIM118  no mapping
    found = runner.find(rig.decode(3))
    assert found is not None
    assert found[0] == GraphKey(4, 8, 2)
    base = GraphRig((0, 0))
    found = base.runner(lora=DecodeTiles()).find(base.decode(3))
    assert found == (GraphKey(4, 8), None), "nobody uses an adapter"


def test_which_steps_with_prompts_have_a_pass() -> None:
    rig = GraphRig((0,))
    layout = rig.mixed()
    assert rig.runner(prompt_sizes=(8, 16)).find(layout) == (GraphKey(8), None)
    assert rig.runner(prompt_sizes=(16,)).find(layout) == (GraphKey(16), None)
    assert rig.runner(prompt_sizes=(5,)).find(layout) is None, "too many tokens"
    adapted = GraphRig((0,))
    layout = adapted.mixed(slot=3)
    runner = adapted.runner(prompt_sizes=(8,))
    assert runner.find(layout) is None, "a backend without graphs"
    tiles: Any = PromptTiles()
    runner = adapted.runner(prompt_sizes=(8,), lora=tiles)
    found = runner.find(layout)
    assert found is not None
    key, plan = found
    assert key == GraphKey(8, num_tiles=2)
    assert plan is not None
    assert plan.arrays[0].tolist() == [3, 0]
    tiles.plan_prompt = lambda *_: None
    assert runner.find(layout) is None, "too many tiles"


def test_more_wanted_rows_than_captured_ones_run_eagerly(monkeypatch) -> None:
    rig = GraphRig((0,))
    runner, layout = rig.runner(prompt_sizes=(8,)), rig.mixed(logprob_start=0)
    assert runner.find(layout) is not None
    monkeypatch.setattr("lorikeet.worker.graphs._MAX_WANTED", 5)
    assert runner.find(layout) is None


def test_the_largest_passes_are_captured_first() -> None:
    keys = GraphRig((0,)).runner(4, 32, lora=DecodeTiles(), prompt_sizes=(8, 16)).keys()
    prompts = [key for key in keys if not key.is_decode]
    assert prompts == [GraphKey(16, 0, 1), GraphKey(16), GraphKey(8, 0, 1), GraphKey(8)]
    decodes = keys[len(prompts) :]
    assert [key.num_tokens for key in decodes] == [4] * 6 + [1] * 4
    assert decodes == sorted(set(decodes), reverse=True)


class Scale:
    """Attention that multiplies by the layer's number."""

    name = "scale"

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int, int]] = []

    def forward(self, q: torch.Tensor, k: Any, v: Any, kv: Any, layer: int, *more: Any) -> Any:
        self.calls.append((layer, len(q), len(k), len(v)))
        return q * (layer + 2) + v


def make() -> tuple[Any, CutAttention, torch.Tensor]:
    backend: Any = Scale()
    attention = CutAttention(backend)
    x = torch.randn(T, Q * H, dtype=torch.float64)
    weights = torch.randn(3, Q * H, Q * H, dtype=torch.float64)

    def forward() -> torch.Tensor:
        y = x
        for layer in range(2):
            q = (y @ weights[layer]).view(T, Q, H)
            o = attention.forward(q, q + 1, q + 2, UNUSED, layer, UNUSED, None)
            y = y + o.flatten(1).relu()
        return y @ weights[2]

    return forward, attention, x


def step_of(num_tokens: int) -> Any:
    return SimpleNamespace(kv=None, attn=SimpleNamespace(query_starts=[0, num_tokens]))


@pytest.mark.parametrize("num_tokens", [1, 5, T])
@pytest.mark.parametrize("is_cut", [True, False])
def test_a_replay_computes_what_the_pass_does(recorded, num_tokens: int, is_cut: bool) -> None:
    forward, attention, x = make()
    captured = CapturedPass(forward, None, attention if is_cut else None)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        wanted = forward()
        captured.result.fill_(torch.nan)
        captured.replay(step_of(num_tokens), attention)
        assert torch.equal(captured.result[:num_tokens], wanted[:num_tokens])


@pytest.mark.parametrize("is_cut", [True, False])
def test_attention_is_called_for_the_rows_of_the_step_alone(recorded, is_cut: bool) -> None:
    """Where it is left out of the graphs."""
    forward, attention, _ = make()
    captured = CapturedPass(forward, None, attention if is_cut else None)
    backend: Any = attention.backend
    backend.calls = []
    captured.replay(step_of(3), attention)
    assert backend.calls == ([(0, 3, 3, 3), (1, 3, 3, 3)] if is_cut else [])


def test_a_pass_that_fails_leaves_no_capture_and_no_cut(recorded) -> None:
    _, attention, x = make()

    def fail() -> torch.Tensor:
        attention.forward(x.view(T, Q, H), x, x, UNUSED, 0, UNUSED, None)
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        CapturedPass(fail, None, attention)
    assert not RecordedGraph.is_any_capturing
    q = torch.ones(T, Q, H)
    assert torch.equal(attention.forward(q, q, q, UNUSED, 1, UNUSED, None), q * 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_unowned_is_the_same_memory(dtype: torch.dtype) -> None:
    x = torch.arange(4096, device="cuda").to(dtype)
    view = x.view(64, 64)[3:7, 8:40]
    same = unowned(view)
    assert (same.data_ptr(), same.shape, same.stride()) == (
        view.data_ptr(),
        view.shape,
        view.stride(),
    )
    same.fill_(1)
    assert (view == 1).all()
    before = torch.cuda.memory_allocated()
    del x, view
    assert torch.cuda.memory_allocated() < before, "it is kept by nobody"


def capture(llm: LLM, *sizes: int, decode_sizes: tuple[int, ...] = ()) -> list[GraphKey]:
    """Let an engine run steps in graphs. Returns a list that grows with the pass of each such step."""
    worker: Any = llm._core._worker
    graphs = GraphRunner(
        worker._model,
        worker._attention,
        worker._inputs,
        None,
        decode_sizes=decode_sizes,
        prompt_sizes=sizes,
        max_kv_len=llm.info["context_length"],
    )
    graphs.capture(progress=False)
    ran: list[GraphKey] = []

    def run(layout: StepLayout, more: list[np.ndarray]) -> Any:
        found = graphs.find(layout)
        ran.extend([] if found is None else [found[0]])
        return graphs.run(layout, more)

    worker._graphs = Mock(run=run)
    return ran


@pytest.mark.parametrize(
    ("family", "more", "decode_sizes"),
    [
        ("llama", {}, ()),
        ("qwen3", {}, ()),
        ("mistral", {"sliding_window": 6}, ()),
        ("llama", {}, (1, 2, 4)),
        ("mistral", {"sliding_window": 6}, (4,)),
    ],
)
def test_replies_are_those_of_an_eager_engine(
    tmp_path: Path,
    recorded,
    family: str,
    more: dict[str, Any],
    decode_sizes: tuple[int, ...],
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
        ran = capture(captured, 4, 16, decode_sizes=decode_sizes)
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
    assert GraphKey(16) in ran, "chunks"
    assert min(ran).num_tokens <= 4, "rows that decode"
    sizes = {key.num_tokens for key in ran if key.is_decode}
    assert sizes <= set(decode_sizes)
    assert bool(sizes) == bool(decode_sizes)


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
