"""One rank on one device: it executes plans and decides nothing.

``execute`` is the whole life of a step on this side: drop what ended, move adapters, open what starts, compute,
sample. The device's state between steps is the K/V pages, the adapter pool and one small record per sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from lorikeet.attention.base import AttentionBackend
from lorikeet.core.plan import StepPlan, StepResult
from lorikeet.core.request import TokenLogprobs
from lorikeet.layers.batch import ForwardBatch
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.device_pool import DevicePool
from lorikeet.worker.inputs import InputBuilder, StepLayout
from lorikeet.worker.sampler import Sampler

logger = logging.getLogger(__name__)


class Worker:
    """Executes step plans for one rank.

    Args:
        forward: the network: a batch to logits, float32 [M, V].
        inputs: builder of batches, with the states of running sequences.
        sampler: logits to tokens.
        pool: device memory for adapters; None when LoRA is off.
        adapters: host copies by version, read when a plan asks for a copy.
    """

    def __init__(
        self,
        *,
        forward: Callable[[ForwardBatch], torch.Tensor],
        attention: AttentionBackend,
        inputs: InputBuilder,
        sampler: Sampler,
        pool: DevicePool | None,
        adapters: Callable[[int], HostAdapter],
    ) -> None:
        self._forward = forward
        self._attention = attention
        self._inputs = inputs
        self._sampler = sampler
        self._pool = pool
        self._adapters = adapters

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Carry out one plan.

        A failing adapter copy is reported in the result and fails that version alone: rows of the plan that use its
        slot compute with rank 0 and are dropped by the scheduler.

        Raises:
            EngineFault: the plan contradicts this worker's state.
        """
        result = StepResult(step=plan.step)
        for seq in plan.ended:
            self._inputs.close(seq)
            self._sampler.end(seq)
        self._move_adapters(plan, result)
        for start in plan.starts:
            self._sampler.start(start)
        self._inputs.apply(plan)
        if plan.is_empty:
            return result
        batch, layout = self._inputs.build(plan)
        self._attention.prepare(batch.attn)
        self._read_logits(self._forward(batch), layout, result)
        return result

    def _move_adapters(self, plan: StepPlan, result: StepResult) -> None:
        if self._pool is None:
            return
        for slot in plan.freed_slots:
            self._pool.clear_slot(slot)
        for copy in plan.copies:
            try:
                self._pool.copy_in(self._adapters(copy.version), copy)
            except (RuntimeError, KeyError, OSError) as error:
                logger.exception("copying adapter version %d to the device failed", copy.version)
                self._pool.clear_slot(copy.slot)
                result.failed_copies[copy.version] = str(error)
            else:
                result.copied.append(copy.version)

    def _read_logits(self, logits_MV: torch.Tensor, layout: StepLayout, result: StepResult) -> None:
        first = 0
        for seq, position, num_rows in layout.prompt_rows:
            rows = logits_MV[first : first + num_rows]
            result.prompt_logprobs[seq] = self._prompt_logprobs(rows, seq, position)
            first += num_rows
        if layout.sampled:
            result.tokens = self._sampler.sample(logits_MV[first:], layout.sampled)
            for token in result.tokens:
                if token.error is None:
                    self._inputs.append(token.seq, token.token_id)

    def _prompt_logprobs(
        self, logits_MV: torch.Tensor, seq: int, first_position: int
    ) -> list[TokenLogprobs]:
        return self._sampler.prompt_logprobs(logits_MV, seq, first_position)
