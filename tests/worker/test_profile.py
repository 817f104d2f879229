"""Steps that are run before there is a request; what they need is measured on a GPU (tests/e2e/test_gpu.py)."""

from __future__ import annotations

from unittest.mock import Mock

import torch

from lorikeet.ops.draw import draw_tokens_torch
from lorikeet.ops.triton.sampling import draw_tokens_triton
from lorikeet.worker.profile import graph_bytes, warm_up_draw


def test_a_draw_that_nobody_keeps() -> None:
    """The forms are called with what a step calls them with, and no lane is written."""
    for draw in (draw_tokens_torch, draw_tokens_triton):
        sampled_L = torch.tensor([7, 8])
        warm_up_draw(draw, 40, torch.float16, sampled_L)
        assert sampled_L.tolist() == [7, 8]


def test_draws_from_every_place_that_a_row_may_begin_at() -> None:
    draw = Mock(side_effect=draw_tokens_torch)
    warm_up_draw(draw, 331, torch.bfloat16, torch.tensor([7, 8]))
    places = [call.args[0].data_ptr() % 16 for call in draw.call_args_list]
    assert places[0] == 0
    assert places[1] != 0


def test_graphs_of_small_models_are_small() -> None:
    assert graph_bytes(0, 32) == 0
    assert graph_bytes(10, 32) == 400_000_000
    assert graph_bytes(10, 2) == 25_000_000
