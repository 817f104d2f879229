"""From the options as given to the settings: check them all, and choose every automatic value that needs no model.

The second half is about the options of adapters and what they have to agree on: names, counts, module names, directories.
"""

from __future__ import annotations

import secrets
from dataclasses import fields
from pathlib import Path
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
from lorikeet.config.lora_paths import LoRAPath
from lorikeet.config.server_config import OPTIONS, ServerConfig
from lorikeet.config.settings import HTTPSettings, LoRASettings, Settings
from lorikeet.config.values import read_value
from lorikeet.errors import ConfigError, RequestError
from lorikeet.masking import mask
from lorikeet.names import MAX_PATH, check_name, is_reserved

_T = TypeVar("_T", Settings, LoRASettings, HTTPSettings)
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}
# PEFT's names of the modules of the supported families; the engine checks them against the model it has loaded.
TARGET_MODULES = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
    *("embed_tokens", "lm_head"),
)
# Names of packed projections that users of the field write for their parts.
_PACKED_TARGETS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Options that mean nothing without LoRA; those of _LIMITS are needed if there is no adapter at start.
_LIMITS = ("max_lora_rank", "lora_target_modules")
_LORA_ONLY = (
    *("max_loaded_loras", *_LIMITS, "lora_root", "lora_sources", "lora_allow_private_hosts"),
    *("lora_download_timeout", "lora_resolver_dir", "lora_disk_cache_dir", "lora_disk_cache_gb"),
)


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


def check_names(served: str, adapters: tuple[LoRAPath, ...]) -> None:
    """Check that the names of the base model and of the adapters at start tell them apart in a request.

    Raises:
        ConfigError: names the option, the name and what is allowed.
    """
    if ":" in served:
        raise ConfigError(
            f"--served-model-name is {served!r} (--model-path unless given); allowed: a name without ':', "
            "which separates base and adapter in a request's model"
        )
    seen: dict[str, str] = {}
    for entry in adapters:
        _check_adapter(entry, served)
        if entry.name in seen:
            raise ConfigError(
                f"--lora-paths names the adapter {entry.name!r} twice ({mask(seen[entry.name])} and {mask(entry.path)}); "
                "allowed: a different name for each, as NAME=PATH"
            )
        seen[entry.name] = entry.path
    if served in seen:
        raise ConfigError(
            f"--lora-paths names an adapter {served!r} like the base model; rename the adapter with NAME=PATH "
            "or the base with --served-model-name"
        )


def _check_adapter(entry: LoRAPath, served: str) -> None:
    try:
        check_name(entry.name, "the adapter's name")
        check_name(entry.path, "the adapter's path", most=MAX_PATH)
    except RequestError as error:
        raise ConfigError(f"--lora-paths: {error}; a name is given as NAME=PATH") from error
    if entry.name != served and is_reserved(entry.name, served):
        raise ConfigError(
            f"--lora-paths names an adapter {entry.name!r}, by which requests name the base {served!r} with the adapter that "
            "follows; rename it with NAME=PATH"
        )


def resolve_enable_lora(options: ServerConfig) -> bool:
    """Whether adapters are served: as given, else if there are ``--lora-paths``.

    Raises:
        ConfigError: the options contradict each other or are not enough to serve adapters with.
    """
    is_on = bool(options.lora_paths) if options.enable_lora is None else options.enable_lora
    if options.lora_paths and not is_on:
        raise ConfigError("--no-enable-lora contradicts --lora-paths; leave one of them out")
    given = [name for name in _LORA_ONLY if getattr(options, name) != OPTIONS[name].default]
    if not is_on:
        if given:
            flags = ", ".join(OPTIONS[name].flag for name in given)
            raise ConfigError(f"{flags} given, but LoRA is off; add --enable-lora or --lora-paths")
        return False
    missing = [OPTIONS[name].flag for name in _LIMITS if name not in given]
    if missing and not options.lora_paths:
        raise ConfigError(
            f"--enable-lora without --lora-paths needs {' and '.join(missing)}: "
            "there is no adapter to take the value from"
        )
    _check_counts(options)
    _check_targets(options.lora_target_modules)
    return True


def _check_counts(options: ServerConfig) -> None:
    per_batch, loaded = options.max_loras_per_batch, options.max_loaded_loras
    given = len(options.lora_paths)
    if loaded is not None and loaded < per_batch:
        raise ConfigError(
            f"--max-loaded-loras is {loaded}; allowed: at least --max-loras-per-batch ({per_batch})"
        )
    if loaded is not None and loaded < given:
        raise ConfigError(
            f"--max-loaded-loras is {loaded}; allowed: at least the number of --lora-paths ({given})"
        )
    pinned = [entry.name for entry in options.lora_paths if entry.pinned]
    if len(pinned) > per_batch - 1:
        raise ConfigError(
            f"--lora-paths pins {len(pinned)} adapters ({', '.join(pinned)}); allowed: at most "
            f"--max-loras-per-batch - 1 ({per_batch - 1}), to prevent starvation of the others"
        )


def _check_targets(targets: tuple[str, ...] | None) -> None:
    if targets is None or targets == ("all",):
        return
    if not targets:
        raise ConfigError("--lora-target-modules is empty; allowed: module names, or all")
    if "all" in targets:
        raise ConfigError("--lora-target-modules: all stands alone; leave the other names out")
    known = (*TARGET_MODULES, *_PACKED_TARGETS)
    if unknown := [name for name in targets if name not in known]:
        raise ConfigError(
            f"--lora-target-modules: unknown {', '.join(unknown)}; known: {', '.join(known)}, or all alone"
        )


def expand_targets(targets: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The module names, with the parts of a packed projection in the place of its name."""
    if targets is None:
        return None
    parts = [part for name in targets for part in _PACKED_TARGETS.get(name, (name,))]
    return tuple(dict.fromkeys(parts))


def real_directory(name: str, path: str) -> str:
    """The real path of the directory that option ``name`` gives: a link that changes later changes nothing.

    Raises:
        ConfigError: there is no such directory.
    """
    try:
        found = Path(path).expanduser().resolve()
        if found.is_dir():
            return str(found)
    except (OSError, RuntimeError, ValueError):  # a loop of links, a home that is not there, a NUL
        pass
    raise ConfigError(f"{OPTIONS[name].flag} is {path!r}; allowed: a directory that exists")
