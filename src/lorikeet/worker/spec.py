"""What a worker is built for: model, device and type, the attention backend that serves them, the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorikeet.attention.base import AttentionBackend
from lorikeet.attention.cut import CutAttention
from lorikeet.attention.flashinfer import FlashInferBackend
from lorikeet.attention.sdpa import SDPABackend
from lorikeet.config import Settings
from lorikeet.errors import ConfigError
from lorikeet.kv.storage import KVStorage
from lorikeet.models.spec import ModelSpec
from lorikeet.worker.graphs import default_decode_sizes, default_prompt_sizes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_LEAST_LOGITS_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a worker is built for.

    Attributes:
        dtype: of weights, adapters, activations and K/V.
        context_length: longest sequence.
    """

    settings: Settings
    model: ModelSpec
    dtype: torch.dtype
    device: torch.device
    attention: CutAttention
    context_length: int

    @classmethod
    def resolve(cls, settings: Settings, model: ModelSpec) -> WorkerSpec:
        """Decide what was left open; raises ConfigError if the options do not fit the model or the device."""
        context_length = resolve_context_length(settings, model)
        dtype, device = resolve_dtype(settings, model), torch.device(settings.device)
        return cls(
            settings=settings,
            model=model,
            dtype=dtype,
            device=device,
            attention=CutAttention(_attention(settings, model, dtype, device)),
            context_length=context_length,
        )

    @property
    def page_size(self) -> int:
        return self.settings.page_size

    @property
    def max_running(self) -> int:
        return self.settings.max_running_requests

    @property
    def max_logits_rows(self) -> int:
        """Rows of logits that are there at a time: one for each running sequence. The log-probabilities of prompts are
        computed in pieces of as many, but not of so few that reading the LM head's weights is all that they do."""
        return max(self.max_running, _LEAST_LOGITS_ROWS)

    @property
    def kv_head_dim(self) -> int:
        """Head size of the K/V storage."""
        return self.attention.storage_head_dim(self.model.head_dim)

    @property
    def decode_graphs(self) -> Sequence[int]:
        """Rows of the decode steps that are captured."""
        settings = self.settings
        max_rows, given = settings.cuda_graph_max_bs, settings.cuda_graph_bs
        if settings.disable_cuda_graph or max_rows is None:
            return ()
        if given is None:
            return default_decode_sizes(max_rows)
        return sorted({size for size in given if size <= max_rows})

    @property
    def prompt_graphs(self) -> Sequence[int]:
        """Tokens of the steps with prompts that are captured."""
        settings = self.settings
        max_tokens = settings.piecewise_cuda_graph_max_tokens
        is_off = settings.disable_cuda_graph or settings.disable_piecewise_cuda_graph
        return () if is_off or max_tokens is None else default_prompt_sizes(max_tokens)

    def storage(self, num_pages: int) -> KVStorage:
        """K/V of a number of pages."""
        return KVStorage(
            num_layers=self.model.num_layers,
            num_pages=num_pages,
            page_size=self.page_size,
            num_kv_heads=self.model.num_kv_heads,
            head_dim=self.kv_head_dim,
            dtype=self.dtype,
            device=self.device,
            zero=self.kv_head_dim != self.model.head_dim,
        )


def resolve_dtype(settings: Settings, model: ModelSpec) -> torch.dtype:
    """The dtype of weights, adapters and K/V: as given; ``auto`` is float32 on a CPU and the checkpoint's on a GPU.

    A CPU computes float32 faster than bfloat16 on most machines, and exactly what the tests compare with. A GPU has no
    use for float32 unless it is asked for: such a checkpoint is served in float16, as the field does.
    """
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    if settings.device == "cpu":
        return torch.float32
    return torch.float16 if model.dtype == "float32" else DTYPES[model.dtype]


def _attention(
    settings: Settings, model: ModelSpec, dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    """The backend of ``--attention-backend``; raises ConfigError if it does not serve this device or type."""
    name = settings.attention_backend
    if name == "auto":
        name = "sdpa" if dtype == torch.float32 else "flashinfer"
    if name == "sdpa":
        return SDPABackend()
    return FlashInferBackend(
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        page_size=settings.page_size,
        dtype=dtype,
        device=device,
        prefill="fa3" if name == "fa3" else "fa2",
    )


def resolve_context_length(settings: Settings, model: ModelSpec) -> int:
    """The context that is served: as given, else the model's.

    Raises:
        ConfigError: more is asked for than the model's positions are made for.
    """
    most = model.max_context_length
    if settings.context_length is None:
        return most
    if settings.context_length > most:
        raise ConfigError(
            f"--context-length {settings.context_length} is more than the model's {most} positions; "
            f"allowed: 1 to {most}"
        )
    return settings.context_length
