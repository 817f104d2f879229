"""The settings of an engine and its server: what :func:`lorikeet.config.resolve` makes of the options as given."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from lorikeet.config.lora_paths import LoRAPath
from lorikeet.config.server_config import OPTIONS


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Which adapters are served, how many at a time, and where they may come from. Without ``Settings.enable_lora`` none of
    it matters."""

    lora_paths: tuple[LoRAPath, ...]
    max_loras_per_batch: int
    max_loaded_loras: int | None  # None: unlimited
    lora_eviction_policy: Literal["lru", "fifo"]
    max_lora_rank: int | None  # None: the largest of lora_paths, found when the engine starts
    lora_target_modules: tuple[str, ...] | None  # None: the union over lora_paths, found likewise

    lora_backend: Literal["torch", "triton", "csgmv"]
    max_lora_chunk_size: int | None  # None: what the kernels are made for
    lora_deterministic: bool

    lora_root: tuple[str, ...]
    lora_sources: tuple[str, ...]
    lora_allow_private_hosts: bool
    lora_download_timeout: float
    lora_resolver_dir: str | None  # None: no name is looked up
    lora_disk_cache_dir: str | None  # None: below the home directory, if one is needed
    lora_disk_cache_gb: float | None  # None: what SourceOptions says


@dataclass(frozen=True, kw_only=True)
class HTTPSettings:
    """Where the server listens, who may call it, and how its API behaves. The engine needs none of it. A key that is None is
    not asked for."""

    host: str
    port: int
    api_key: str | None = field(repr=False)
    admin_api_key: str | None = field(repr=False)
    allowed_origins: tuple[str, ...]
    allowed_hosts: tuple[str, ...]
    enable_metrics: bool
    tool_call_parser: str | None  # None: from the chat template
    shutdown_timeout: float
    watchdog_timeout: float


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every option, checked, and every automatic value chosen that needs no model. A setting has its option's name.

    What needs the model is decided when the engine starts, and stays None or ``auto`` here.
    """

    model_path: str
    served_model_name: str
    tokenizer_path: str
    load_format: Literal["auto", "safetensors", "dummy"]
    sampling_defaults: Literal["model", "openai"]
    random_seed: int
    log_level: Literal["debug", "info", "warning", "error", "critical"]

    device: Literal["cpu", "cuda"]
    tp_size: int
    dtype: Literal["auto", "float32", "float16", "bfloat16"]  # auto: the checkpoint's, on a GPU
    attention_backend: Literal["auto", "sdpa", "flashinfer", "fa3"]  # auto: follows the dtype

    context_length: int | None  # None: the model's
    page_size: int
    max_total_tokens: int | None  # None: what the memory holds
    mem_fraction_static: float | None  # None: what the device and the largest step leave
    disable_radix_cache: bool

    max_running_requests: int
    max_queued_requests: int | None  # None: unlimited
    chunked_prefill_size: int
    max_prefill_tokens: int
    schedule_policy: Literal["fcfs", "lpm"]
    disable_overlap_schedule: bool

    # A CPU has no graphs: there nothing is chosen, and what is given has no effect.
    cuda_graph_max_bs: int | None
    cuda_graph_bs: tuple[int, ...] | None  # None: the worker's sizes up to cuda_graph_max_bs
    disable_cuda_graph: bool
    piecewise_cuda_graph_max_tokens: int | None
    disable_piecewise_cuda_graph: bool

    enable_lora: bool
    lora: LoRASettings
    http: HTTPSettings

    def by_option(self) -> dict[str, object]:
        """The settings by the names of their options, in the order of the options, without the keys."""
        values = asdict(self) | asdict(self.lora) | asdict(self.http)
        return {name: values[name] for name, option in OPTIONS.items() if not option.secret}
