"""Angles of the rotary embedding, computed once for a step and used by every layer.

Formulas and their order of rounding follow transformers' ``modeling_rope_utils.py``; sources: RoPE arXiv 2104.09864,
YaRN arXiv 2309.00071, Llama 3.1's scaling as released with its weights.

Shape legend: T tokens, H head size, F = H / 2 frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lorikeet.core.rope import RopeSpec
from lorikeet.layers.batch import ForwardBatch


class RotaryEmbedding:
    """cos and sin of a step's tokens.

    Args:
        num_positions: on a GPU those of positions below this are computed once (4 H bytes each), so that a step only
            looks them up: one small kernel in place of six.
    """

    def __init__(
        self, rope: RopeSpec, head_dim: int, device: torch.device, num_positions: int = 0
    ) -> None:
        self._rope = rope
        self._inv_freq_F = inverse_frequencies(rope, head_dim).to(device)
        self._table_PH: torch.Tensor | None = None
        if device.type == "cuda" and num_positions > 0:
            self._table_PH = self._at(torch.arange(num_positions, device=device))

    def cos_sin(self, batch: ForwardBatch) -> torch.Tensor:
        """cos and sin of the batch's tokens, float32 [T, H]: cos in the first half of the columns, sin in the second."""
        if self._table_PH is not None:
            return self._table_PH.index_select(0, batch.positions_T)
        return self._at(batch.positions_T)

    def _at(self, positions_T: torch.Tensor) -> torch.Tensor:
        angles_TF = positions_T.unsqueeze(-1).float() * self._inv_freq_F
        cos_sin_TH = torch.cat((angles_TF.cos(), angles_TF.sin()), dim=-1)
        factor = self._rope.attention_factor
        return cos_sin_TH if factor == 1.0 else cos_sin_TH * factor


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Angle per position of each pair of dimensions, float32 [F] on the CPU.

    ``dynamic`` scaling changes nothing within the trained length, and longer sequences are not served
    (``ModelSpec.max_context_length``).
    """
    return _SCALINGS[rope.kind](_unscaled(rope.theta, head_dim), rope)


def _unscaled(theta: float, head_dim: int) -> torch.Tensor:
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim))


def _keep(inv_freq_F: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    return inv_freq_F


def _linear(inv_freq_F: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    return inv_freq_F / rope.factor


def _llama3(inv_freq_F: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Divide wavelengths beyond the trained length, keep short ones, blend between."""
    original, low, high = rope.original_max_position, rope.low_freq_factor, rope.high_freq_factor
    wavelength_F = 2 * math.pi / inv_freq_F
    scaled_F = torch.where(wavelength_F > original / low, inv_freq_F / rope.factor, inv_freq_F)
    smooth_F = (original / wavelength_F - low) / (high - low)
    blended_F = (1 - smooth_F) * scaled_F / rope.factor + smooth_F * scaled_F
    is_between_F = (wavelength_F >= original / high) & (wavelength_F <= original / low)
    return torch.where(is_between_F, blended_F, scaled_F)


def _yarn(inv_freq_F: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Keep dimensions that turn often within the trained length, divide those that turn rarely, blend between."""
    dims = 2 * inv_freq_F.shape[0]

    def dimension_of(rotations: float) -> float:
        length = rope.original_max_position / (rotations * 2 * math.pi)
        return dims * math.log(length) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001  # as the reference does: a step instead of a division by zero
    ramp_F = ((torch.arange(dims // 2, device="cpu").float() - low) / (high - low)).clamp(0, 1)
    keep_F = 1 - ramp_F
    return inv_freq_F / rope.factor * (1 - keep_F) + inv_freq_F * keep_F


_SCALINGS: dict[str, Callable[[torch.Tensor, RopeSpec], torch.Tensor]] = {
    "default": _keep,
    "dynamic": _keep,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
