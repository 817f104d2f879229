"""One rank on one device: it executes plans and decides nothing.

``execute`` is the whole life of a step on this side: drop what ended, move adapters, open what starts, compute,
sample. The device's state between steps is the K/V pages, the adapter pool and one small record per sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorikeet.attention.base import AttentionBackend
from lorikeet.core.plan import StepPlan, StepResult
from lorikeet.errors import EngineFault
from lorikeet.layers.batch import ForwardBatch
from lorikeet.worker.copier import Copier
from lorikeet.worker.inputs import InputBuilder, StepLayout
from lorikeet.worker.sampler import Sampler

# A step that has nothing to compute waits this long for a copy, then lets the loop look for new requests.
COPY_WAIT_S = 0.02


class Worker:
    """Executes step plans for one rank.

    Args:
        forward: the network: a batch to logits, float32 [M, V].
        inputs: builder of batches, with the states of running sequences.
        sampler: logits to tokens.
        copier: brings adapters to the device; None when LoRA is off.
    """

    def __init__(
        self,
        *,
        forward: Callable[[ForwardBatch], torch.Tensor],
        attention: AttentionBackend,
        inputs: InputBuilder,
        sampler: Sampler,
        copier: Copier | None,
    ) -> None:
        self._forward = forward
        self._attention = attention
        self._inputs = inputs
        self._sampler = sampler
        self._copier = copier
        # Slots whose copies are not complete.
        self._copying: dict[int, int] = {}

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Carry out one plan.

        Adapter copies begin here and run beside the computation, of this step and of later ones; the result of the step
        in which one is found complete names it. A step that computes nothing waits a little for one. A failing copy is
        reported in the result and fails its version alone.

        Raises:
            EngineFault: the plan contradicts this worker's state.
        """
        result = StepResult(step=plan.step)
        for seq in plan.ended:
            self._inputs.close(seq)
            self._sampler.end(seq)
        self._begin_copies(plan)
        for start in plan.starts:
            self._sampler.start(start)
        self._inputs.apply(plan)
        if not plan.is_empty:
            batch, layout = self._inputs.build(plan)
            self._attention.prepare(batch.attn)
            self._read_logits(self._forward(batch), layout, result)
        elif self._copier is not None and self._copier.is_busy:
            self._copier.wait(COPY_WAIT_S)
        self._end_copies(result)
        return result

    def close(self) -> None:
        """End the thread that copies."""
        if self._copier is not None:
            self._copier.close()

    def _begin_copies(self, plan: StepPlan) -> None:
        if self._copier is None:
            return
        for slot in plan.freed_slots:
            self._copier.free(slot)
        for copy in plan.copies:
            self._copier.start(copy)
            self._copying[copy.version] = copy.slot
        unready = {start.slot for start in plan.starts} & set(self._copying.values())
        if unready:
            raise EngineFault(
                f"step {plan.step} uses slots {unready}, whose copies are not complete"
            )

    def _end_copies(self, result: StepResult) -> None:
        if self._copier is None:
            return
        result.copied, result.failed_copies = self._copier.collect()
        for version in (*result.copied, *result.failed_copies):
            del self._copying[version]

    def _read_logits(self, logits_MV: torch.Tensor, layout: StepLayout, result: StepResult) -> None:
        first = 0
        for seq, position, num_rows in layout.prompt_rows:
            rows = logits_MV[first : first + num_rows]
            result.prompt_logprobs[seq] = self._sampler.prompt_logprobs(rows, seq, position)
            first += num_rows
        if layout.sampled:
            result.tokens = self._sampler.sample(logits_MV[first:], layout.sampled)
            for token in result.tokens:
                if token.error is None:
                    self._inputs.append(token.seq, token.token_id)
