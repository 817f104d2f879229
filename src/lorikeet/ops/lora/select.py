"""Which LoRA backend runs: looked up once, when an engine starts."""

from __future__ import annotations

from typing import Any, Literal

from lorikeet.errors import ConfigError
from lorikeet.ops.lora.api import LoRABackend
from lorikeet.ops.lora.metadata import RankPageTable
from lorikeet.ops.lora.torch_ops import TorchBackend

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
