"""From a plan to tensors: the worker's memory of each sequence, and the :class:`ForwardBatch` of one step.

Shape legend: T tokens of the step, N sequences of the step (chunks first, then rows), P pages of the longest page
table, M rows of T whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from lorikeet.attention.base import AttentionInputs
from lorikeet.core.plan import DecodeRow, PrefillChunk, SequenceStart, StepPlan
from lorikeet.core.request import Pooling
from lorikeet.errors import EngineFault
from lorikeet.kv.storage import KVStorage
from lorikeet.layers.batch import ForwardBatch
from lorikeet.lora.batch_builder import BatchBuilder, LoRAPlan
from lorikeet.worker.lanes import Lanes
from lorikeet.worker.staging import Upload, int_type


@dataclass(slots=True)
class SequenceState:
    """What a worker remembers of a running sequence between steps.

    Attributes:
        tokens: those that were known when it started; later ones are in ``Lanes.sampled_L``, on the device.
        lane: where its page table and its newest token are.
        slot: device slot of its adapter, 0 for the base model.
        prompt_logprob_start: first prompt position whose log-probability is wanted, or -1.
        pooling: None if the sequence samples tokens.
    """

    tokens: list[int]
    num_prompt: int
    lane: int
    slot: int
    prompt_logprob_start: int
    pooling: Pooling | None = None

    def prompt_logprob_rows(self, chunk: PrefillChunk) -> range:
        """Positions of ``chunk`` whose logits predict a prompt token that was asked for.

        Position p predicts the token at p + 1, so the rows of a chunk ``[start, end)`` are those p for which
        p + 1 lies in ``[logprob_start, num_prompt)``.
        """
        if self.prompt_logprob_start < 0:
            return range(0)
        first = max(chunk.start, self.prompt_logprob_start - 1)
        return range(first, max(first, min(chunk.end, self.num_prompt - 1)))


@dataclass(frozen=True, slots=True)
class PooledPart:
    """What a step computes of a sequence that is pooled.

    Attributes:
        start: position of its first token in this step.
        num_rows: how many states it takes; all of its tokens for a mean, else the last one or none.
        is_last: its vector is complete with them.
    """

    seq: int
    start: int
    num_rows: int
    is_last: bool


@dataclass(slots=True)
class StepLayout:
    """The rows of a step: chunks first, then sequences that decode.

    Attributes:
        prompt_rows: (sequence, first prompt position predicted, number of rows), in the order of the logits' rows.
        sampled: sequences that sample a token, in the order of the logits' last rows.
        sampled_lanes: their lanes.
        lanes_N: of all sequences of the step.
        slots: adapter slots of all sequences of the step.
        lengths_N: tokens of each.
        ids_T, positions_T, logits_rows: see :class:`ForwardBatch`.
        num_chunks: how many of the sequences are chunks.
        pooled: sequences that are pooled, in batch order; ``pooled_rows`` are the rows of T that they take.
    """

    lanes_N: np.ndarray
    lengths_N: np.ndarray
    kv_lens_N: np.ndarray
    ids_T: np.ndarray
    positions_T: np.ndarray
    num_chunks: int
    slots: list[int]
    sampled: list[int]
    sampled_lanes: np.ndarray
    logits_rows: list[int]
    prompt_rows: list[tuple[int, int, int]] = field(default_factory=list)
    pooled: list[PooledPart] = field(default_factory=list)
    pooled_rows: list[int] = field(default_factory=list)

    @property
    def is_decode(self) -> bool:
        """True if every sequence computes its newest token and samples the next one."""
        return self.num_chunks == 0


class InputBuilder:
    """Keeps the states of running sequences and turns each plan into a :class:`ForwardBatch`."""

    def __init__(
        self,
        kv: KVStorage,
        page_size: int,
        device: torch.device,
        lora: BatchBuilder | None,
        lanes: Lanes,
    ) -> None:
        self._kv = kv
        self.page_size = page_size
        self._device = device
        self._lora = lora
        self._int = int_type(device)
        self.lanes = lanes
        self.states: dict[int, SequenceState] = {}

    def apply(self, plan: StepPlan) -> None:
        """Open and extend the states that the plan names (ended ones are closed by :meth:`close`)."""
        for start in plan.starts:
            self.states[start.seq] = self._open(start)
        for part in (*plan.chunks, *plan.rows):
            self.lanes.extend(self._state(part.seq).lane, part.new_page_ids)

    def close(self, seq: int) -> None:
        """Forget a sequence; one that never started means nothing."""
        state = self.states.pop(seq, None)
        if state is not None:
            self.lanes.close(state.lane)

    def lay_out(self, plan: StepPlan) -> StepLayout:
        """Which rows a step that computes at least one token has.

        The logits' rows are, in this order: rows wanted for prompt log-probabilities (by chunk), then one row for
        each sequence that samples. A row may appear in both parts.
        """
        parts = _Parts(self._int)
        for chunk in plan.chunks:
            parts.add_chunk(chunk, self._state(chunk.seq))
        parts.add_rows(plan.rows, [self._state(row.seq) for row in plan.rows])
        return parts.layout()

    def places(self, lanes: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where in the cache the K/V of each position of each lane go."""
        size = self.page_size
        return self.lanes.pages_LP[lanes, positions // size] * size + positions % size

    def page_table(self, layout: StepLayout) -> np.ndarray:
        """Page tables [N, P], as wide as the longest sequence needs."""
        width = -(-int(layout.kv_lens_N.max()) // self.page_size)
        return self.lanes.pages_LP[layout.lanes_N, :width]

    def stage(
        self, layout: StepLayout, more: list[np.ndarray]
    ) -> tuple[ForwardBatch, list[torch.Tensor]]:
        """The batch of a step, and ``more`` arrays, on the device."""
        lanes_T = np.repeat(layout.lanes_N, layout.lengths_N)
        arrays = [
            layout.ids_T,
            layout.positions_T,
            self.places(lanes_T, layout.positions_T),
            np.asarray(layout.logits_rows, dtype=self._int),
            np.asarray(layout.pooled_rows, dtype=self._int),
            *self.attention_arrays(layout),
        ]
        plan = self._lora_plan(layout)
        lora_arrays = [] if plan is None else plan.arrays
        ids, positions, places, rows, pooled_rows, table, starts, kv_lens, *rest = Upload(
            [*arrays, *more, *lora_arrays], self._device
        ).tensors()
        lora = None if plan is None else plan.batch(rest[len(more) :])
        batch = ForwardBatch(
            input_ids_T=ids,
            positions_T=positions,
            attn=self.attention_inputs(layout, places, [table, starts, kv_lens]),
            kv=self._kv,
            lora=lora,
            logits_rows_N=None if layout.is_decode else rows,
            pooled_rows_P=pooled_rows if layout.pooled_rows else None,
            sampled_L=self.lanes.sampled_L,
        )
        return batch, rest[: len(more)]

    def head_batch(
        self, layout: StepLayout, batch: ForwardBatch, begin: int, end: int
    ) -> ForwardBatch:
        """The batch of a step as the LM head sees it that computes rows ``[begin, end)`` of the logits alone."""
        if batch.lora is None or self._lora is None:
            return batch
        rows = layout.logits_rows[begin:end]
        plan = self._lora.plan(layout.slots, layout.lengths_N.tolist(), rows)
        assert plan is not None
        arrays = plan.arrays
        tensors = Upload(arrays, self._device).tensors() if arrays else []
        return replace(batch, lora=plan.batch(tensors))

    def attention_arrays(self, layout: StepLayout) -> list[np.ndarray]:
        """What attention needs on the device beside the places: page tables, query starts, lengths."""
        starts_N1 = np.zeros(len(layout.lengths_N) + 1, dtype=self._int)
        np.cumsum(layout.lengths_N, out=starts_N1[1:])
        return [self.page_table(layout), starts_N1, layout.kv_lens_N]

    def attention_inputs(
        self, layout: StepLayout, places_T: torch.Tensor, tensors: list[torch.Tensor]
    ) -> AttentionInputs:
        """What attention is told of a step that runs eagerly.

        Args:
            places_T: where the K/V go, on the device.
            tensors: :meth:`attention_arrays` on the device.
        """
        table_NP, starts_N1, kv_lens_N = tensors
        return AttentionInputs(
            query_starts=[0, *np.cumsum(layout.lengths_N).tolist()],
            kv_lens=layout.kv_lens_N.tolist(),
            page_table_NP=table_NP,
            places_T=places_T,
            page_size=self.page_size,
            num_chunks=layout.num_chunks,
            query_starts_N1=starts_N1,
            kv_lens_N=kv_lens_N,
        )

    def _lora_plan(self, layout: StepLayout) -> LoRAPlan | None:
        if self._lora is None:
            return None
        # Rows for prompt log-probabilities come first in the logits, so each sequence may own two runs of rows.
        rows = None if layout.is_decode else layout.logits_rows
        return self._lora.plan(layout.slots, layout.lengths_N.tolist(), rows)

    def _open(self, start: SequenceStart) -> SequenceState:
        return SequenceState(
            tokens=list(start.token_ids),
            num_prompt=start.num_prompt,
            lane=self.lanes.open(start.page_ids),
            slot=start.slot,
            prompt_logprob_start=start.logprob_start,
            pooling=start.pooling,
        )

    def _state(self, seq: int) -> SequenceState:
        state = self.states.get(seq)
        if state is None:
            raise EngineFault(f"the plan names sequence {seq}, which never started on this worker")
        return state


class _Parts:
    """Collects the rows of a step."""

    def __init__(self, dtype: type[np.integer]) -> None:
        self._int = dtype
        self._ids: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._num_tokens = 0
        self._lanes: list[int] = []
        self._lengths: list[int] = []
        self._kv_lens: list[int] = []
        self._slots: list[int] = []
        self._num_chunks = 0
        self._sampled: list[int] = []
        self._sampled_lanes: list[int] = []
        self._sample_rows: list[int] = []
        self._prompt_rows: list[int] = []
        self._prompts: list[tuple[int, int, int]] = []
        self._pooled: list[PooledPart] = []
        self._pooled_rows: list[int] = []

    def add_chunk(self, chunk: PrefillChunk, state: SequenceState) -> None:
        base = self._num_tokens - chunk.start
        length = chunk.end - chunk.start
        self._ids.append(np.asarray(state.tokens[chunk.start : chunk.end], dtype=self._int))
        self._positions.append(np.arange(chunk.start, chunk.end, dtype=self._int))
        self._add(state, length, chunk.end)
        self._num_chunks += 1
        wanted = state.prompt_logprob_rows(chunk)
        # Position 0 is predicted by nothing, but is reported with position 1, or alone if the prompt has no other.
        is_single = state.num_prompt == 1 and state.prompt_logprob_start == 0 and chunk.start == 0
        if wanted or is_single:
            self._prompt_rows.extend(base + position for position in wanted)
            self._prompts.append((chunk.seq, wanted.start + 1, len(wanted)))
        if chunk.sample:
            self._sample(chunk.seq, state)
        if state.pooling is not None:
            num_rows = length if state.pooling.kind == "mean" else int(chunk.pool)
            self._pooled.append(PooledPart(chunk.seq, chunk.start, num_rows, chunk.pool))
            self._pooled_rows.extend(range(self._num_tokens - num_rows, self._num_tokens))

    def add_rows(self, rows: list[DecodeRow], states: list[SequenceState]) -> None:
        lanes = [state.lane for state in states]
        # The newest token of a sequence that decodes is always one that was sampled here.
        self._ids.append(-1 - np.asarray(lanes, dtype=self._int))
        self._positions.append(np.asarray([row.position for row in rows], dtype=self._int))
        for row, state in zip(rows, states, strict=True):
            self._add(state, 1, row.position + 1)
            self._sample(row.seq, state)

    def layout(self) -> StepLayout:
        return StepLayout(
            lanes_N=np.asarray(self._lanes, dtype=self._int),
            lengths_N=np.asarray(self._lengths, dtype=self._int),
            kv_lens_N=np.asarray(self._kv_lens, dtype=self._int),
            ids_T=np.concatenate(self._ids),
            positions_T=np.concatenate(self._positions),
            num_chunks=self._num_chunks,
            slots=self._slots,
            sampled=self._sampled,
            sampled_lanes=np.asarray(self._sampled_lanes, dtype=self._int),
            logits_rows=self._prompt_rows + self._sample_rows,
            prompt_rows=self._prompts,
            pooled=self._pooled,
            pooled_rows=self._pooled_rows,
        )

    def _add(self, state: SequenceState, length: int, kv_len: int) -> None:
        self._num_tokens += length
        self._lanes.append(state.lane)
        self._lengths.append(length)
        self._kv_lens.append(kv_len)
        self._slots.append(state.slot)

    def _sample(self, seq: int, state: SequenceState) -> None:
        self._sampled.append(seq)
        self._sampled_lanes.append(state.lane)
        self._sample_rows.append(self._num_tokens - 1)
