"""The gated SiLU against its formula."""

from __future__ import annotations

import pytest
import torch

from lorikeet.ops.activation import silu_mul_torch


@pytest.mark.parametrize("with_delta", [False, True])
def test_formula(with_delta: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(5, 12, generator=generator)
    delta = torch.randn(5, 12, generator=generator) if with_delta else None
    before = gate_up.clone()
    total = gate_up if delta is None else gate_up + delta
    gate, up = total[:, :6], total[:, 6:]
    torch.testing.assert_close(silu_mul_torch(gate_up, delta), gate * torch.sigmoid(gate) * up)
    assert torch.equal(gate_up, before)
