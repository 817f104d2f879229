"""The worker and its graphs, from parts that are there."""

from __future__ import annotations

import logging

from lorikeet.kv.storage import KVStorage
from lorikeet.lora.batch_builder import TileBatchBuilder, make_batch_builder
from lorikeet.lora.build import LoRAParts
from lorikeet.lora.copier import Copier
from lorikeet.models.decoder import Decoder
from lorikeet.ops.lora.tiles import DECODE_BLOCK_ROWS, PREFILL_BLOCK_ROWS
from lorikeet.ops.select import select_ops
from lorikeet.worker.grammar.compiler import GrammarCompiler
from lorikeet.worker.graphs import GraphRunner
from lorikeet.worker.inputs import InputBuilder, Lanes
from lorikeet.worker.profile import (
    warm_up,
    warm_up_draw,
)
from lorikeet.worker.sampling.sampler import Sampler
from lorikeet.worker.spec import WorkerSpec
from lorikeet.worker.worker import Worker

logger = logging.getLogger(__name__)


def make_worker(
    spec: WorkerSpec,
    model: Decoder,
    storage: KVStorage,
    lora: LoRAParts | None,
    grammars: GrammarCompiler,
    *,
    progress: bool,
) -> Worker:
    """The worker, with its decode steps captured where the device has graphs."""
    device = spec.device
    max_pages = -(-spec.context_length // spec.page_size)
    lanes = Lanes(spec.max_running, max_pages, device)
    builder = None
    if lora is not None:
        chunk = spec.settings.lora.max_lora_chunk_size or PREFILL_BLOCK_ROWS
        builder = make_batch_builder(lora.backend, lora.pool, device, max_chunk=chunk)
    inputs = InputBuilder(storage, spec.page_size, device, builder, lanes)
    tiles = builder if isinstance(builder, TileBatchBuilder) else None
    if device.type == "cuda" and tiles is not None:
        # A prompt of this many tokens is cut into tiles of that many rows, which is a kernel of its own.
        lengths = {
            min(rows, spec.context_length) for rows in (PREFILL_BLOCK_ROWS, DECODE_BLOCK_ROWS)
        }
        warm_up(model, spec.attention, inputs, tuple(lengths), slot=1)
    graphs = None
    if device.type == "cuda" and not spec.settings.disable_cuda_graph:
        graphs = GraphRunner(
            model,
            spec.attention,
            inputs,
            tiles,
            decode_sizes=spec.decode_graphs,
            prompt_sizes=spec.prompt_graphs,
            max_kv_len=spec.context_length,
        )
        graphs.capture(progress=progress)
    draw = select_ops(device.type).draw
    if device.type == "cuda":
        warm_up_draw(draw, spec.model.vocab_size, spec.dtype, lanes.sampled_L)
    return Worker(
        model=model,
        attention=spec.attention,
        inputs=inputs,
        sampler=Sampler(grammars=grammars, device=device, draw=draw),
        max_logits_rows=spec.max_logits_rows,
        copier=Copier(lora.pool, lora.host) if lora else None,
        graphs=graphs,
        # A CPU computes a step while it is submitted: another one ahead would only delay its tokens.
        overlap=device.type == "cuda" and not spec.settings.disable_overlap_schedule,
    )
