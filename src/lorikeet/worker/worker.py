"""One rank on one device: it executes plans and decides nothing.

``submit`` queues a step on the device: drop what ended, open what starts, compute, sample. ``collect`` waits for the
oldest step that was submitted and tells what came of it. Between the two the next step may be submitted, so that the
device never waits for the host. The device's state between steps is the K/V pages, the adapter pool and one small record
per sequence.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

from lorikeet.attention.base import AttentionBackend
from lorikeet.core.plan import StepPlan, StepResult
from lorikeet.errors import EngineFault, OutOfMemoryError
from lorikeet.lora.copier import Copier
from lorikeet.lora.host_memory import HostMemory
from lorikeet.models.decoder import Decoder
from lorikeet.worker.graphs import GraphRunner
from lorikeet.worker.inputs import InputBuilder, StepLayout
from lorikeet.worker.sampling.pending import PendingPrompt, PendingSample
from lorikeet.worker.sampling.pooler import PendingVectors, Pooler
from lorikeet.worker.sampling.sampler import Sampler

# A step that has nothing to compute waits this long for a copy, then lets the loop look for new requests.
COPY_WAIT_S = 0.02


@dataclass(slots=True)
class _Flight:
    """A step between its submission and its collection."""

    plan: StepPlan
    sample: PendingSample | None = None
    prompts: dict[int, list[PendingPrompt]] = field(default_factory=dict)
    vectors: PendingVectors | None = None


class Worker:
    """Executes step plans for one rank.

    Args:
        model: a batch to logits [M, V], and to states that are pooled.
        inputs: builder of batches; remembers the running sequences.
        sampler: logits to tokens.
        copier: brings adapters from host memory to the device; None when LoRA is off.
        graphs: captured steps; None if all run eagerly.
        max_logits_rows: rows of logits that are there at a time, at least as many as sequences run.
        overlap: a step may be submitted before the one before it is collected.
    """

    def __init__(
        self,
        *,
        model: Decoder,
        attention: AttentionBackend,
        inputs: InputBuilder,
        sampler: Sampler,
        copier: Copier | None,
        graphs: GraphRunner | None,
        max_logits_rows: int,
        overlap: bool,
    ) -> None:
        self._max_logits_rows = max_logits_rows
        self.max_ahead = 1 if overlap else 0
        self._model = model
        self._attention = attention
        self._inputs = inputs
        self._sampler = sampler
        self._copier = copier
        self._graphs = graphs
        self._pooler = Pooler()
        self._flights: deque[_Flight] = deque()
        # Slots whose copies are not complete.
        self._copying: dict[int, int] = {}

    @property
    def host(self) -> HostMemory | None:
        """Adapters in this rank's host memory; None when LoRA is off."""
        return self._copier.host if self._copier is not None else None

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
        for seq, parts in flight.prompts.items():
            result.prompt_logprobs[seq] = [entry for part in parts for entry in part.finish()]
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
        """End the threads that read and copy."""
        if self._copier is not None:
            self._copier.host.close()
            self._copier.close()

    def _end(self, ended: list[int]) -> None:
        for seq in ended:
            if seq in self._inputs.sequences:
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
            # What the allocator has cached may be enough. To compute the step again is safe: it stores the same K/V.
            torch.cuda.empty_cache()
            try:
                self._queue(layout, flight)
            except torch.OutOfMemoryError as error:
                raise OutOfMemoryError(
                    f"the device has no memory for a step of {plan.num_tokens} tokens: {error}"
                ) from error

    def _queue(self, layout: StepLayout, flight: _Flight) -> None:
        """Queue a step's work: inputs, model, sampling. A second attempt begins from scratch."""
        flight.prompts = {}
        arrays = self._sampler.arrays(layout.sampled, layout.sampled_lanes)
        most = self._max_logits_rows
        if len(layout.logits_rows) <= most:
            logits_MV, drawing = self._run_model(layout, arrays, flight)
            num_prompt_rows = len(layout.logits_rows) - len(layout.sampled)
            self._launch_prompts(layout, flight, logits_MV[:num_prompt_rows], 0)
            logits_NV = logits_MV[num_prompt_rows : len(layout.logits_rows)]
        else:
            logits_NV, drawing = self._run_in_pieces(layout, arrays, flight, most)
        if not layout.sampled:
            return
        if self._flights and self._sampler.needs_tokens(layout.sampled):
            self._finish_samples()
        flight.sample = self._sampler.launch(
            logits_NV, layout.sampled, drawing, self._inputs.lanes.sampled_L
        )

    def _run_in_pieces(
        self, layout: StepLayout, arrays: list[np.ndarray], flight: _Flight, most: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A step that wants the logits of many prompt positions: ``most`` rows at a time.

        All of them at once would be gigabytes where prompts and vocabulary are large.

        Returns:
            Logits of the rows that are sampled from, and ``arrays`` on the device.
        """
        batch, drawing = self._inputs.stage(layout, arrays)
        self._attention.prepare(batch.attn)
        states_MD, pooled_PD = self._model.wanted_states(batch)
        if pooled_PD is not None:
            flight.vectors = self._pooler.launch(pooled_PD, layout.pooled)

        def logits(begin: int, end: int) -> torch.Tensor:
            piece = self._inputs.head_batch(layout, batch, begin, end)
            return self._model.head(states_MD[begin:end], piece)

        num_rows = len(layout.logits_rows)
        num_prompt_rows = num_rows - len(layout.sampled)
        for begin in range(0, num_prompt_rows, most):
            end = min(begin + most, num_prompt_rows)
            self._launch_prompts(layout, flight, logits(begin, end), begin)
        if not layout.sampled:
            return states_MD[:0], drawing
        return logits(num_prompt_rows, num_rows), drawing

    def _launch_prompts(
        self, layout: StepLayout, flight: _Flight, logits_MV: torch.Tensor, begin: int
    ) -> None:
        """Log-probabilities of prompts from rows ``[begin, begin + M)`` of the logits."""
        end = begin + len(logits_MV)
        first = 0
        for seq, position, num_rows in layout.prompt_rows:
            low, high = max(first, begin), min(first + num_rows, end)
            # A prompt of one token has no rows of logits but still gets an entry.
            is_bare = num_rows == 0 and seq not in flight.prompts
            if low < high or is_bare:
                rows_MV = logits_MV[low - begin : high - begin] if low < high else logits_MV[:0]
                pending = self._sampler.launch_prompt(rows_MV, seq, position + max(0, low - first))
                flight.prompts.setdefault(seq, []).append(pending)
            first += num_rows

    def _finish_samples(self) -> None:
        """Read the tokens of earlier steps, which grammars need now; the device computes this step meanwhile."""
        for flight in self._flights:
            if flight.sample is not None:
                flight.sample.finish()

    def _run_model(
        self, layout: StepLayout, arrays: list, flight: _Flight
    ) -> tuple[torch.Tensor, list]:
        """Logits of the rows that are wanted (a captured step has more rows, at the end), and ``arrays`` on the device."""
        # Graphs do not return the hidden states that are pooled.
        if self._graphs is not None and not layout.pooled_rows:
            found = self._graphs.run(layout, arrays)
            if found is not None:
                return found
        batch, drawing = self._inputs.stage(layout, arrays)
        self._attention.prepare(batch.attn)
        if not layout.pooled_rows:
            return self._model.forward(batch), drawing
        logits_MV, states_PD = self._model.forward_pooled(batch)
        flight.vectors = self._pooler.launch(states_PD, layout.pooled)
        return logits_MV, drawing
