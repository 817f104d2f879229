"""One rank, built: the model with its weights, its part of the adapters, the memory divided, the worker that executes plans."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lorikeet.adapters.limits import resolve_limits
from lorikeet.adapters.sources.source import SourceOptions
from lorikeet.lora.base_weights import checkpoint_weight
from lorikeet.lora.build import LoRAParts, build_host_memory, build_pool
from lorikeet.lora.pool_plan import plan_pool
from lorikeet.models.build import build_model
from lorikeet.models.decoder import Decoder
from lorikeet.parallel.group import TPGroup
from lorikeet.worker.build import make_worker
from lorikeet.worker.grammar.compiler import GrammarCompiler
from lorikeet.worker.memory import (
    DEFAULT_CPU_FRACTION,
    POOL,
    WEIGHTS,
    MemoryRequest,
    MemorySplit,
    available_host_bytes,
    check_memory,
    split_memory,
)
from lorikeet.worker.profile import step_bytes
from lorikeet.worker.spec import WorkerSpec
from lorikeet.worker.worker import Worker

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank that is ready for plans.

    Attributes:
        lora: None without LoRA.
    """

    worker: Worker
    grammars: GrammarCompiler
    memory: MemorySplit
    lora: LoRAParts | None

    def close(self) -> None:
        """End all threads and processes."""
        self.grammars.close()
        self.worker.close()


def build_rank(
    spec: WorkerSpec,
    directory: Path,
    tokenizer_dir: Path,
    tp: TPGroup,
    *,
    report: Callable[[str], None],
    progress: bool,
) -> Rank:
    """Load the weights and prepare the device.

    Args:
        directory: of the model.
        tokenizer_dir: of its tokenizer.
        report: told each phase in a few words.
        progress: show bars.

    Raises:
        ConfigError, ModelError, AdapterError: files are wrong, or the device is too small.
    """
    weights_bytes = spec.model.num_parameters * spec.dtype.itemsize
    check_memory(free_bytes(spec.device), {WEIGHTS: weights_bytes})
    report(f"loading the weights of {spec.settings.model_path}")
    model = build_model(
        directory,
        spec.model,
        dtype=spec.dtype,
        device=spec.device,
        load_format=spec.settings.load_format,
        tp=tp,
        attention=spec.attention,
        progress=progress,
    )
    lora = _build_lora(spec, directory, model, tp) if spec.settings.enable_lora else None
    memory = split(spec, model, lora)
    logger.info("Memory: %s", memory)
    grammars = GrammarCompiler(tokenizer_dir, spec.model.vocab_size, spec.model.eos_token_ids)
    report("preparing the device")
    storage = spec.storage(memory.num_pages)
    worker = make_worker(spec, model, storage, lora, grammars, progress=progress)
    return Rank(worker, grammars, memory, lora)


def _build_lora(spec: WorkerSpec, directory: Path, model: Decoder, tp: TPGroup) -> LoRAParts:
    settings, sites = spec.settings, spec.model.lora_sites
    sources = SourceOptions.from_config(settings.lora)
    limits = resolve_limits(
        sites,
        max_rank=settings.lora.max_lora_rank,
        targets=settings.lora.lora_target_modules,
        paths=settings.lora.lora_paths,
        sources=sources.trusted(),
    )
    plan = plan_pool(
        model,
        sites,
        limits,
        max_loras_per_batch=settings.lora.max_loras_per_batch,
        dtype=spec.dtype,
    )
    free, weights_bytes = free_bytes(spec.device), _weights_bytes(model)
    if free is not None:
        check_memory(free + weights_bytes, {WEIGHTS: weights_bytes, POOL: plan.layout.nbytes})
    backend = settings.lora.lora_backend
    return LoRAParts(
        plan,
        backend,
        build_pool(
            model,
            plan,
            next(model.parameters()).device,
            backend=backend,
            deterministic=settings.lora.lora_deterministic,
            rank=tp.rank,
        ),
        build_host_memory(
            plan,
            sources,
            base_weight=checkpoint_weight(directory) if settings.load_format != "dummy" else None,
            resolver_dir=Path(settings.lora.lora_resolver_dir)
            if settings.lora.lora_resolver_dir
            else None,
            download_seconds=settings.lora.lora_download_timeout,
        ),
    )


def _weights_bytes(model: Decoder) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that is free now; None for a CPU, whose memory is asked for when weights and pool are there."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def split(spec: WorkerSpec, model: Decoder, lora: LoRAParts | None) -> MemorySplit:
    """Measure what the largest step needs, and divide the memory.

    Raises:
        ConfigError: it is not enough, with the numbers and the flags to change.
    """
    weights_bytes = _weights_bytes(model)
    pool_bytes = lora.pool.nbytes if lora else 0
    on_gpu = spec.device.type == "cuda"
    reserve = step_bytes(spec, model, lora) if on_gpu else 0
    if on_gpu:
        torch.cuda.empty_cache()
    free = free_bytes(spec.device)
    # Weights and pool are allocated already, so they count as available again; of main memory the pool has taken nothing
    # before adapters are written to it.
    if free is None:
        available = available_host_bytes() + weights_bytes
    else:
        available = free + weights_bytes + pool_bytes
    scale = spec.kv_head_dim / spec.model.head_dim
    return split_memory(
        MemoryRequest(
            weights_bytes=weights_bytes,
            pool_bytes=pool_bytes,
            kv_bytes_per_token=int(spec.model.kv_bytes_per_token(spec.dtype.itemsize) * scale),
            page_size=spec.page_size,
            available_bytes=available,
            useful_tokens=spec.max_running * spec.context_length,
            min_tokens=spec.context_length,
            max_total_tokens=spec.settings.max_total_tokens,
            fraction=spec.settings.mem_fraction_static,
            default_fraction=1.0 if on_gpu else DEFAULT_CPU_FRACTION,
            reserve_bytes=reserve,
        )
    )
