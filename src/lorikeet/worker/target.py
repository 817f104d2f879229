"""What runs where: the type and the device that were chosen, the attention backend that serves them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorikeet.attention.base import AttentionBackend
from lorikeet.attention.cut import CutAttention
from lorikeet.attention.flashinfer import FlashInferBackend
from lorikeet.attention.sdpa import SDPABackend
from lorikeet.config import Settings
from lorikeet.kv.storage import KVStorage
from lorikeet.models.spec import ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_LEAST_LOGITS_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What runs where.

    Attributes:
        dtype: of weights, adapters, activations and K/V.
        context_length: longest sequence.
    """

    config: Settings
    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device
    attention: CutAttention
    context_length: int

    @property
    def page_size(self) -> int:
        return self.config.page_size

    @property
    def max_running(self) -> int:
        return self.config.max_running_requests

    @property
    def max_logits_rows(self) -> int:
        """Rows of logits that are there at a time: one for each running sequence. The log-probabilities of prompts are
        computed in pieces of as many, but not of so few that reading the LM head's weights is all that they do."""
        return max(self.max_running, _LEAST_LOGITS_ROWS)

    @property
    def kv_head_dim(self) -> int:
        """Head size of the K/V storage."""
        return self.attention.storage_head_dim(self.spec.head_dim)

    def storage(self, num_pages: int) -> KVStorage:
        """K/V of a number of pages."""
        return KVStorage(
            num_layers=self.spec.num_layers,
            num_pages=num_pages,
            page_size=self.page_size,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.kv_head_dim,
            dtype=self.dtype,
            device=self.device,
            zero=self.kv_head_dim != self.spec.head_dim,
        )


def resolve_dtype(config: Settings, spec: ModelSpec) -> torch.dtype:
    """The dtype of weights, adapters and K/V: as given; ``auto`` is float32 on a CPU and the checkpoint's on a GPU.

    A CPU computes float32 faster than bfloat16 on most machines, and exactly what the tests compare with. A GPU has no
    use for float32 unless it is asked for: such a checkpoint is served in float16, as the field does.
    """
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if config.device == "cpu":
        return torch.float32
    return torch.float16 if spec.dtype == "float32" else DTYPES[spec.dtype]


def make_attention(
    config: Settings, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> CutAttention:
    """The attention backend of ``--attention-backend``.

    Raises:
        ConfigError: it does not serve this device or type.
    """
    return CutAttention(_make_backend(config, spec, dtype, device))


def _make_backend(
    config: Settings, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    name = config.attention_backend
    if name == "auto":
        name = "sdpa" if dtype == torch.float32 else "flashinfer"
    if name == "sdpa":
        return SDPABackend()
    return FlashInferBackend(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        page_size=config.page_size,
        dtype=dtype,
        device=device,
        prefill="fa3" if name == "fa3" else "fa2",
    )
