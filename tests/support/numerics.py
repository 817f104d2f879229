"""Comparing tensors that rounding makes differ."""

from __future__ import annotations

import torch

# What one rounding to the type costs, relative RMS, with room for a second rounding and for another order of a sum.
ROUNDING = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def relative_rms(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS of the difference over the RMS of ``wanted``; elements that are equal, infinities too, differ by 0."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    difference = torch.where(got == wanted, 0.0, got - wanted)
    scale = wanted[wanted.isfinite()].square().sum().sqrt().item()
    return difference.square().sum().sqrt().item() / max(scale, 1e-30)


def assert_close(
    name: str, got: torch.Tensor, wanted: torch.Tensor, ratio: float | None = None
) -> None:
    """Same shape, type and places of NaN, and a relative RMS of at most ``ratio``.

    One number for the whole tensor: a bound per element is either blind or flaky in 16 bits.

    Args:
        ratio: by default what rounding to the type costs.
    """
    assert got.shape == wanted.shape, f"{name}: {tuple(got.shape)}, not {tuple(wanted.shape)}"
    assert got.dtype == wanted.dtype, f"{name}: {got.dtype}, not {wanted.dtype}"
    strays = (got.isnan().cpu() != wanted.isnan().cpu()).sum().item()
    assert not strays, f"{name}: {strays} of {got.numel()} elements are NaN on one side only"
    present = ~wanted.isnan()
    error = relative_rms(got[present], wanted[present])
    most = ROUNDING[got.dtype] if ratio is None else ratio
    assert error <= most, f"{name}: relative RMS error {error:.2e} > {most:.0e}"
