"""From a configuration to an engine that serves: read the model, divide the memory, load weights and adapters.

Everything that flags or files can get wrong is found here, before the first request.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import torch

import lorikeet
from lorikeet.config import ServerConfig
from lorikeet.core.sampling import MAX_SEED
from lorikeet.core.views import EngineInfo
from lorikeet.engine.adapter_store import NoAdapters
from lorikeet.engine.core import EngineCore
from lorikeet.engine.lora_setup import LoRAParts, build_lora, load_first, no_residency
from lorikeet.engine.paths import tokenizer_dir
from lorikeet.engine.worker_setup import (
    Target,
    check_weights_fit,
    make_attention,
    make_worker,
    resolve_dtype,
    split,
)
from lorikeet.errors import ConfigError
from lorikeet.kv.manager import KVManager
from lorikeet.models.build import build_model
from lorikeet.models.source import locate_model
from lorikeet.models.spec import ModelSpec, read_model_spec, read_sampling_defaults
from lorikeet.parallel.group import SingleRank
from lorikeet.scheduler.scheduler import Scheduler, SchedulerLimits
from lorikeet.worker.grammar.compiler import GrammarCompiler
from lorikeet.worker.memory import MemorySplit

logger = logging.getLogger(__name__)


def build_engine(
    config: ServerConfig, *, report: Callable[[str], None], progress: bool = True
) -> EngineCore:
    """Build the engine of a resolved configuration and load its adapters.

    Args:
        report: told each phase of the start in a few words.
        progress: show bars while weights load and graphs are captured.

    Raises:
        ConfigError, ModelError, AdapterError: flags or files are wrong, or the device is too small.
    """
    directory = locate_model(config.model_path, weights=config.load_format != "dummy")
    spec = read_model_spec(directory)
    try:
        return _build(config, directory, spec, report, progress=progress)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the device ran out of memory at start: {error}. Lower --context-length, --max-total-tokens, "
            "--max-loras-per-batch, --max-lora-rank, --chunked-prefill-size or --max-running-requests, or end what "
            "else uses the device"
        ) from error


def _build(
    config: ServerConfig,
    directory: Path,
    spec: ModelSpec,
    report: Callable[[str], None],
    *,
    progress: bool,
) -> EngineCore:
    defaults = _sampling_defaults(config, directory, spec)
    target = _target(config, spec)
    report(f"loading the weights of {config.model_path}")
    model = build_model(
        directory,
        spec,
        dtype=target.dtype,
        device=target.device,
        load_format=config.load_format,
        tp=SingleRank(),
        attention=target.attention,
        progress=progress,
    )
    lora = build_lora(config, directory, spec.lora_sites, model) if config.enable_lora else None
    parts = split(target, model, lora)
    logger.info("Memory: %s", parts)
    grammars = GrammarCompiler(tokenizer_dir(config), spec.vocab_size, spec.eos_token_ids)
    report("preparing the device")
    storage = target.storage(parts.num_pages)
    worker = make_worker(target, model, storage, lora, grammars, progress=progress)

    def on_close() -> None:
        grammars.close()
        worker.close()

    kv = KVManager(
        page_size=parts.page_size, num_pages=parts.num_pages, radix=not config.disable_radix_cache
    )
    if lora:
        load_first(config.lora_paths, lora.store, report)
    return EngineCore(
        scheduler=Scheduler(
            _limits(config, spec, target.context_length),
            kv,
            lora.residency if lora else no_residency(),
        ),
        kv=kv,
        worker=worker,
        adapters=lora.store if lora else NoAdapters(),
        compile_grammar=grammars.request,
        seeds=_seed_source(config.random_seed),
        info=_info(target, parts, lora, defaults),
        on_close=on_close,
    )


def _target(config: ServerConfig, spec: ModelSpec) -> Target:
    """What is served where; raises ConfigError if it cannot fit."""
    context_length = resolve_context_length(config, spec)
    assert config.device in ("cpu", "cuda"), "the configuration is resolved"
    dtype, device = resolve_dtype(config, spec), torch.device(config.device)
    check_weights_fit(spec, dtype, device)
    return Target(
        config=config,
        spec=spec,
        dtype=dtype,
        device=device,
        attention=make_attention(config, spec, dtype, device),
        context_length=context_length,
    )


def _sampling_defaults(config: ServerConfig, directory: Path, spec: ModelSpec) -> dict[str, float]:
    """What OpenAI requests get that do not say."""
    if config.sampling_defaults != "model":
        return {}
    defaults = read_sampling_defaults(directory, spec.vocab_size)
    if defaults:
        logger.info(
            "Defaults of OpenAI requests, from the model's generation_config.json: %s", defaults
        )
    return defaults


def resolve_context_length(config: ServerConfig, spec: ModelSpec) -> int:
    """The context that is served: as given, else the model's.

    Raises:
        ConfigError: more is asked for than the model's positions are made for.
    """
    most = spec.max_context_length
    if config.context_length is None:
        return most
    if config.context_length > most:
        raise ConfigError(
            f"--context-length {config.context_length} is more than the model's {most} positions; "
            f"allowed: 1 to {most}"
        )
    return config.context_length


def _limits(config: ServerConfig, spec: ModelSpec, context_length: int) -> SchedulerLimits:
    assert config.max_running_requests is not None
    assert config.chunked_prefill_size is not None
    assert config.max_prefill_tokens is not None
    return SchedulerLimits(
        max_running=config.max_running_requests,
        max_step_tokens=config.chunked_prefill_size,
        max_prefill_tokens=config.max_prefill_tokens,
        context_length=context_length,
        max_loras_per_batch=config.max_loras_per_batch,
        eos_token_ids=frozenset(spec.eos_token_ids),
        policy=config.schedule_policy,
        max_queued=config.max_queued_requests,
        vocab_size=spec.vocab_size,
        even_length=_even_length(spec),
    )


def _even_length(spec: ModelSpec) -> int | None:
    """The context at which attention takes as many operations for a token as the layers' weights do.

    A weight is multiplied and added once; a head's feature of a key once for the score and once for the sum of values.
    None if every layer has a window: then attention costs the same wherever a token stands.
    """
    num_full = sum(window is None for window in spec.sliding_windows)
    if num_full == 0:
        return None
    tables = 1 if spec.tie_word_embeddings else 2
    num_weights = spec.num_parameters - tables * spec.vocab_size * spec.hidden_size
    return max(1, num_weights // (2 * num_full * spec.q_size))


def _seed_source(random_seed: int | None) -> Callable[[], int]:
    source = random.Random(random_seed)
    return lambda: source.randint(0, MAX_SEED)


def _info(
    target: Target, split: MemorySplit, lora: LoRAParts | None, defaults: dict[str, float]
) -> EngineInfo:
    spec = target.spec
    on_gpu = target.device.type == "cuda"
    return EngineInfo(
        version=lorikeet.__version__,
        model_path=target.config.model_path,
        served_model_name=target.config.served_model_name or target.config.model_path,
        architecture=spec.architecture,
        context_length=target.context_length,
        max_running_requests=target.max_running,
        max_queued_requests=target.config.max_queued_requests,
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        dtype=str(target.dtype).removeprefix("torch."),
        device=target.device.type,
        device_name=torch.cuda.get_device_name(target.device) if on_gpu else None,
        attention_backend=target.attention.name,
        page_size=split.page_size,
        max_total_num_tokens=split.num_tokens,
        weights_bytes=split.weights_bytes,
        pool_bytes=split.pool_bytes,
        kv_bytes=split.kv_bytes,
        lora_enabled=lora is not None,
        max_lora_rank=lora.limits.max_rank if lora else None,
        lora_target_modules=sorted(lora.limits.targets) if lora else None,
        sampling_defaults={**defaults},
    )
