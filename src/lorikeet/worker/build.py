"""The worker and its graphs, from parts that are there."""

from __future__ import annotations

import logging

import torch

from lorikeet.config import ServerConfig
from lorikeet.kv.storage import KVStorage
from lorikeet.lora.batch_builder import TileBatchBuilder, make_batch_builder
from lorikeet.lora.build import LoRAParts
from lorikeet.lora.copier import Copier
from lorikeet.models.decoder import Decoder
from lorikeet.ops.lora.tiles import DECODE_BLOCK_ROWS, PREFILL_BLOCK_ROWS
from lorikeet.ops.select import select_ops
from lorikeet.worker.grammar.compiler import GrammarCompiler
from lorikeet.worker.graphs import DecodeBuffers, GraphRunner, default_sizes
from lorikeet.worker.inputs import InputBuilder
from lorikeet.worker.lanes import Lanes
from lorikeet.worker.profile import (
    warm_up,
    warm_up_draw,
)
from lorikeet.worker.prompt_graphs import PromptBuffers, PromptGraphs, default_prompt_sizes
from lorikeet.worker.sampling.sampler import Sampler
from lorikeet.worker.target import Target
from lorikeet.worker.worker import Graphs, Worker

logger = logging.getLogger(__name__)


def num_graphs(config: ServerConfig, lora: LoRAParts | None) -> int:
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
        chunk = target.config.max_lora_chunk_size or PREFILL_BLOCK_ROWS
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
        copier=Copier(lora.pool, lora.host) if lora else None,
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


def _prompt_sizes(config: ServerConfig) -> tuple[int, ...]:
    if config.disable_piecewise_cuda_graph:
        return ()
    assert config.piecewise_cuda_graph_max_tokens is not None
    return default_prompt_sizes(config.piecewise_cuda_graph_max_tokens)


def _graph_sizes(config: ServerConfig) -> tuple[int, ...]:
    largest = config.cuda_graph_max_bs
    assert largest is not None
    if config.cuda_graph_bs is None:
        return default_sizes(largest)
    return tuple(sorted({size for size in config.cuda_graph_bs if size <= largest}))
