"""The RMSNorm kernel in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lorikeet.ops.triton.norm import rms_norm_triton
from tests.support.op_cases import EPS, OpCases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_equals_torch(dtype: torch.dtype, residual: bool, delta: bool) -> None:
    OpCases("cpu", dtype).rms_norm(5, 48, residual=residual, delta=delta)


@pytest.mark.parametrize(("tokens", "features"), [(0, 8), (1, 1), (1, 64), (3, 100), (2, 1536)])
def test_shapes(tokens: int, features: int) -> None:
    OpCases("cpu", torch.float32).rms_norm(tokens, features, residual=True, delta=True)


def test_strided_rows() -> None:
    OpCases("cpu", torch.float16).rms_norm(4, 40, residual=True, delta=True, strided=True)


def test_without_a_sum_the_residual_is_x_itself() -> None:
    x = OpCases("cpu", torch.float32).draw(2, 8)
    assert rms_norm_triton(x, torch.ones(8), EPS)[1] is x


def test_squares_beyond_float16() -> None:
    x = OpCases("cpu", torch.float16).draw(3, 64) * 400
    y, _ = rms_norm_triton(x, torch.ones(64, dtype=torch.float16), EPS)
    torch.testing.assert_close(y.float().square().mean(-1), torch.ones(3), rtol=1e-2, atol=0)


def test_operands_that_do_not_fit_are_refused() -> None:
    x, weight = torch.zeros(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"an operand is \(2, 8\) beside \(3, 8\)"):
        rms_norm_triton(x, weight, EPS, torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"\(3, 8\) has stride 3, not 1"):
        rms_norm_triton(torch.zeros(8, 3).t(), weight, EPS)
