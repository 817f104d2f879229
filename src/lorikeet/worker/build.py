"""The worker and its graphs, from parts that are there."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lorikeet.config import Settings
from lorikeet.kv.storage import KVStorage
from lorikeet.lora.batch_builder import TileBatchBuilder, make_batch_builder
from lorikeet.lora.build import LoRAParts
from lorikeet.lora.copier import Copier
from lorikeet.models.decoder import Decoder
from lorikeet.ops.lora.tiles import DECODE_BLOCK_ROWS, PREFILL_BLOCK_ROWS
from lorikeet.ops.select import select_ops
from lorikeet.worker.grammar.compiler import GrammarCompiler
from lorikeet.worker.graphs import GraphRunner, default_decode_sizes, default_prompt_sizes
from lorikeet.worker.inputs import InputBuilder
from lorikeet.worker.lanes import Lanes
from lorikeet.worker.profile import (
    warm_up,
    warm_up_draw,
)
from lorikeet.worker.sampling.sampler import Sampler
from lorikeet.worker.target import Target
from lorikeet.worker.worker import Worker

logger = logging.getLogger(__name__)


def num_graphs(config: Settings, lora: LoRAParts | None) -> int:
    """About how many passes are captured: some sizes have several lengths, and with adapters there are two numbers of
    tiles beside the graph without."""
    decode, prompts = map(len, _graph_sizes(config))
    if lora is not None and lora.backend != "torch":
        decode, prompts = 3 * decode, 2 * prompts
    return decode * 5 // 4 + prompts


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
    graphs = None
    if device.type == "cuda" and not target.config.disable_cuda_graph:
        decode_sizes, prompt_sizes = _graph_sizes(target.config)
        graphs = GraphRunner(
            model,
            target.attention,
            inputs,
            tiles,
            decode_sizes=decode_sizes,
            prompt_sizes=prompt_sizes,
            max_kv_len=target.context_length,
        )
        graphs.capture(progress=progress)
    draw = select_ops(device.type).draw
    if device.type == "cuda":
        warm_up_draw(draw, target.spec.vocab_size, target.dtype, lanes.sampled_L)
    return Worker(
        model=model,
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


def _graph_sizes(config: Settings) -> tuple[Sequence[int], Sequence[int]]:
    """Which passes are captured: rows of decode steps, and tokens of steps with prompts."""
    decode: Sequence[int] = ()
    prompts: Sequence[int] = ()
    max_rows, max_tokens = config.cuda_graph_max_bs, config.piecewise_cuda_graph_max_tokens
    if config.disable_cuda_graph:
        return decode, prompts
    if max_rows is not None:
        given = config.cuda_graph_bs
        decode = (
            default_decode_sizes(max_rows)
            if given is None
            else sorted({size for size in given if size <= max_rows})
        )
    if max_tokens is not None and not config.disable_piecewise_cuda_graph:
        prompts = default_prompt_sizes(max_tokens)
    return decode, prompts
