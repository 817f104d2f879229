"""The gated SiLU kernel in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lorikeet.ops.triton.activation import silu_mul_triton
from tests.support.op_cases import OpCases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_equals_torch(dtype: torch.dtype, delta: bool, strided: bool) -> None:
    OpCases("cpu", dtype).silu_mul(3, 20, delta=delta, strided=strided)


@pytest.mark.parametrize(("tokens", "half"), [(0, 8), (1, 1), (1, 1024), (2, 1100), (70, 2100)])
def test_shapes(tokens: int, half: int) -> None:
    """Parts of a block, several blocks, and both sizes of block."""
    OpCases("cpu", torch.float32).silu_mul(tokens, half, delta=True)


def test_a_delta_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"an operand is \(3, 4\) beside \(3, 8\)"):
        silu_mul_triton(torch.zeros(3, 8), torch.zeros(3, 4))
