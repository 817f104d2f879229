"""Steps that are run before there is a request: the largest one, to see how much device memory steps need, and one for
each set of kernels, so that no request waits for a compiler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from lorikeet.attention.base import AttentionBackend
from lorikeet.core.plan import PrefillChunk, SequenceStart, StepPlan
from lorikeet.core.request import SamplingParams
from lorikeet.layers.batch import ForwardBatch
from lorikeet.lora.build import LoRAParts
from lorikeet.models.decoder import Decoder
from lorikeet.ops.draw import DrawOp
from lorikeet.worker.inputs import InputBuilder, Lanes
from lorikeet.worker.spec import WorkerSpec
from lorikeet.worker.staging import int_type, upload

# Bytes per logit while penalties, sorting and noise are applied: copies in float32, sorted values with int64 indices,
# and the 64-bit hashes behind the noise.
_SAMPLING_BYTES_PER_LOGIT = 36
# Kernels that are loaded when first used, fragments between allocations.
_FIXED_RESERVE_BYTES = 500_000_000
# What the driver keeps for one graph of 32 layers, some 400 launches.
_GRAPH_BYTES, _GRAPH_LAYERS = 40_000_000, 32


def graph_bytes(num_graphs: int, num_layers: int) -> int:
    """About what captured passes of a model take, in one graph each or in pieces."""
    return num_graphs * _GRAPH_BYTES * num_layers // _GRAPH_LAYERS


def step_bytes(spec: WorkerSpec, model: Decoder, lora: LoRAParts | None) -> int:
    """Device memory that the largest step needs beside weights, pool and K/V: measured, where a run shows it."""
    logits = spec.max_logits_rows * spec.model.vocab_size
    # About how many passes are captured: some sizes have several lengths, and with adapters there are two numbers of tiles
    # beside the graph without.
    decode, prompts = len(spec.decode_graphs), len(spec.prompt_graphs)
    if lora is not None and lora.backend != "torch":
        decode, prompts = 3 * decode, 2 * prompts
    graphs = graph_bytes(decode * 5 // 4 + prompts, spec.model.num_layers)
    return (
        _measure_step(spec, model)
        + logits * _SAMPLING_BYTES_PER_LOGIT
        + graphs
        + _FIXED_RESERVE_BYTES
    )


def _measure_step(spec: WorkerSpec, model: Decoder) -> int:
    """Peak bytes that a step of as many prompt tokens as there may be allocates, logits included."""
    settings, device = spec.settings, spec.device
    num_tokens = min(settings.chunked_prefill_size, settings.max_prefill_tokens)
    length = min(num_tokens, spec.context_length)
    pages_each = -(-length // spec.page_size)
    count = -(-num_tokens // length)
    # What the run stores there is dropped.
    kv = spec.storage(count * pages_each)
    inputs = InputBuilder(kv, spec.page_size, device, None, Lanes(count, pages_each, device))
    plan = StepPlan(step=0)
    for seq in range(count):
        pages = list(range(seq * pages_each, (seq + 1) * pages_each))
        _add_prompt(plan, seq, min(length, num_tokens - seq * length), pages)
    inputs.apply(plan)
    with torch.inference_mode():
        batch, _ = inputs.stage(inputs.lay_out(plan), [])
        rows = torch.zeros(spec.max_logits_rows, dtype=torch.int32, device=device)
        batch = replace(batch, logits_rows_N=rows)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        spec.attention.prepare(batch.attn)
        model(batch)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def warm_up(
    forward: Callable[[ForwardBatch], torch.Tensor],
    attention: AttentionBackend,
    inputs: InputBuilder,
    lengths: tuple[int, ...],
    slot: int,
) -> None:
    """Run a prompt of each length with an adapter slot that holds nothing yet; K/V goes to the first pages."""
    for length in lengths:
        plan = StepPlan(step=0)
        num_pages = -(-length // inputs.page_size)
        _add_prompt(plan, -1, length, list(range(num_pages)), slot)
        inputs.apply(plan)
        with torch.inference_mode():
            batch, _ = inputs.stage(inputs.lay_out(plan), [])
            attention.prepare(batch.attn)
            forward(batch)
        inputs.close(-1)
    torch.cuda.synchronize()


def warm_up_draw(
    draw: DrawOp, vocab_size: int, dtype: torch.dtype, sampled_L: torch.Tensor
) -> None:
    """Run the kernels that draw tokens, and throw the tokens away.

    Args:
        dtype: of the logits.
        sampled_L: of the lanes; not written to.
    """
    device = sampled_L.device
    nothing = np.zeros(1, dtype=np.int64)
    logits_2V = torch.zeros((2, vocab_size), dtype=dtype, device=device)
    # With an odd vocabulary the second row is not aligned for wide loads, which takes a kernel of its own.
    for logits_1V in logits_2V.split(1):
        draw(
            logits_1V,
            torch.zeros(1, device=device),
            upload(nothing, device),
            upload(nothing, device),
            upload(np.full(1, -1, dtype=int_type(device)), device),
            sampled_L,
        )


def _add_prompt(plan: StepPlan, seq: int, size: int, pages: list[int], slot: int = 0) -> None:
    start = SequenceStart(
        seq=seq,
        token_ids=[0] * size,
        num_prompt=size,
        num_cached=0,
        page_ids=pages,
        slot=slot,
        sampling=SamplingParams(),
        seed=0,
    )
    plan.starts.append(start)
    plan.chunks.append(PrefillChunk(seq=seq, start=0, end=size, new_page_ids=[], sample=True))
