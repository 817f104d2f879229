"""The worker's part of an engine's start: attention, memory, the worker itself with its graphs."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from lorikeet.attention.base import AttentionBackend
from lorikeet.attention.cut import CutAttention
from lorikeet.attention.flashinfer import FlashInferBackend
from lorikeet.attention.sdpa import SDPABackend
from lorikeet.config import Settings
from lorikeet.engine.lora_setup import LoRAParts
from lorikeet.errors import ConfigError
from lorikeet.kv.storage import KVStorage
from lorikeet.lora.batch_builder import TileBatchBuilder, make_batch_builder
from lorikeet.lora.copier import Copier
from lorikeet.models.decoder import Decoder
from lorikeet.models.spec import ModelSpec
from lorikeet.ops.lora.tiles import DECODE_BLOCK_ROWS, PREFILL_BLOCK_ROWS
from lorikeet.ops.select import select_ops
from lorikeet.worker.grammar.compiler import GrammarCompiler
from lorikeet.worker.graphs import DecodeBuffers, GraphRunner, default_sizes
from lorikeet.worker.inputs import InputBuilder
from lorikeet.worker.lanes import Lanes
from lorikeet.worker.memory import (
    DEFAULT_CPU_FRACTION,
    MemoryRequest,
    MemorySplit,
    available_host_bytes,
    size_text,
    split_memory,
)
from lorikeet.worker.profile import (
    FIXED_RESERVE_BYTES,
    SAMPLING_BYTES_PER_LOGIT,
    graph_bytes,
    measure_step,
    warm_up,
    warm_up_draw,
)
from lorikeet.worker.prompt_graphs import PromptBuffers, PromptGraphs, default_prompt_sizes
from lorikeet.worker.sampling.sampler import Sampler
from lorikeet.worker.worker import Graphs, Worker

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_LEAST_LOGITS_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What runs where.

    Attributes:
        dtype: of weights, adapters, activations and K/V.
        context_length: longest sequence.
    """

    config: Settings
    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device
    attention: CutAttention
    context_length: int

    @property
    def page_size(self) -> int:
        return self.config.page_size

    @property
    def max_running(self) -> int:
        return self.config.max_running_requests

    @property
    def max_logits_rows(self) -> int:
        """Rows of logits that are there at a time: one for each running sequence. The log-probabilities of prompts are
        computed in pieces of as many, but not of so few that reading the LM head's weights is all that they do."""
        return max(self.max_running, _LEAST_LOGITS_ROWS)

    @property
    def kv_head_dim(self) -> int:
        """Head size of the K/V storage."""
        return self.attention.storage_head_dim(self.spec.head_dim)

    def storage(self, num_pages: int) -> KVStorage:
        """K/V of a number of pages."""
        return KVStorage(
            num_layers=self.spec.num_layers,
            num_pages=num_pages,
            page_size=self.page_size,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.kv_head_dim,
            dtype=self.dtype,
            device=self.device,
            zero=self.kv_head_dim != self.spec.head_dim,
        )


def resolve_dtype(config: Settings, spec: ModelSpec) -> torch.dtype:
    """The dtype of weights, adapters and K/V: as given; ``auto`` is float32 on a CPU and the checkpoint's on a GPU.

    A CPU computes float32 faster than bfloat16 on most machines, and exactly what the tests compare with. A GPU has no
    use for float32 unless it is asked for: such a checkpoint is served in float16, as the field does.
    """
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if config.device == "cpu":
        return torch.float32
    return torch.float16 if spec.dtype == "float32" else DTYPES[spec.dtype]


