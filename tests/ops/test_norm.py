"""RMSNorm against its formula."""

from __future__ import annotations

import pytest
import torch

from lorikeet.ops.norm import rms_norm_torch

EPS = 1e-5


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_delta", [False, True])
def test_formula(with_residual: bool, with_delta: bool) -> None:
    x, weight = draw(5, 24), draw(24, seed=1)
    residual = draw(5, 24, seed=2) if with_residual else None
    delta = draw(5, 24, seed=3) if with_delta else None
    operands = [t for t in (x, weight, residual, delta) if t is not None]
    copies = [t.clone() for t in operands]
    y, total = rms_norm_torch(x, weight, EPS, residual, delta)
    wanted = sum((t for t in (residual, delta) if t is not None), x)
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(y, formula(wanted, weight).float())
    assert all(torch.equal(a, b) for a, b in zip(operands, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_in_float32(dtype: torch.dtype) -> None:
    """Squares of these values overflow float16."""
    x, weight = draw(5, 64, dtype=dtype) * 400, draw(64, seed=1, dtype=dtype)
    y, total = rms_norm_torch(x, weight, EPS)
    assert y.dtype == total.dtype == dtype
    torch.testing.assert_close(y.double(), formula(x, weight), rtol=0.02, atol=1e-3)


def test_heads() -> None:
    x, weight = draw(5, 3, 8), draw(8, seed=1)
    torch.testing.assert_close(rms_norm_torch(x, weight, EPS)[0], formula(x, weight).float())
