"""Which form of each op runs: looked up once, when a model is built.

A form is added by a row in its op's table. A device takes the first form of its list that the op has, so an op without
a Triton form runs in torch there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from lorikeet.errors import ConfigError
from lorikeet.ops.activation import SiluMulOp, silu_mul_torch
from lorikeet.ops.norm import RMSNormOp, rms_norm_torch
from lorikeet.ops.rope import RopeStoreOp, rope_store_torch

OpT = TypeVar("OpT")

_FORMS_OF_DEVICE: dict[str, tuple[str, ...]] = {"cpu": ("torch",), "cuda": ("triton", "torch")}

_RMS_NORM: dict[str, RMSNormOp] = {"torch": rms_norm_torch}
_ROPE_STORE: dict[str, RopeStoreOp] = {"torch": rope_store_torch}
_SILU_MUL: dict[str, SiluMulOp] = {"torch": silu_mul_torch}


@dataclass(frozen=True, slots=True)
class Ops:
    """The element-wise ops that the layers of one model call."""

    rms_norm: RMSNormOp
    rope_store: RopeStoreOp
    silu_mul: SiluMulOp


def select_ops(device_type: str) -> Ops:
    """The ops for a device (``torch.device.type``).

    Raises:
        ConfigError: nothing runs on such a device.
    """
    forms = _FORMS_OF_DEVICE.get(device_type)
    if forms is None:
        raise ConfigError(
            f"device {device_type!r} is not supported; supported: {', '.join(_FORMS_OF_DEVICE)}"
        )
    return Ops(
        rms_norm=_first(_RMS_NORM, forms),
        rope_store=_first(_ROPE_STORE, forms),
        silu_mul=_first(_SILU_MUL, forms),
    )


def _first(table: Mapping[str, OpT], forms: tuple[str, ...]) -> OpT:
    return next(table[form] for form in forms if form in table)
