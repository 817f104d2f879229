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
from lorikeet.worker.build import make_worker, num_graphs
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
from lorikeet.worker.profile import (
    FIXED_RESERVE_BYTES,
    SAMPLING_BYTES_PER_LOGIT,
    graph_bytes,
    measure_step,
)
from lorikeet.worker.target import Target
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
    target: Target,
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
    weights_bytes = target.spec.num_parameters * target.dtype.itemsize
    check_memory(free_bytes(target.device), {WEIGHTS: weights_bytes})
    report(f"loading the weights of {target.config.model_path}")
    model = build_model(
        directory,
        target.spec,
        dtype=target.dtype,
        device=target.device,
        load_format=target.config.load_format,
        tp=tp,
        attention=target.attention,
        progress=progress,
    )
    lora = _build_lora(target, directory, model, tp) if target.config.enable_lora else None
    memory = split(target, model, lora)
    logger.info("Memory: %s", memory)
    spec = target.spec
    grammars = GrammarCompiler(tokenizer_dir, spec.vocab_size, spec.eos_token_ids)
    report("preparing the device")
    storage = target.storage(memory.num_pages)
    worker = make_worker(target, model, storage, lora, grammars, progress=progress)
    return Rank(worker, grammars, memory, lora)


def _build_lora(target: Target, directory: Path, model: Decoder, tp: TPGroup) -> LoRAParts:
    config, sites = target.config, target.spec.lora_sites
    sources = SourceOptions.from_config(config.lora)
    limits = resolve_limits(
        sites,
        max_rank=config.lora.max_lora_rank,
        targets=config.lora.lora_target_modules,
        paths=config.lora.lora_paths,
        sources=sources.trusted(),
    )
    plan = plan_pool(
        model,
        sites,
        limits,
        max_loras_per_batch=config.lora.max_loras_per_batch,
        dtype=target.dtype,
    )
    free, weights_bytes = free_bytes(target.device), _weights_bytes(model)
    if free is not None:
        check_memory(free + weights_bytes, {WEIGHTS: weights_bytes, POOL: plan.layout.nbytes})
    backend = config.lora.lora_backend
    return LoRAParts(
        plan,
        backend,
        build_pool(
            model,
            plan,
            next(model.parameters()).device,
            backend=backend,
            deterministic=config.lora.lora_deterministic,
            rank=tp.rank,
        ),
        build_host_memory(
            plan,
            sources,
            base_weight=checkpoint_weight(directory) if config.load_format != "dummy" else None,
            resolver_dir=Path(config.lora.lora_resolver_dir)
            if config.lora.lora_resolver_dir
            else None,
            download_seconds=config.lora.lora_download_timeout,
        ),
    )


def _weights_bytes(model: Decoder) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that is free now; None for a CPU, whose memory is asked for when weights and pool are there."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def split(target: Target, model: Decoder, lora: LoRAParts | None) -> MemorySplit:
    """Measure what the largest step needs, and divide the memory.

    Raises:
        ConfigError: it is not enough, with the numbers and the flags to change.
    """
    config, spec = target.config, target.spec
    weights_bytes = _weights_bytes(model)
    pool_bytes = lora.pool.nbytes if lora else 0
    on_gpu = target.device.type == "cuda"
    reserve = _step_bytes(target, model, lora) if on_gpu else 0
    if on_gpu:
        torch.cuda.empty_cache()
    free = free_bytes(target.device)
    # Weights and pool are allocated already, so they count as available again; of main memory the pool has taken nothing
    # before adapters are written to it.
    if free is None:
        available = available_host_bytes() + weights_bytes
    else:
        available = free + weights_bytes + pool_bytes
    scale = target.kv_head_dim / spec.head_dim
    return split_memory(
        MemoryRequest(
            weights_bytes=weights_bytes,
            pool_bytes=pool_bytes,
            kv_bytes_per_token=int(spec.kv_bytes_per_token(target.dtype.itemsize) * scale),
            page_size=target.page_size,
            available_bytes=available,
            useful_tokens=target.max_running * target.context_length,
            min_tokens=target.context_length,
            max_total_tokens=config.max_total_tokens,
            fraction=config.mem_fraction_static,
            default_fraction=1.0 if on_gpu else DEFAULT_CPU_FRACTION,
            reserve_bytes=reserve,
        )
    )


def _step_bytes(target: Target, model: Decoder, lora: LoRAParts | None) -> int:
    config = target.config
    num_tokens = min(config.chunked_prefill_size, config.max_prefill_tokens)
    num_rows = target.max_logits_rows
    activations = measure_step(
        model,
        target.attention,
        target.storage,
        num_tokens=num_tokens,
        num_rows=num_rows,
        page_size=target.page_size,
        context_length=target.context_length,
    )
    sampling = num_rows * target.spec.vocab_size * SAMPLING_BYTES_PER_LOGIT
    graphs = graph_bytes(num_graphs(config, lora), target.spec.num_layers)
    return activations + sampling + graphs + FIXED_RESERVE_BYTES
