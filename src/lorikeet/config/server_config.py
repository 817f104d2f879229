"""The options of a server, a command or an ``LLM``, as they are given: one dataclass, one field per option."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_type_hints

from lorikeet.config.lora_paths import LoRAPath
from lorikeet.config.values import Option

# Where an adapter may come from.
LORA_SOURCES = ("local", "hub", "http", "https", "s3", "gs")
_T = TypeVar("_T")
_REQUIRED: Any = MISSING
_TOOL_PARSERS = ("hermes", "llama3", "mistral", "qwen", "qwen25")


def _option(default: _T, meaning: str, **rules: Any) -> _T:
    """A field with its option: the keywords are those of :class:`Option`."""
    secret = rules.get("secret", False)
    return field(
        default=default, repr=not secret, metadata={"option": Option(meaning=meaning, **rules)}
    )


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Every option as it was given, under its name with underscores. None means: choose for me.

    A value may still be the text of a command line or a YAML file: :func:`lorikeet.config.resolve` reads and checks it.
    """

    model_path: str = _option(
        _REQUIRED,
        "base model in Hugging Face format: a directory, a hub id, or demo",
        aliases=("model",),
    )
    tokenizer_path: str | None = _option(None, "directory of the tokenizer", auto="the model's")
    served_model_name: str | None = _option(
        None, "name of the base model in the HTTP API", auto="--model-path as given"
    )
    host: str = _option("127.0.0.1", "address that the HTTP server binds")
    port: int = _option(30000, "port of the HTTP server", least=1, most=65535)
    api_key: str | None = _option(
        None, "key that HTTP requests must carry", auto="LORIKEET_API_KEY, or no key", secret=True
    )
    admin_api_key: str | None = _option(
        None,
        "key for requests that change the server",
        auto="LORIKEET_ADMIN_API_KEY, or --api-key",
        secret=True,
    )
    allowed_origins: tuple[str, ...] = _option(
        (),
        "web pages of other origins that may call the server (CORS), as https://host:port, or * for all; none: no page but "
        "the server's own",
        aliases=("cors-allow-origins",),
    )
    allowed_hosts: tuple[str, ...] = _option(
        (),
        "names of this server, as in a Host header, besides --host, localhost and addresses; needed where --host is a loopback "
        "address and a proxy passes another name on",
    )
    log_level: Literal["debug", "info", "warning", "error", "critical"] = _option(
        "info", "least level that is logged"
    )
    tool_call_parser: str | None = _option(
        None, "form of the model's tool calls", auto="from the chat template", choices=_TOOL_PARSERS
    )
    sampling_defaults: Literal["model", "openai"] = _option(
        "model",
        "what OpenAI requests get that do not say: temperature, top_p, top_k, min_p and repetition_penalty of the model's "
        "generation_config.json, or OpenAI's own",
    )
    dtype: Literal["auto", "float32", "float", "float16", "half", "bfloat16"] = _option(
        "auto",
        "of weights, adapters and K/V; auto is float32 on a CPU, the checkpoint's own on a GPU (float16 for float32)",
    )
    device: Literal["auto", "cpu", "cuda"] = _option(
        "auto", "where the model runs; auto is cuda if there is a CUDA device"
    )
    context_length: int | None = _option(
        None, "longest prompt plus completion, in tokens", auto="the model's", least=2
    )
    enable_lora: bool | None = _option(
        None, "serve LoRA adapters", auto="on if --lora-paths is given"
    )
    lora_paths: tuple[LoRAPath, ...] = _option(
        (),
        "adapters loaded at start: PATH, NAME=PATH, JSON with lora_name, lora_path and pinned, or demo",
    )
    max_loras_per_batch: int = _option(
        8, "distinct adapters in one batch; requests for the base model do not count", least=1
    )
    max_loaded_loras: int | None = _option(
        None, "adapters held in host memory at a time", auto="unlimited", least=1
    )
    lora_eviction_policy: Literal["lru", "fifo"] = _option(
        "lru", "which adapter leaves device memory when the pool is full"
    )
    lora_backend: Literal["auto", "torch", "triton", "csgmv"] = _option(
        "auto", "kernels of the adapters; auto is torch on a CPU, csgmv on a GPU"
    )
    max_lora_rank: int | None = _option(
        None, "largest rank accepted", auto="the largest of --lora-paths", least=1
    )
    lora_target_modules: tuple[str, ...] | None = _option(
        None, "modules that may carry LoRA, or all", auto="the union over --lora-paths"
    )
    max_lora_chunk_size: int | None = _option(
        None,
        "longest chunk of the csgmv backend",
        auto="64; fewer tokens have shorter ones",
        choices=(16, 32, 64, 128),
    )
    lora_deterministic: bool = _option(
        default=False,
        meaning="LoRA kernels sum in a fixed order: the same batch gives the same bits, a little slower",
    )
    lora_root: tuple[str, ...] = _option(
        (),
        "directories that hold every local adapter which a request may load; none: any directory",
    )
    lora_sources: tuple[str, ...] = _option(
        LORA_SOURCES,
        "kinds of source that requests may load adapters from",
        choices=LORA_SOURCES,
    )
    lora_allow_private_hosts: bool = _option(
        default=False,
        meaning="requests may load adapters from web servers whose address is not public: this machine, a local network",
    )
    lora_download_timeout: float = _option(
        600.0,
        "seconds that a download of an adapter may take; the next one goes on from there",
        above=0,
    )
    lora_resolver_dir: str | None = _option(
        None, "directory where a name that is not loaded is looked up on its first use"
    )
    lora_disk_cache_dir: str | None = _option(
        None, "where adapters from s3://, gs:// and http(s):// are kept", auto="~/.cache/lorikeet"
    )
    lora_disk_cache_gb: float | None = _option(
        None, "most GB (10^9 bytes) that are kept there", auto="20", above=0
    )
    tp_size: int = _option(1, "tensor-parallel ranks", least=1, aliases=("tp",))
    mem_fraction_static: float | None = _option(
        None,
        "part of the memory for weights, adapter pool and K/V",
        auto="half of what is free on a CPU; on a GPU all that the largest step leaves",
        above=0,
        below=1,
    )
    max_running_requests: int | None = _option(
        None,
        "sequences that run at a time",
        auto="256 on a GPU, 48 on a CPU, where each one makes the step longer that all wait for",
        least=1,
    )
    max_queued_requests: int | None = _option(
        None, "sequences that may wait; a request beyond them gets 503", auto="unlimited", least=1
    )
    max_total_tokens: int | None = _option(
        None, "tokens that the K/V cache holds", auto="from the memory", least=1
    )
    chunked_prefill_size: int | None = _option(
        None,
        "most tokens computed in one step; longer prompts are split",
        auto="2048, on a GPU 8192",
        least=1,
    )
    max_prefill_tokens: int | None = _option(
        None, "most prompt tokens admitted in one step", auto="16384", least=1
    )
    page_size: int | None = _option(
        None, "tokens in one page of the K/V cache", auto="16", least=1, most=1024
    )
    schedule_policy: Literal["fcfs", "lpm"] = _option(
        "fcfs", "order of admission: first come first served, or longest cached prefix first"
    )
    disable_radix_cache: bool = _option(default=False, meaning="compute every prompt anew")
    cuda_graph_max_bs: int | None = _option(
        None,
        "largest batch with a CUDA graph; a CPU has none",
        auto="--max-running-requests, but at most 256",
        least=1,
    )
    cuda_graph_bs: tuple[int, ...] | None = _option(
        None,
        "batch sizes with a CUDA graph; a CPU has none",
        auto="1, 2, 4 and multiples of 8 up to --cuda-graph-max-bs",
        least=1,
    )
    disable_cuda_graph: bool = _option(
        default=False, meaning="never use CUDA graphs; a CPU has none"
    )
    piecewise_cuda_graph_max_tokens: int | None = _option(
        None,
        "most tokens of a step with prompts that runs in pieces of CUDA graphs; a CPU has none",
        auto="1024, but at most --chunked-prefill-size",
        least=1,
    )
    disable_piecewise_cuda_graph: bool = _option(
        default=False, meaning="run steps with prompts without CUDA graphs; a CPU has none"
    )
    disable_overlap_schedule: bool = _option(
        default=False, meaning="plan a step only when the one before it is done, as on a CPU"
    )
    attention_backend: str | None = _option(
        None,
        "flashinfer or fa3 (a GPU with 16-bit types; fa3 only Hopper, faster for long prompts, and its first start compiles for "
        "minutes), or sdpa (torch_native is its name elsewhere)",
        auto="sdpa on a CPU and for float32, else flashinfer",
    )
    load_format: Literal["auto", "safetensors", "dummy"] = _option(
        "auto", "format of the weights; dummy is random weights from --random-seed"
    )
    random_seed: int | None = _option(
        None, "seed of requests that bring none", auto="drawn at start", least=0, most=2**31 - 1
    )
    enable_metrics: bool = _option(default=False, meaning="serve Prometheus metrics at /metrics")
    shutdown_timeout: float = _option(
        30.0, "seconds that running requests may take after SIGTERM", least=0, most=86400
    )
    watchdog_timeout: float = _option(
        300.0,
        "seconds that the engine may be silent while requests are open, before they fail and the server ends",
        least=1,
        most=86400,
    )


def _table() -> dict[str, Option]:
    hints = get_type_hints(ServerConfig)
    return {
        f.name: replace(
            f.metadata["option"],
            name=f.name,
            type=hints[f.name],
            default=None if f.default is MISSING else f.default,
            required=f.default is MISSING,
        )
        for f in fields(ServerConfig)
    }


OPTIONS: dict[str, Option] = _table()
"""Every option by its field name, in the order of the help."""
