"""Greedy choices and draws in one go, against the functions that they are made of."""

from __future__ import annotations

import pytest
import torch

from lorikeet.ops.draw import draw_tokens_torch
from lorikeet.ops.sampling import draw, row_keys, scale_temperature

LOGITS = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 2
TEMPERATURE = torch.tensor([0.0, 1.0, 0.0, 0.2, 5.0, 0.0])
SEEDS, COUNTERS = torch.arange(6) * 1000, torch.arange(6)
LANES = torch.tensor([3, -1, 0, 1, -1, 7])


def run(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return draw_tokens_torch(logits, TEMPERATURE, SEEDS, COUNTERS, LANES, tokens)


def test_each_row_by_its_temperature() -> None:
    tokens, scores = run(LOGITS, torch.zeros(8, dtype=torch.int64))
    for row in range(6):
        part = slice(row, row + 1)
        if TEMPERATURE[row] == 0:
            wanted = LOGITS[part].argmax(dim=-1)
        else:
            scaled = scale_temperature(LOGITS[part], TEMPERATURE[part])
            wanted = draw(scaled, row_keys(SEEDS[part], COUNTERS[part]))
        assert tokens[row] == wanted
        assert scores[row].tolist() == [LOGITS[row].max(), LOGITS[row, tokens[row]]]
    assert tokens.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_without_a_lane_write_nothing(dtype: torch.dtype) -> None:
    lanes = torch.full((8,), -5, dtype=dtype)
    tokens, _ = run(LOGITS, lanes)
    assert lanes[[3, 0, 1, 7]].tolist() == tokens[[0, 2, 3, 5]].tolist()
    assert (lanes[[2, 4, 5, 6]] == -5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    narrow = LOGITS.to(dtype)
    before = narrow.clone()
    tokens, scores = run(narrow, torch.zeros(8, dtype=torch.int64))
    wanted_tokens, wanted_scores = run(narrow.float(), torch.zeros(8, dtype=torch.int64))
    assert torch.equal(tokens, wanted_tokens)
    assert torch.equal(scores, wanted_scores)
    assert torch.equal(narrow, before)


def test_nan_shows_and_the_token_is_valid() -> None:
    logits = LOGITS.clone()
    logits[:, 17] = torch.nan
    tokens, scores = run(logits, torch.zeros(8, dtype=torch.int64))
    assert ((tokens >= 0) & (tokens < 50)).all()
    assert scores[:, 0].isnan().all()
