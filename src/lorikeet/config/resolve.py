"""From the options as given to the settings: check them all, and choose every automatic value that needs no model."""

from __future__ import annotations

import secrets
from dataclasses import fields
from typing import Any, TypeVar

from lorikeet import demo
from lorikeet.config.device import (
    check_ranks,
    max_graph_rows,
    max_graph_tokens,
    resolve_attention,
    resolve_device,
    resolve_lora_backend,
)
from lorikeet.config.lora import check_names, expand_targets, real_directory, resolve_enable_lora
from lorikeet.config.lora_paths import LoRAPath
from lorikeet.config.server_config import OPTIONS, ServerConfig
from lorikeet.config.settings import HTTPSettings, LoRASettings, Settings
from lorikeet.config.values import read_value
from lorikeet.errors import ConfigError

_T = TypeVar("_T", Settings, LoRASettings, HTTPSettings)
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}


def resolve(options: ServerConfig) -> Settings:
    """The settings that options stand for. Called once, where a program begins: a server, an ``LLM``, a command.

    Raises:
        ConfigError: names the option, its value and what is allowed.
    """
    given: dict[str, Any] = {
        name: read_value(option, getattr(options, name)) for name, option in OPTIONS.items()
    }
    given["lora_paths"] = _expand_demo(given["lora_paths"])
    values = given | _choose(ServerConfig(**given))
    values["lora"] = _pick(LoRASettings, values)
    values["http"] = _pick(HTTPSettings, values)
    return _pick(Settings, values)


def _pick(kind: type[_T], values: dict[str, Any]) -> _T:
    return kind(**{field.name: values[field.name] for field in fields(kind)})


def _choose(options: ServerConfig) -> dict[str, Any]:
    """The values of options that are chosen here or written in another way than given."""
    served = options.served_model_name or options.model_path
    model = str(demo.model_path()) if demo.is_demo(options.model_path) else options.model_path
    check_names(served, options.lora_paths)
    device = resolve_device(options.device)
    check_ranks(options.tp_size)
    enable_lora = resolve_enable_lora(options)
    page_size = options.page_size or 16
    _check_total_tokens(options.max_total_tokens, page_size)
    max_running = options.max_running_requests or (48 if device == "cpu" else 256)
    chunk = options.chunked_prefill_size or (2048 if device == "cpu" else 8192)
    resolver, seed = options.lora_resolver_dir, options.random_seed
    return {
        "model_path": model,
        "served_model_name": served,
        "tokenizer_path": options.tokenizer_path or model,
        "dtype": _DTYPE_ALIASES.get(options.dtype, options.dtype),
        "device": device,
        "enable_lora": enable_lora,
        "lora_backend": resolve_lora_backend(device, options.lora_backend),
        "lora_target_modules": expand_targets(options.lora_target_modules),
        "lora_root": tuple(real_directory("lora_root", path) for path in options.lora_root),
        "lora_resolver_dir": real_directory("lora_resolver_dir", resolver) if resolver else None,
        "max_running_requests": max_running,
        "chunked_prefill_size": chunk,
        "max_prefill_tokens": options.max_prefill_tokens or 16384,
        "page_size": page_size,
        "cuda_graph_max_bs": max_graph_rows(
            device, options.cuda_graph_bs, options.cuda_graph_max_bs, max_running
        ),
        "piecewise_cuda_graph_max_tokens": max_graph_tokens(
            device, options.piecewise_cuda_graph_max_tokens, chunk
        ),
        "attention_backend": resolve_attention(device, options.attention_backend),
        "random_seed": secrets.randbelow(2**31) if seed is None else seed,
    }


def _expand_demo(adapters: tuple[LoRAPath, ...]) -> tuple[LoRAPath, ...]:
    """The adapters, with the embedded ones in the place of the word ``demo``."""
    expanded: list[LoRAPath] = []
    for entry in adapters:
        if demo.is_demo(entry.name) and demo.is_demo(entry.path):
            found = demo.adapter_paths().items()
            expanded += [LoRAPath(name, str(where), pinned=entry.pinned) for name, where in found]
        else:
            expanded.append(entry)
    return tuple(expanded)


def _check_total_tokens(tokens: int | None, page_size: int) -> None:
    if tokens is not None and tokens < page_size:
        raise ConfigError(
            f"--max-total-tokens is {tokens}; allowed: at least one page (--page-size {page_size})"
        )


def notes(settings: Settings) -> list[str]:
    """A sentence for each option that was given and has no effect here; the caller logs them."""
    reasons: dict[str, str] = {}
    if settings.device == "cpu":
        graphs = [name for name in OPTIONS if "cuda_graph" in name]
        reasons = dict.fromkeys(graphs, "a CPU has no CUDA graphs")
        reasons["disable_overlap_schedule"] = "a CPU runs one step at a time"
    if settings.lora.lora_backend != "csgmv":
        reasons["max_lora_chunk_size"] = "only the csgmv backend has chunks"
    values = settings.by_option()
    return [
        f"{OPTIONS[name].flag} has no effect: {reason}"
        for name, reason in reasons.items()
        if values[name] != OPTIONS[name].default
    ]
