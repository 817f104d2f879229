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
from lorikeet.adapters.limits import naming
from lorikeet.adapters.residency import Residency
from lorikeet.adapters.store import AdapterStore
from lorikeet.config import LoRAPath, Settings
from lorikeet.core.sampling import MAX_SEED
from lorikeet.core.views import EngineInfo
from lorikeet.engine.core import EngineCore
from lorikeet.errors import ConfigError
from lorikeet.kv.manager import KVManager
from lorikeet.lora.build import LoRAParts
from lorikeet.models.source import locate_model, locate_tokenizer
from lorikeet.models.spec import ModelSpec, read_model_spec, read_sampling_defaults
from lorikeet.parallel.group import SingleRank
from lorikeet.scheduler.scheduler import Scheduler, SchedulerLimits
from lorikeet.worker.memory import MemorySplit
from lorikeet.worker.rank import Rank, build_rank
from lorikeet.worker.target import Target, make_attention, resolve_dtype

logger = logging.getLogger(__name__)


def build_engine(
    config: Settings, *, report: Callable[[str], None], progress: bool = True
) -> EngineCore:
    """Build the engine of some settings and load its adapters.

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
    config: Settings,
    directory: Path,
    spec: ModelSpec,
    report: Callable[[str], None],
    *,
    progress: bool,
) -> EngineCore:
    defaults = _sampling_defaults(config, directory, spec)
    target = read_target(config, spec)
    rank = build_rank(
        target,
        directory,
        locate_tokenizer(config.tokenizer_path),
        SingleRank(),
        report=report,
        progress=progress,
    )

    memory = rank.memory
    kv = KVManager(
        page_size=memory.page_size, num_pages=memory.num_pages, radix=not config.disable_radix_cache
    )
    store = _store(config, rank)
    load_first(config.lora.lora_paths, store, report)
    return EngineCore(
        scheduler=Scheduler(_limits(config, spec, target.context_length), kv, store.residency),
        kv=kv,
        worker=rank.worker,
        adapters=store,
        compile_grammar=rank.grammars.request,
        seeds=_seed_source(config.random_seed),
        info=_info(target, memory, rank.lora, defaults),
        on_close=rank.close,
    )


def _store(config: Settings, rank: Rank) -> AdapterStore:
    residency = Residency.of_pool(
        rank.lora.plan.layout if rank.lora else None,
        policy=config.lora.lora_eviction_policy,
        max_host=config.lora.max_loaded_loras,
    )
    can_find = config.lora.lora_resolver_dir is not None
    return AdapterStore(residency, rank.worker.host, can_find=can_find)


def load_first(
    paths: tuple[LoRAPath, ...], store: AdapterStore, report: Callable[[str], None]
) -> None:
    """Load the adapters of ``--lora-paths``; one that fails is fatal and named."""
    for number, source in enumerate(paths, 1):
        report(f"loading adapter {source.name} ({number} of {len(paths)})")
        with naming(source):
            store.load(source)


def read_target(config: Settings, spec: ModelSpec) -> Target:
    """What is served where; raises ConfigError if the options do not fit the model or the device."""
    context_length = resolve_context_length(config, spec)
    dtype, device = resolve_dtype(config, spec), torch.device(config.device)
    return Target(
        config=config,
        spec=spec,
        dtype=dtype,
        device=device,
        attention=make_attention(config, spec, dtype, device),
        context_length=context_length,
    )


def _sampling_defaults(config: Settings, directory: Path, spec: ModelSpec) -> dict[str, float]:
    """What OpenAI requests get that do not say."""
    if config.sampling_defaults != "model":
        return {}
    defaults = read_sampling_defaults(directory, spec.vocab_size)
    if defaults:
        logger.info(
            "Defaults of OpenAI requests, from the model's generation_config.json: %s", defaults
        )
    return defaults


def resolve_context_length(config: Settings, spec: ModelSpec) -> int:
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


def _limits(config: Settings, spec: ModelSpec, context_length: int) -> SchedulerLimits:
    return SchedulerLimits(
        max_running=config.max_running_requests,
        max_step_tokens=config.chunked_prefill_size,
        max_prefill_tokens=config.max_prefill_tokens,
        context_length=context_length,
        max_loras_per_batch=config.lora.max_loras_per_batch,
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


def _seed_source(random_seed: int) -> Callable[[], int]:
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
        served_model_name=target.config.served_model_name,
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
        max_lora_rank=lora.plan.limits.max_rank if lora else None,
        lora_target_modules=sorted(lora.plan.limits.targets) if lora else None,
        sampling_defaults={**defaults},
    )
