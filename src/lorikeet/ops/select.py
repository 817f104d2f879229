"""Which forms of the ops run: looked up once, when a model is built.

Each form is a row of one table, and imports what it needs when it is chosen: Triton is not there on a machine without
a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lorikeet.errors import ConfigError
from lorikeet.ops.activation import SiluMulOp, silu_mul_torch
from lorikeet.ops.draw import DrawOp, draw_tokens_torch
from lorikeet.ops.embedding import EmbedOp, embed_torch
from lorikeet.ops.lora.api import LoRABackend
from lorikeet.ops.lora.metadata import RankPageTable
from lorikeet.ops.lora.torch_ops import TorchBackend
from lorikeet.ops.norm import RMSNormOp, rms_norm_torch
from lorikeet.ops.rope import RopeStoreOp, rope_store_torch


@dataclass(frozen=True, slots=True)
class Ops:
    """The element-wise ops of one model, from the ids of its tokens to the tokens that it chooses."""

    embed: EmbedOp
    rms_norm: RMSNormOp
    rope_store: RopeStoreOp
    silu_mul: SiluMulOp
    draw: DrawOp


def select_ops(device_type: str) -> Ops:
    """The ops for a device (``torch.device.type``).

    Raises:
        ConfigError: nothing runs on such a device, or what runs on it is not installed.
    """
    form = _FORM_OF_DEVICE.get(device_type)
    if form is None:
        raise ConfigError(
            f"device {device_type!r} is not supported; supported: {', '.join(_FORM_OF_DEVICE)}"
        )
    return form()


def _torch_ops() -> Ops:
    return Ops(
        embed=embed_torch,
        rms_norm=rms_norm_torch,
        rope_store=rope_store_torch,
        silu_mul=silu_mul_torch,
        draw=draw_tokens_torch,
    )


def _triton_ops() -> Ops:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"device 'cuda' needs Triton, which does not load ({error}): pip install 'lorikeet[gpu]'"
        ) from error
    from lorikeet.ops.triton.activation import silu_mul_triton
    from lorikeet.ops.triton.embedding import embed_triton
    from lorikeet.ops.triton.norm import rms_norm_triton
    from lorikeet.ops.triton.rope import rope_store_triton
    from lorikeet.ops.triton.sampling import draw_tokens_triton

    return Ops(
        embed=embed_triton,
        rms_norm=rms_norm_triton,
        rope_store=rope_store_triton,
        silu_mul=silu_mul_triton,
        draw=draw_tokens_triton,
    )


_FORM_OF_DEVICE: dict[str, Callable[[], Ops]] = {"cpu": _torch_ops, "cuda": _triton_ops}


BackendName = Literal["torch", "triton", "csgmv"]


def make_backend(
    name: BackendName, table: RankPageTable, *, page_ranks: int, deterministic: bool = False
) -> LoRABackend[Any, Any]:
    """The backend of ``--lora-backend``, ``auto`` resolved.

    Args:
        table: page tables of the pool.
        deterministic: no sums whose order is left open; ``torch`` has none.

    Raises:
        ConfigError: Triton is not installed.
    """
    if name == "torch":
        return TorchBackend()
    try:
        from lorikeet.ops.lora.triton.backend import TritonBackend
    except ImportError as error:
        raise ConfigError(
            f"--lora-backend {name} needs Triton, which does not load ({error}): pip install 'lorikeet[gpu]'"
        ) from error
    return TritonBackend(table, page_ranks=page_ranks, deterministic=deterministic)
