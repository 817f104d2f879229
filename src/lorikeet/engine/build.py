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
from lorikeet.worker.spec import WorkerSpec

logger = logging.getLogger(__name__)


def build_engine(
    settings: Settings, *, report: Callable[[str], None], progress: bool = True
) -> EngineCore:
    """Build the engine of some settings and load its adapters.

    Args:
        report: told each phase of the start in a few words.
        progress: show bars while weights load and graphs are captured.

    Raises:
        ConfigError, ModelError, AdapterError: flags or files are wrong, or the device is too small.
    """
    directory = locate_model(settings.model_path, weights=settings.load_format != "dummy")
    spec = read_model_spec(directory)
    try:
        return _build(settings, directory, spec, report, progress=progress)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the device ran out of memory at start: {error}. Lower --context-length, --max-total-tokens, "
            "--max-loras-per-batch, --max-lora-rank, --chunked-prefill-size or --max-running-requests, or end what "
            "else uses the device"
        ) from error


def _build(
    settings: Settings,
    directory: Path,
    spec: ModelSpec,
    report: Callable[[str], None],
    *,
    progress: bool,
) -> EngineCore:
    defaults = _sampling_defaults(settings, directory, spec)
    worker = WorkerSpec.resolve(settings, spec)
    rank = build_rank(
        worker,
        directory,
        locate_tokenizer(settings.tokenizer_path),
        SingleRank(),
        report=report,
        progress=progress,
    )
    memory = rank.memory
    kv = KVManager(
        page_size=memory.page_size,
        num_pages=memory.num_pages,
        radix=not settings.disable_radix_cache,
    )
    store = _store(settings, rank)
    load_first(settings.lora.lora_paths, store, report)
    return EngineCore(
        scheduler=Scheduler(_limits(settings, spec, worker.context_length), kv, store.residency),
        kv=kv,
        worker=rank.worker,
        adapters=store,
        compile_grammar=rank.grammars.request,
        seeds=_seed_source(settings.random_seed),
        info=_info(worker, memory, rank.lora, defaults),
        on_close=rank.close,
    )


def _store(settings: Settings, rank: Rank) -> AdapterStore:
    residency = Residency.of_pool(
        rank.lora.plan.layout if rank.lora else None,
        policy=settings.lora.lora_eviction_policy,
        max_host=settings.lora.max_loaded_loras,
    )
    can_find = settings.lora.lora_resolver_dir is not None
    return AdapterStore(residency, rank.worker.host, can_find=can_find)


def load_first(
    paths: tuple[LoRAPath, ...], store: AdapterStore, report: Callable[[str], None]
) -> None:
    """Load the adapters of ``--lora-paths``; one that fails is fatal and named."""
    for number, source in enumerate(paths, 1):
        report(f"loading adapter {source.name} ({number} of {len(paths)})")
        with naming(source):
            store.load(source)


def _sampling_defaults(settings: Settings, directory: Path, spec: ModelSpec) -> dict[str, float]:
    """What OpenAI requests get that do not say."""
    if settings.sampling_defaults != "model":
        return {}
    defaults = read_sampling_defaults(directory, spec.vocab_size)
    if defaults:
        logger.info(
            "Defaults of OpenAI requests, from the model's generation_config.json: %s", defaults
        )
    return defaults


def _limits(settings: Settings, spec: ModelSpec, context_length: int) -> SchedulerLimits:
    return SchedulerLimits(
        max_running=settings.max_running_requests,
        max_step_tokens=settings.chunked_prefill_size,
        max_prefill_tokens=settings.max_prefill_tokens,
        context_length=context_length,
        max_loras_per_batch=settings.lora.max_loras_per_batch,
        eos_token_ids=frozenset(spec.eos_token_ids),
        policy=settings.schedule_policy,
        max_queued=settings.max_queued_requests,
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
    worker: WorkerSpec, split: MemorySplit, lora: LoRAParts | None, defaults: dict[str, float]
) -> EngineInfo:
    spec = worker.model
    on_gpu = worker.device.type == "cuda"
    return EngineInfo(
        version=lorikeet.__version__,
        model_path=worker.settings.model_path,
        served_model_name=worker.settings.served_model_name,
        architecture=spec.architecture,
        context_length=worker.context_length,
        max_running_requests=worker.max_running,
        max_queued_requests=worker.settings.max_queued_requests,
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        dtype=str(worker.dtype).removeprefix("torch."),
        device=worker.device.type,
        device_name=torch.cuda.get_device_name(worker.device) if on_gpu else None,
        attention_backend=worker.attention.name,
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
