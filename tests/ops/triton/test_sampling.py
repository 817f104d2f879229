"""The sampling kernel in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lorikeet.ops.sampling import MAX_TEMPERATURE, MIN_TEMPERATURE
from lorikeet.ops.triton import sampling
from lorikeet.ops.triton.sampling import draw_tokens_triton
from tests.support.op_cases import OpCases

MIXED = [0.0, 1.0, 0.3, 2.5]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small vocabularies take several blocks too."""
    monkeypatch.setattr(sampling, "_MAX_BLOCK", 128)


def run(
    logits: torch.Tensor, temperature: list[float], lanes: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = logits.shape[0]
    numbers = torch.arange(rows)
    tokens = torch.zeros(max(rows, 1), dtype=torch.int64)
    temperatures = torch.tensor(temperature)
    return draw_tokens_triton(logits, temperatures, numbers, numbers, numbers + lanes, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocab", [2, 64, 1000])
def test_equals_torch(dtype: torch.dtype, vocab: int) -> None:
    OpCases("cpu", dtype).draw_tokens(13, vocab, MIXED)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("vocab", [127, 128, 129, 640, 1000])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 20.0])
def test_several_blocks(vocab: int, sharpness: float) -> None:
    """Sharpness 0: all tokens are equal, and noise alone decides, or for greedy the lowest id."""
    OpCases("cpu", torch.float32).draw_tokens(9, vocab, MIXED, sharpness=sharpness)


@pytest.mark.parametrize("lanes", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [torch.int32, torch.int64])
def test_integer_types(lanes: torch.dtype, tokens: torch.dtype) -> None:
    OpCases("cpu", torch.float32).draw_tokens(5, 50, MIXED, dtypes=(lanes, tokens))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("temperature", [MIN_TEMPERATURE, 1e-6, MAX_TEMPERATURE])
def test_extreme_temperatures(temperature: float) -> None:
    OpCases("cpu", torch.float32).draw_tokens(5, 300, [temperature])


@pytest.mark.usefixtures("small_blocks")
def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(3, 400)
    logits[0, [390, 200, 70]] = 2.0
    logits[1, 399] = 1.0
    assert run(logits, [0.0] * 3)[0].tolist() == [70, 399, 0]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("at", [0, 5, 130, 299])
def test_nan_shows_and_the_token_is_valid(temperature: float, at: int) -> None:
    logits = OpCases("cpu", torch.float32).draw(2, 300)
    logits[0, at] = torch.nan
    logits[0, (at + 1) % 300] = torch.inf
    tokens, scores = run(logits, [temperature] * 2)
    assert 0 <= tokens[0] < 300
    assert scores[0, 0].isnan()
    assert scores[1].isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_of_one_value_that_is_not_finite(temperature: float, value: float) -> None:
    logits = torch.full((1, 100), value)
    tokens, scores = run(logits, [temperature])
    assert 0 <= tokens[0] < 100
    torch.testing.assert_close(scores, torch.full((1, 2), value), equal_nan=True)


def test_no_rows() -> None:
    tokens, scores = run(torch.zeros(0, 10), [])
    assert tokens.shape == (0,)
    assert scores.shape == (0, 2)


def test_one_entry_for_each_row() -> None:
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"an operand is \(1,\) beside \(2,\)"):
        draw_tokens_triton(torch.zeros(2, 10), torch.zeros(2), one, one, one, one)
