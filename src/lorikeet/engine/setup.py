"""From a configuration to an engine that serves: read the model, divide the memory, load weights and adapters.

Everything that flags or files can get wrong is found here, before the first request.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import torch
from torch import nn

import lorikeet
from lorikeet.attention.base import AttentionBackend
from lorikeet.attention.sdpa import SDPABackend
from lorikeet.config import ServerConfig
from lorikeet.core.request import MAX_SEED
from lorikeet.engine.adapter_store import NoAdapters
from lorikeet.engine.core import EngineCore
from lorikeet.engine.lora_setup import LoRAParts, build_lora, load_first, no_residency
from lorikeet.engine.paths import tokenizer_dir
from lorikeet.errors import ConfigError
from lorikeet.kv.manager import KVManager
from lorikeet.kv.storage import KVStorage
from lorikeet.lora.batch_builder import LoRABatchBuilder
from lorikeet.models.build import build_model
from lorikeet.models.decoder import Decoder
from lorikeet.models.source import locate_model
from lorikeet.models.spec import ModelSpec, read_model_spec
from lorikeet.parallel.group import SingleRank
from lorikeet.scheduler.scheduler import Scheduler, SchedulerLimits
from lorikeet.worker.copier import Copier
from lorikeet.worker.grammar import GrammarCompiler
from lorikeet.worker.inputs import InputBuilder
from lorikeet.worker.memory import MemoryRequest, MemorySplit, available_host_bytes, split_memory
from lorikeet.worker.sampler import Sampler
from lorikeet.worker.worker import Worker

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_engine(
    config: ServerConfig, *, report: Callable[[str], None], progress: bool = True
) -> EngineCore:
    """Build the engine of a resolved configuration and load its adapters.

    Args:
        report: told each phase of the start in a few words.
        progress: show a bar while weights load.

    Raises:
        ConfigError, ModelError, AdapterError: flags or files are wrong.
    """
    directory = locate_model(config.model_path, weights=config.load_format != "dummy")
    spec = read_model_spec(directory)
    context_length = resolve_context_length(config, spec)
    dtype, device = resolve_dtype(config, spec), torch.device("cpu")
    attention = SDPABackend()
    report(f"loading the weights of {config.model_path}")
    model = build_model(
        directory,
        spec,
        dtype=dtype,
        device=device,
        load_format=config.load_format,
        tp=SingleRank(),
        attention=attention,
        progress=progress,
    )
    weights_bytes = _parameter_bytes(model)
    lora = build_lora(config, directory, spec.lora_sites, model) if config.enable_lora else None
    split = _split(config, spec, weights_bytes, lora, dtype, context_length)
    logger.info("Memory: %s", split)
    grammars = GrammarCompiler(tokenizer_dir(config), spec.vocab_size, spec.eos_token_ids)
    storage = _storage(spec, split, dtype, device)
    worker = _worker(spec, model, attention, storage, lora, grammars)
    kv = KVManager(
        page_size=split.page_size, num_pages=split.num_pages, radix=not config.disable_radix_cache
    )
    if lora:
        load_first(config.lora_paths, lora.store, report)
    return EngineCore(
        scheduler=Scheduler(
            _limits(config, spec, context_length), kv, lora.residency if lora else no_residency()
        ),
        kv=kv,
        worker=worker,
        adapters=lora.store if lora else NoAdapters(),
        compile_grammar=grammars.compile,
        seeds=_seed_source(config.random_seed),
        info=_info(config, spec, split, lora, dtype, context_length),
        on_close=worker.close,
    )


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


def resolve_dtype(config: ServerConfig, spec: ModelSpec) -> torch.dtype:
    """The dtype of weights, adapters and K/V: as given; ``auto`` is float32 on a CPU.

    A CPU computes float32 faster than bfloat16 on most machines, and exactly what the tests compare with.
    """
    return torch.float32 if config.dtype == "auto" else DTYPES[config.dtype]


def _parameter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _split(
    config: ServerConfig,
    spec: ModelSpec,
    weights_bytes: int,
    lora: LoRAParts | None,
    dtype: torch.dtype,
    context_length: int,
) -> MemorySplit:
    assert config.page_size is not None
    assert config.max_running_requests is not None
    return split_memory(
        MemoryRequest(
            weights_bytes=weights_bytes,
            pool_bytes=lora.pool.nbytes if lora else 0,
            kv_bytes_per_token=spec.kv_bytes_per_token(dtype.itemsize),
            page_size=config.page_size,
            # Weights and pool are allocated already, so they count as available again.
            available_bytes=available_host_bytes() + weights_bytes,
            useful_tokens=config.max_running_requests * context_length,
            min_tokens=context_length,
            max_total_tokens=config.max_total_tokens,
            fraction=config.mem_fraction_static,
        )
    )


def _worker(
    spec: ModelSpec,
    model: Decoder,
    attention: AttentionBackend,
    storage: KVStorage,
    lora: LoRAParts | None,
    grammars: GrammarCompiler,
) -> Worker:
    device = storage.k[0].device
    builder = LoRABatchBuilder(lora.pool) if lora else None
    return Worker(
        forward=model,
        attention=attention,
        inputs=InputBuilder(storage, storage.page_size, device, builder),
        sampler=Sampler(
            vocab_size=spec.vocab_size,
            eos_token_ids=spec.eos_token_ids,
            device=device,
            grammars=grammars,
        ),
        copier=Copier(lora.pool, lora.host.get) if lora else None,
    )


def _storage(
    spec: ModelSpec, split: MemorySplit, dtype: torch.dtype, device: torch.device
) -> KVStorage:
    return KVStorage(
        num_layers=spec.num_layers,
        num_pages=split.num_pages,
        page_size=split.page_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
        device=device,
    )


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
    )


def _seed_source(random_seed: int | None) -> Callable[[], int]:
    source = random.Random(random_seed)
    return lambda: source.randint(0, MAX_SEED)


def _info(
    config: ServerConfig,
    spec: ModelSpec,
    split: MemorySplit,
    lora: LoRAParts | None,
    dtype: torch.dtype,
    context_length: int,
) -> dict[str, object]:
    return {
        "version": lorikeet.__version__,
        "model_path": config.model_path,
        "architecture": spec.architecture,
        "context_length": context_length,
        "vocab_size": spec.vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "page_size": split.page_size,
        "max_total_num_tokens": split.num_tokens,
        "weights_bytes": split.weights_bytes,
        "pool_bytes": split.pool_bytes,
        "kv_bytes": split.kv_bytes,
        "lora_enabled": lora is not None,
        "max_lora_rank": lora.limits.max_rank if lora else None,
        "lora_target_modules": sorted(lora.limits.targets) if lora else None,
    }
