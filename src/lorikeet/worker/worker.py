"""One rank on one device: it executes plans and decides nothing.

``submit`` queues a step on the device: drop what ended, open what starts, compute, sample. ``collect`` waits for the
oldest step that was submitted and tells what came of it. Between the two the next step may be submitted, so that the
device never waits for the host. The device's state between steps is the K/V pages, the adapter pool and one small record
per sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from lorikeet.attention.base import AttentionBackend
from lorikeet.core.plan import StepPlan, StepResult
from lorikeet.errors import EngineFault, OutOfMemoryError
from lorikeet.layers.batch import ForwardBatch
from lorikeet.worker.copier import Copier
from lorikeet.worker.inputs import InputBuilder, StepLayout
from lorikeet.worker.logprobs import PendingPrompt
from lorikeet.worker.pending_sample import PendingSample
from lorikeet.worker.pooler import PendingVectors, Pooler
from lorikeet.worker.sampler import Sampler

# A step that has nothing to compute waits this long for a copy, then lets the loop look for new requests.
COPY_WAIT_S = 0.02


@dataclass(slots=True)
class _Flight:
    """A step between its submission and its collection."""

    plan: StepPlan
    sample: PendingSample | None = None
    prompts: dict[int, PendingPrompt] = field(default_factory=dict)
    vectors: PendingVectors | None = None


class Network(Protocol):
    """See :class:`lorikeet.models.decoder.Decoder`."""

    def forward(self, batch: ForwardBatch, /) -> torch.Tensor: ...

    def forward_pooled(self, batch: ForwardBatch, /) -> tuple[torch.Tensor, torch.Tensor]: ...


class Graphs(Protocol):
    """Captured steps of some kind."""

    def run(
        self, layout: StepLayout, more: list[np.ndarray], /
    ) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
        """Run a step; None if it is none of this kind, and nothing was done.

        Returns:
            Logits of the rows that are wanted, behind which may be others, valid until the next step; and ``more``
            arrays on the device.
        """
        ...


class Worker:
    """Executes step plans for one rank.

    Args:
        network: a batch to logits [M, V], and to states that are pooled.
        inputs: builder of batches, with the states of running sequences.
        sampler: logits to tokens.
        copier: brings adapters to the device; None when LoRA is off.
        graphs: captured steps, asked in this order; what none of them runs runs eagerly.
        overlap: a step may be submitted before the one before it is collected.
    """

    def __init__(
        self,
        *,
        network: Network,
        attention: AttentionBackend,
        inputs: InputBuilder,
        sampler: Sampler,
        copier: Copier | None,
        graphs: Sequence[Graphs] = (),
        overlap: bool = False,
    ) -> None:
        self.max_ahead = 1 if overlap else 0
        self._network = network
        self._attention = attention
        self._inputs = inputs
        self._sampler = sampler
        self._copier = copier
        self._graphs = graphs
        self._pooler = Pooler()
        self._flights: deque[_Flight] = deque()
        # Slots whose copies are not complete.
        self._copying: dict[int, int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        """``submit`` and ``collect`` at once; nothing else may be submitted."""
        self.submit(plan)
        return self.collect()

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> None:
        """Begin one plan, behind those that were submitted before.

        Adapter copies begin here and run beside the computation, of this step and of later ones.

        Raises:
            OutOfMemoryError: the device has no memory for the step. Nothing of it was computed or copied; sequences
                that it was to start are open, as after any other step.
            EngineFault: the plan contradicts this worker's state.
        """
        self._end(plan.ended)
        if self._copier is not None:
            for slot in plan.freed_slots:
                self._copier.free(slot)
        self._check_slots(plan)
        for start in plan.starts:
            if start.pooling is None:
                self._sampler.start(start)
            else:
                self._pooler.start(start.seq, start.pooling)
        self._inputs.apply(plan)
        flight = _Flight(plan)
        if not plan.is_empty:
            self._compute(plan, flight)
        # Last: a step that fails for want of memory has copied nothing.
        if self._copier is not None:
            for copy in plan.copies:
                self._copier.start(copy)
                self._copying[copy.version] = copy.slot
        self._flights.append(flight)

    @torch.inference_mode()
    def collect(self) -> StepResult:
        """Wait for the oldest plan that was submitted.

        The result also names the adapters whose copy was found complete, whatever plan began it; a failing copy fails
        its version alone. A plan that computes nothing waits a little for a copy, unless another one is behind it.
        """
        flight = self._flights.popleft()
        result = StepResult(step=flight.plan.step)
        for seq, pending in flight.prompts.items():
            result.prompt_logprobs[seq] = pending.finish()
        if flight.sample is not None:
            result.tokens = flight.sample.finish()
        if flight.vectors is not None:
            result.vectors = flight.vectors.finish()
        is_waiting = flight.plan.is_empty and not self._flights
        if is_waiting and self._copier is not None and self._copier.is_busy:
            self._copier.wait(COPY_WAIT_S)
        self._end_copies(result)
        return result

    def close(self) -> None:
        """End the thread that copies."""
        if self._copier is not None:
            self._copier.close()

    def _end(self, ended: list[int]) -> None:
        for seq in ended:
            if seq in self._inputs.states:
                self._inputs.close(seq)
                if not self._pooler.end(seq):
                    self._sampler.end(seq)

    def _check_slots(self, plan: StepPlan) -> None:
        copying = {*self._copying.values(), *(copy.slot for copy in plan.copies)}
        unready = {start.slot for start in plan.starts} & copying
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

    def _compute(self, plan: StepPlan, flight: _Flight) -> None:
        layout = self._inputs.lay_out(plan)
        try:
            self._queue(layout, flight)
        except torch.OutOfMemoryError:
            # What the allocator keeps for later may be what is missing. Computing twice stores the same K/V twice.
            torch.cuda.empty_cache()
            try:
                self._queue(layout, flight)
            except torch.OutOfMemoryError as error:
                raise OutOfMemoryError(
                    f"the device has no memory for a step of {plan.num_tokens} tokens: {error}"
                ) from error

    def _queue(self, layout: StepLayout, flight: _Flight) -> None:
        """Queue a step's work: inputs, network, sampling."""
        arrays = self._sampler.arrays(layout.sampled, layout.sampled_lanes)
        logits_MV, drawing = self._run_network(layout, arrays, flight)
        first = 0
        for seq, position, num_rows in layout.prompt_rows:
            rows = logits_MV[first : first + num_rows]
            flight.prompts[seq] = self._sampler.launch_prompt(rows, seq, position)
            first += num_rows
        if not layout.sampled:
            return
        if self._flights and self._sampler.needs_tokens(layout.sampled):
            self._finish_samples()
        end = first + len(layout.sampled)
        flight.sample = self._sampler.launch(
            logits_MV[first:end], layout.sampled, drawing, self._inputs.lanes.sampled_L
        )

    def _finish_samples(self) -> None:
        """A grammar needs its newest token. The device computes this step meanwhile."""
        for flight in self._flights:
            if flight.sample is not None:
                flight.sample.finish()

    def _run_network(
        self, layout: StepLayout, arrays: list, flight: _Flight
    ) -> tuple[torch.Tensor, list]:
        """Logits of the rows that are wanted (a captured step has more rows, at the end), and ``arrays`` on the device."""
        # States that are pooled come out of no graph.
        for graphs in () if layout.pooled_rows else self._graphs:
            found = graphs.run(layout, arrays)
            if found is not None:
                return found
        batch, drawing = self._inputs.stage(layout, arrays)
        self._attention.prepare(batch.attn)
        if not layout.pooled_rows:
            return self._network.forward(batch), drawing
        logits_MV, states_PD = self._network.forward_pooled(batch)
        flight.vectors = self._pooler.launch(states_PD, layout.pooled)
        return logits_MV, drawing
