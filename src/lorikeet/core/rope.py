"""Rotary position embedding as data: which frequencies a model rotates its queries and keys with.

``models/rope_config.py`` reads it from a Hugging Face config, ``layers/rotary.py`` turns it into frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Base frequencies ``theta ** (-2i / head_dim)`` and how they are scaled.

    Attributes:
        kind: ``linear`` divides every frequency by ``factor``; ``dynamic`` changes nothing up to
            the config's ``max_position_embeddings``, beyond which it is not served; ``llama3`` and ``yarn`` divide low frequencies, keep high ones and blend between.
        original_max_position: trained length that ``llama3`` and ``yarn`` refer to.
        low_freq_factor, high_freq_factor: ``llama3``: wavelengths, as parts of the original length, between which
            the blend happens.
        beta_fast, beta_slow: ``yarn``: rotations within the original length between which the blend happens.
        truncate: ``yarn``: round the ends of the blend to whole dimensions.
        attention_factor: multiplies cos and sin, so scores grow by its square; 1 except for ``yarn``.
    """

    kind: RopeKind
    theta: float
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    truncate: bool = True
    attention_factor: float = 1.0
