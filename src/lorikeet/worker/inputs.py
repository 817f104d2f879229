"""From a plan to tensors: the worker's memory of each sequence, and the :class:`ForwardBatch` of one step.

Shape legend: T tokens of the step, N sequences of the step (chunks first, then rows), P pages of the longest page
table, M rows of T whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

import torch

from lorikeet.attention.base import AttentionInputs
from lorikeet.core.plan import DecodeRow, PrefillChunk, SequenceStart, StepPlan
from lorikeet.errors import EngineFault
from lorikeet.kv.storage import KVStorage
from lorikeet.layers.batch import ForwardBatch
from lorikeet.lora.batch_builder import LoRABatchBuilder


@dataclass(slots=True)
class SequenceState:
    """What a worker remembers of a running sequence between steps.

    Attributes:
        tokens: prompt and generated tokens; the newest may not have K/V yet.
        pages: page table, as far as plans have extended it.
        slot: device slot of its adapter, 0 for the base model.
        prompt_logprob_start: first prompt position whose log-probability is wanted, or -1.
    """

    tokens: list[int]
    pages: list[int]
    num_prompt: int
    slot: int
    prompt_logprob_start: int

    @classmethod
    def begin(cls, start: SequenceStart) -> SequenceState:
        return cls(
            tokens=list(start.token_ids),
            pages=list(start.page_ids),
            num_prompt=start.num_prompt,
            slot=start.slot,
            prompt_logprob_start=start.logprob_start,
        )

    def prompt_logprob_rows(self, chunk: PrefillChunk) -> range:
        """Positions of ``chunk`` whose logits predict a prompt token that was asked for.

        Position p predicts the token at p + 1, so the rows of a chunk ``[start, end)`` are those p for which
        p + 1 lies in ``[logprob_start, num_prompt)``.
        """
        if self.prompt_logprob_start < 0:
            return range(0)
        first = max(chunk.start, self.prompt_logprob_start - 1)
        return range(first, max(first, min(chunk.end, self.num_prompt - 1)))


@dataclass(slots=True)
class StepLayout:
    """Which rows of the logits belong to what.

    Attributes:
        prompt_rows: (sequence, first prompt position predicted, number of rows), in the order of the logits' rows.
        sampled: sequences that sample a token, in the order of the logits' last rows.
    """

    prompt_rows: list[tuple[int, int, int]] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)


class InputBuilder:
    """Keeps the states of running sequences and turns each plan into a :class:`ForwardBatch`."""

    def __init__(
        self, kv: KVStorage, page_size: int, device: torch.device, lora: LoRABatchBuilder | None
    ) -> None:
        self._kv = kv
        self._page_size = page_size
        self._device = device
        self._lora = lora
        self.states: dict[int, SequenceState] = {}

    def apply(self, plan: StepPlan) -> None:
        """Open and extend the states that the plan names (ended ones are closed by :meth:`close`)."""
        for start in plan.starts:
            self.states[start.seq] = SequenceState.begin(start)
        for part in chain(plan.chunks, plan.rows):
            self._state(part.seq).pages.extend(part.new_page_ids)

    def close(self, seq: int) -> None:
        self.states.pop(seq, None)

    def append(self, seq: int, token_id: int) -> None:
        """Add the token that the sequence just sampled."""
        self._state(seq).tokens.append(token_id)

    def build(self, plan: StepPlan) -> tuple[ForwardBatch, StepLayout]:
        """Lay out a step that computes at least one token.

        The logits' rows are, in this order: rows wanted for prompt log-probabilities (by chunk), then one row for
        each sequence that samples. A row may appear in both parts.
        """
        parts = _Parts(self._page_size)
        for chunk in plan.chunks:
            parts.add_chunk(chunk, self._state(chunk.seq))
        for row in plan.rows:
            parts.add_row(row, self._state(row.seq))
        batch = ForwardBatch(
            input_ids_T=self._tensor(parts.input_ids),
            positions_T=self._tensor(parts.positions),
            attn=AttentionInputs(
                query_starts=parts.query_starts,
                kv_lens=parts.kv_lens,
                page_table_NP=self._page_table(parts.page_tables),
                slot_mapping_T=self._tensor(parts.kv_slots),
                page_size=self._page_size,
            ),
            kv=self._kv,
            lora=self._lora_batch(parts),
            logits_rows_N=self._tensor(parts.prompt_rows + parts.sample_rows),
        )
        return batch, parts.layout

    def _lora_batch(self, parts: _Parts):
        if self._lora is None:
            return None
        lengths = [b - a for a, b in zip(parts.query_starts, parts.query_starts[1:], strict=False)]
        # Rows for prompt log-probabilities come first in the logits, so each sequence may own two runs of rows.
        rows = parts.prompt_rows + parts.sample_rows
        return self._lora.build(parts.slots, lengths, rows)

    def _page_table(self, tables: list[list[int]]) -> torch.Tensor:
        width = max(map(len, tables))
        return self._tensor([table + [0] * (width - len(table)) for table in tables])

    def _tensor(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _state(self, seq: int) -> SequenceState:
        state = self.states.get(seq)
        if state is None:
            raise EngineFault(f"the plan names sequence {seq}, which never started on this worker")
        return state


class _Parts:
    """The lists that become a batch's tensors."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self.input_ids: list[int] = []
        self.positions: list[int] = []
        self.kv_slots: list[int] = []
        self.query_starts: list[int] = [0]
        self.kv_lens: list[int] = []
        self.page_tables: list[list[int]] = []
        self.slots: list[int] = []
        self.prompt_rows: list[int] = []
        self.sample_rows: list[int] = []
        self.layout = StepLayout()

    def add_chunk(self, chunk: PrefillChunk, state: SequenceState) -> None:
        base = len(self.input_ids) - chunk.start
        self._add(range(chunk.start, chunk.end), state)
        wanted = state.prompt_logprob_rows(chunk)
        # Position 0 is predicted by nothing, but is reported with position 1, or alone if the prompt has no other.
        is_single = state.num_prompt == 1 and state.prompt_logprob_start == 0 and chunk.start == 0
        if wanted or is_single:
            self.prompt_rows.extend(base + position for position in wanted)
            self.layout.prompt_rows.append((chunk.seq, wanted.start + 1, len(wanted)))
        if chunk.sample:
            self.sample_rows.append(len(self.input_ids) - 1)
            self.layout.sampled.append(chunk.seq)

    def add_row(self, row: DecodeRow, state: SequenceState) -> None:
        self._add(range(row.position, row.position + 1), state)
        self.sample_rows.append(len(self.input_ids) - 1)
        self.layout.sampled.append(row.seq)

    def _add(self, positions: range, state: SequenceState) -> None:
        size, pages = self._page_size, state.pages
        self.input_ids.extend(state.tokens[positions.start : positions.stop])
        self.positions.extend(positions)
        self.kv_slots.extend(pages[p // size] * size + p % size for p in positions)
        self.query_starts.append(len(self.input_ids))
        self.kv_lens.append(positions.stop)
        self.page_tables.append(pages[: (positions.stop + size - 1) // size])
        self.slots.append(state.slot)