def make_attention(
    config: Settings, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> CutAttention:
    """The attention backend of ``--attention-backend``.

    Raises:
        ConfigError: it does not serve this device or type.
    """
    return CutAttention(_make_backend(config, spec, dtype, device))


def _make_backend(
    config: Settings, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    name = config.attention_backend
    if name == "auto":
        name = "sdpa" if dtype == torch.float32 else "flashinfer"
    if name == "sdpa":
        return SDPABackend()
    return FlashInferBackend(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        page_size=config.page_size,
        dtype=dtype,
        device=device,
        prefill="fa3" if name == "fa3" else "fa2",
    )


def check_weights_fit(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse weights that a GPU has no room for, before anything is loaded.

    Raises:
        ConfigError: with both numbers.
    """
    if device.type != "cuda":
        return
    needed, free = spec.num_parameters * dtype.itemsize, torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise ConfigError(
            f"not enough device memory: the weights need {size_text(needed)} as {str(dtype).removeprefix('torch.')}, "
            f"{size_text(free)} of {torch.cuda.get_device_name(device)} is free. Use a smaller --dtype or a smaller "
            "model, or end what else uses the device"
        )


def split(target: Target, model: Decoder, lora: LoRAParts | None) -> MemorySplit:
    """Measure what the largest step needs, and divide the memory.

    Raises:
        ConfigError: it is not enough, with the numbers and the flags to change.
    """
    config, spec = target.config, target.spec
    weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    pool_bytes = lora.pool.nbytes if lora else 0
    on_gpu = target.device.type == "cuda"
    reserve = _step_bytes(target, model, lora) if on_gpu else 0
    if on_gpu:
        torch.cuda.empty_cache()
        available = torch.cuda.mem_get_info(target.device)[0] + weights_bytes + pool_bytes
    else:
        # Weights and pool are allocated already, so they count as available again.
        available = available_host_bytes() + weights_bytes
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
    graphs = graph_bytes(_num_graphs(config, lora), target.spec.num_layers)
    return activations + sampling + graphs + FIXED_RESERVE_BYTES


def _num_graphs(config: Settings, lora: LoRAParts | None) -> int:
    """About how many passes are captured: some sizes have several lengths, and with adapters there are two numbers of
    tiles beside the graph without."""
    if config.disable_cuda_graph:
        return 0
    with_adapters = lora is not None and lora.backend != "torch"
    decode = len(_graph_sizes(config)) * (3 if with_adapters else 1) * 5 // 4
    prompts = len(_prompt_sizes(config)) * (2 if with_adapters else 1)
    return decode + prompts


def make_worker(
    target: Target,
    model: Decoder,
    storage: KVStorage,
    lora: LoRAParts | None,
    grammars: GrammarCompiler,
    *,
    progress: bool,
) -> Worker:
    """The worker, with its decode steps captured where the device has graphs."""
    device = target.device
    max_pages = -(-target.context_length // target.page_size)
    lanes = Lanes(target.max_running, max_pages, device)
    builder = None
    if lora is not None:
        chunk = target.config.lora.max_lora_chunk_size or PREFILL_BLOCK_ROWS
        builder = make_batch_builder(lora.backend, lora.pool, device, max_chunk=chunk)
    inputs = InputBuilder(storage, target.page_size, device, builder, lanes)
    tiles = builder if isinstance(builder, TileBatchBuilder) else None
    if device.type == "cuda" and tiles is not None:
        # A prompt of this many tokens is cut into tiles of that many rows, which is a kernel of its own.
        lengths = {
            min(rows, target.context_length) for rows in (PREFILL_BLOCK_ROWS, DECODE_BLOCK_ROWS)
        }
        warm_up(model, target.attention, inputs, tuple(lengths), slot=1)
    graphs: list[Graphs] = []
    if device.type == "cuda" and not target.config.disable_cuda_graph:
        graphs = _capture(target, model, storage, inputs, tiles, progress=progress)
    draw = select_ops(device.type).draw
    if device.type == "cuda":
        warm_up_draw(draw, target.spec.vocab_size, target.dtype, lanes.sampled_L)
    return Worker(
        network=model,
        attention=target.attention,
        inputs=inputs,
        sampler=Sampler(
            vocab_size=target.spec.vocab_size,
            eos_token_ids=target.spec.eos_token_ids,
            device=device,
            grammars=grammars,
            draw=draw,
        ),
        max_logits_rows=target.max_logits_rows,
        copier=Copier(lora.pool, lora.host.get) if lora else None,
        graphs=graphs,
        # A CPU computes a step while it is submitted: another one ahead would only delay its tokens.
        overlap=device.type == "cuda" and not target.config.disable_overlap_schedule,
    )


def _capture(
    target: Target,
    model: Decoder,
    storage: KVStorage,
    inputs: InputBuilder,
    tiles: TileBatchBuilder | None,
    *,
    progress: bool,
) -> list[Graphs]:
    """All graphs; those of the most tokens first, in whose memory the others find room."""
    pool = torch.cuda.graph_pool_handle()
    prompts: list[Graphs] = []
    if sizes := _prompt_sizes(target.config):
        prompt_buffers = PromptBuffers(sizes, storage, inputs, tiles)
        runner = PromptGraphs(model, target.attention, prompt_buffers, sizes, storage)
        runner.capture(pool, progress=progress)
        prompts.append(runner)
    sizes = _graph_sizes(target.config)
    max_pages = inputs.lanes.pages_LP.shape[1]
    buffers = DecodeBuffers(sizes[-1], max_pages, storage, inputs, tiles)
    decode = GraphRunner(model, target.attention, buffers, sizes, target.context_length)
    decode.capture(pool, progress=progress)
    return [decode, *prompts]


def _prompt_sizes(config: Settings) -> tuple[int, ...]:
    most = config.piecewise_cuda_graph_max_tokens
    if most is None or config.disable_piecewise_cuda_graph:
        return ()
    return default_prompt_sizes(most)


def _graph_sizes(config: Settings) -> tuple[int, ...]:
    largest = config.cuda_graph_max_bs
    if largest is None:
        return ()
    if config.cuda_graph_bs is None:
        return default_sizes(largest)
    return tuple(sorted({size for size in config.cuda_graph_bs if size <= largest}))
