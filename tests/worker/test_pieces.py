"""A forward pass in pieces: the same results as the pass, whatever lies in its inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorikeet.attention.cut import AttentionCall, CutAttention
from lorikeet.worker.pieces import Pieces, unowned
from tests.support.recorded_graph import RecordedGraph

T, Q, H = 8, 2, 4
UNUSED: Any = None


class Scale:
    """Attention that multiplies by the layer's number."""

    name = "scale"

    def forward(self, q: torch.Tensor, k: Any, v: Any, kv: Any, layer: int, *more: Any) -> Any:
        return q * (layer + 2) + v


@pytest.fixture(autouse=True)
def recorded(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)


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


def attend(call: AttentionCall) -> torch.Tensor:
    return call.q_TQH * (call.layer + 2) + call.v_TKH


@pytest.mark.parametrize("num_tokens", [1, 5, T])
def test_a_replay_computes_what_the_pass_does(num_tokens: int) -> None:
    forward, attention, x = make()
    pieces = Pieces(None)
    result = pieces.capture(forward, attention)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        wanted = forward()
        result.fill_(torch.nan)
        pieces.replay(attend, num_tokens)
        assert torch.equal(result[:num_tokens], wanted[:num_tokens])


def test_attention_is_called_for_the_rows_of_the_step_alone() -> None:
    forward, attention, _ = make()
    pieces = Pieces(None)
    pieces.capture(forward, attention)
    seen: list[tuple[int, int, int, int]] = []

    def see(call: AttentionCall) -> torch.Tensor:
        seen.append((call.layer, len(call.q_TQH), len(call.k_TKH), len(call.v_TKH)))
        return attend(call)

    pieces.replay(see, 3)
    assert seen == [(0, 3, 3, 3), (1, 3, 3, 3)]


def test_a_pass_that_fails_leaves_no_capture_and_no_cut() -> None:
    _, attention, x = make()

    def fail() -> torch.Tensor:
        attention.forward(x.view(T, Q, H), x, x, UNUSED, 0, UNUSED, None)
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        Pieces(None).capture(fail, attention)
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
