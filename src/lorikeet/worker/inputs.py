"""From a plan to tensors: what the worker remembers of each sequence, and the :class:`ForwardBatch` of a step.

Shape legend: T tokens of the step, N sequences of the step (chunks first, then rows), P pages of the longest page
table, M rows of T whose logits are wanted, L lanes: every running sequence has a small number, its index into arrays that
are made once.
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
from lorikeet.worker.staging import int_type, padded, upload_all


class Lanes:
    """Gives each running sequence a lane, with its page table on the host and its newest token on the device.

    A lane may go to another sequence while a step that writes its token still runs: the device works in order, so the
    other sequence's token comes later.

    Args:
        num_lanes: sequences that run at a time.
        max_pages: pages of the longest sequence.

    Attributes:
        pages_LP: page table of each lane; entries beyond its end are 0.
        sampled_L: int64 on the device: the token that was sampled last. Written by the sampler.
    """

    def __init__(self, num_lanes: int, max_pages: int, device: torch.device) -> None:
        self.pages_LP = np.zeros((num_lanes, max_pages), dtype=int_type(device))
        self.sampled_L = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        self._num_pages = [0] * num_lanes
        self._free = list(range(num_lanes - 1, -1, -1))

    def open(self, page_ids: list[int]) -> int:
        """Give a sequence a lane, with the pages that it holds.

        Raises:
            EngineFault: more sequences run than there are lanes.
        """
        if not self._free:
            raise EngineFault(f"more than {len(self._num_pages)} sequences run")
        lane = self._free.pop()
        self.extend(lane, page_ids)
        return lane

    def extend(self, lane: int, page_ids: list[int]) -> None:
        """Append pages to a sequence's page table.

        Raises:
            EngineFault: the sequence has more pages than the longest one may have.
        """
        if not page_ids:
            return
        begin = self._num_pages[lane]
        end = begin + len(page_ids)
        if end > self.pages_LP.shape[1]:
            raise EngineFault(f"{end} pages; a sequence has at most {self.pages_LP.shape[1]}")
        self.pages_LP[lane, begin:end] = page_ids
        self._num_pages[lane] = end

    def close(self, lane: int) -> None:
        """Give a lane back."""
        self.pages_LP[lane, : self._num_pages[lane]] = 0
        self._num_pages[lane] = 0
        self._free.append(lane)


@dataclass(slots=True)
class RunningSequence:
    """What a worker remembers of a sequence between steps.

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
    """The rows of a step on the host: chunks first, then sequences that decode.

    Attributes:
        lanes_N: of all sequences of the step.
        lengths_N: tokens of each.
        ids_T, positions_T, logits_rows: see :class:`ForwardBatch`.
        kv_lens_N, places_T, page_table_NP: see :class:`AttentionInputs`.
        num_chunks: how many of the sequences are chunks.
        slots: adapter slots of all sequences of the step.
        prompt_rows: (sequence, first prompt position predicted, number of rows), in the order of the logits' rows.
        sampled: sequences that sample a token, in the order of the logits' last rows.
        sampled_lanes: their lanes.
        pooled: sequences that are pooled, in batch order; ``pooled_rows`` are the rows of T that they take.
    """

    lanes_N: np.ndarray
    lengths_N: np.ndarray
    kv_lens_N: np.ndarray
    ids_T: np.ndarray
    positions_T: np.ndarray
    places_T: np.ndarray
    page_table_NP: np.ndarray
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


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FixedInputs:
    """The inputs of a captured pass: memory that stays where it is, and the sizes that those of a step are padded to.

    Attributes:
        data: uint8 on the device, with room for everything that a step brings: what the graphs read lies in front.
        num_tokens: rows that the pass computes (T).
        num_wanted: rows whose logits it computes (M); None if it computes those of all rows.
        table_NP: page tables for attention within the graphs, which has one row for each sequence; None if attention
            is called between them, for the sequences that there are.
    """

    data: torch.Tensor
    num_tokens: int
    num_wanted: int | None
    table_NP: torch.Tensor | None

    @property
    def num_sequences(self) -> int | None:
        """Sequences that attention within the graphs sees (N)."""
        return None if self.table_NP is None else self.num_tokens


class InputBuilder:
    """Remembers running sequences and turns each plan into a :class:`ForwardBatch`."""

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
        self.sequences: dict[int, RunningSequence] = {}

    def apply(self, plan: StepPlan) -> None:
        """Open and extend the sequences that the plan names (:meth:`close` closes those that ended)."""
        for start in plan.starts:
            self.sequences[start.seq] = self._open(start)
        for part in (*plan.chunks, *plan.rows):
            self.lanes.extend(self._sequence(part.seq).lane, part.new_page_ids)

    def close(self, seq: int) -> None:
        """Forget a sequence; nothing happens if it never started."""
        sequence = self.sequences.pop(seq, None)
        if sequence is not None:
            self.lanes.close(sequence.lane)

    def lay_out(self, plan: StepPlan) -> StepLayout:
        """Which rows a step that computes at least one token has.

        The logits' rows are, in this order: rows wanted for prompt log-probabilities (by chunk), then one row for
        each sequence that samples. A row may appear in both parts.
        """
        rows = _StepRows(self._int)
        for chunk in plan.chunks:
            rows.add_chunk(chunk, self._sequence(chunk.seq))
        rows.add_decoding(plan.rows, [self._sequence(row.seq) for row in plan.rows])
        return rows.layout(self.lanes.pages_LP, self.page_size)

    def padding(self, num_tokens: int, *, is_decode: bool) -> StepLayout:
        """A step whose K/V are stored nowhere and whose results nobody reads, for a capture.

        Args:
            is_decode: one row for each of as many sequences, instead of one prompt.
        """
        lengths_N = np.asarray([1] * num_tokens if is_decode else [num_tokens], dtype=self._int)
        zeros_T = np.zeros(num_tokens, dtype=self._int)
        num_pages = -(-int(lengths_N[0]) // self.page_size)
        return StepLayout(
            lanes_N=np.zeros_like(lengths_N),
            lengths_N=lengths_N,
            kv_lens_N=lengths_N,
            ids_T=zeros_T,
            positions_T=zeros_T,
            places_T=zeros_T - 1,
            page_table_NP=np.zeros((len(lengths_N), num_pages), dtype=self._int),
            num_chunks=0 if is_decode else 1,
            slots=[0] * len(lengths_N),
            sampled=[],
            sampled_lanes=zeros_T[:0],
            logits_rows=[],
        )

    def stage(
        self,
        layout: StepLayout,
        more: list[np.ndarray],
        fixed: FixedInputs | None = None,
        lora: LoRAPlan | None = None,
    ) -> tuple[ForwardBatch, list[torch.Tensor]]:
        """The batch of a step, and ``more`` arrays, on the device: all of them in one copy.

        Args:
            fixed: inputs of a captured pass, which the step's are written over; None takes fresh memory.
            lora: which rows use which adapter, as it was planned for that pass; other steps are planned here.
        """
        num_tokens = num_wanted = num_sequences = data = None
        if fixed is None:
            lora = self._lora_plan(layout)
        else:
            num_tokens, num_wanted = fixed.num_tokens, fixed.num_wanted
            num_sequences, data = fixed.num_sequences, fixed.data
        rows, pooled = layout.logits_rows, layout.pooled_rows
        has_rows = num_wanted is not None or not layout.is_decode
        lora_arrays = [] if lora is None else lora.arrays
        kv_lens_N = padded(layout.kv_lens_N, num_sequences, 1)
        starts_N1 = np.zeros(len(kv_lens_N) + 1, dtype=self._int)
        np.cumsum(padded(layout.lengths_N, num_sequences, 1), out=starts_N1[1:])
        arrays = [
            # What graphs read comes first, in the sizes of their pass: it lies at the same place in every step.
            padded(layout.ids_T, num_tokens, 0),
            padded(layout.positions_T, num_tokens, 0),
            padded(layout.places_T, num_tokens, -1),
            *([padded(np.asarray(rows, dtype=self._int), num_wanted, 0)] if has_rows else []),
            *lora_arrays,
            kv_lens_N,
            starts_N1,
            layout.page_table_NP,
            *([np.asarray(pooled, dtype=self._int)] if pooled else []),
            *more,
        ]
        sent = iter(upload_all(arrays, self._device, into=data))
        ids_T, positions_T, places_T = next(sent), next(sent), next(sent)
        rows_M = next(sent) if has_rows else None
        lora_batch = None if lora is None else lora.batch([next(sent) for _ in lora_arrays])
        attn = AttentionInputs(
            query_starts=starts_N1.tolist(),
            kv_lens=kv_lens_N.tolist(),
            kv_lens_N=next(sent),
            query_starts_N1=next(sent),
            page_table_NP=_fixed_table(next(sent), fixed),
            places_T=places_T[: starts_N1[-1]],
            page_size=self.page_size,
            num_chunks=layout.num_chunks,
            bucket=num_sequences,
        )
        batch = ForwardBatch(
            input_ids_T=ids_T,
            positions_T=positions_T,
            attn=attn,
            kv=self._kv,
            logits_rows_N=rows_M,
            sampled_L=self.lanes.sampled_L,
            pooled_rows_P=next(sent) if pooled else None,
            lora=lora_batch,
        )
        return batch, list(sent)

    def head_batch(
        self, layout: StepLayout, batch: ForwardBatch, begin: int, end: int
    ) -> ForwardBatch:
        """The batch of a step for an LM head that computes rows ``[begin, end)`` of the logits alone."""
        if batch.lora is None or self._lora is None:
            return batch
        rows = layout.logits_rows[begin:end]
        plan = self._lora.plan(layout.slots, layout.lengths_N.tolist(), rows)
        assert plan is not None
        return replace(batch, lora=plan.batch(upload_all(plan.arrays, self._device)))

    def _lora_plan(self, layout: StepLayout) -> LoRAPlan | None:
        if self._lora is None:
            return None
        # Rows for prompt log-probabilities come first in the logits, so each sequence may own two runs of rows.
        rows = None if layout.is_decode else layout.logits_rows
        return self._lora.plan(layout.slots, layout.lengths_N.tolist(), rows)

    def _open(self, start: SequenceStart) -> RunningSequence:
        return RunningSequence(
            tokens=list(start.token_ids),
            num_prompt=start.num_prompt,
            lane=self.lanes.open(start.page_ids),
            slot=start.slot,
            prompt_logprob_start=start.logprob_start,
            pooling=start.pooling,
        )

    def _sequence(self, seq: int) -> RunningSequence:
        sequence = self.sequences.get(seq)
        if sequence is None:
            raise EngineFault(f"the plan names sequence {seq}, which never started on this worker")
        return sequence


def _fixed_table(table_NP: torch.Tensor, fixed: FixedInputs | None) -> torch.Tensor:
    """Page tables where attention reads them: without gaps, so that tables of another width lie elsewhere."""
    if fixed is None or fixed.table_NP is None:
        return table_NP
    num_sequences, width = table_NP.shape
    fixed.table_NP[:num_sequences, :width].copy_(table_NP)
    return fixed.table_NP


class _StepRows:
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

    def add_chunk(self, chunk: PrefillChunk, sequence: RunningSequence) -> None:
        base = self._num_tokens - chunk.start
        length = chunk.end - chunk.start
        self._ids.append(np.asarray(sequence.tokens[chunk.start : chunk.end], dtype=self._int))
        self._positions.append(np.arange(chunk.start, chunk.end, dtype=self._int))
        self._add(sequence, length, chunk.end)
        self._num_chunks += 1
        wanted = sequence.prompt_logprob_rows(chunk)
        # Position 0 is predicted by nothing, but is reported with position 1, or alone if the prompt has no other.
        is_single = (
            sequence.num_prompt == 1 and sequence.prompt_logprob_start == 0 and chunk.start == 0
        )
        if wanted or is_single:
            self._prompt_rows.extend(base + position for position in wanted)
            self._prompts.append((chunk.seq, wanted.start + 1, len(wanted)))
        if chunk.sample:
            self._sample(chunk.seq, sequence)
        if sequence.pooling is not None:
            num_rows = length if sequence.pooling.kind == "mean" else int(chunk.pool)
            self._pooled.append(PooledPart(chunk.seq, chunk.start, num_rows, chunk.pool))
            self._pooled_rows.extend(range(self._num_tokens - num_rows, self._num_tokens))

    def add_decoding(self, rows: list[DecodeRow], sequences: list[RunningSequence]) -> None:
        lanes = [sequence.lane for sequence in sequences]
        # The newest token of a sequence that decodes is always one that was sampled here.
        self._ids.append(-1 - np.asarray(lanes, dtype=self._int))
        self._positions.append(np.asarray([row.position for row in rows], dtype=self._int))
        for row, sequence in zip(rows, sequences, strict=True):
            self._add(sequence, 1, row.position + 1)
            self._sample(row.seq, sequence)

    def layout(self, pages_LP: np.ndarray, page_size: int) -> StepLayout:
        """The rows that were added.

        Args:
            pages_LP: page tables of all lanes.
        """
        lanes_N = np.asarray(self._lanes, dtype=self._int)
        lengths_N = np.asarray(self._lengths, dtype=self._int)
        positions_T = np.concatenate(self._positions)
        pages_T = pages_LP[np.repeat(lanes_N, lengths_N), positions_T // page_size]
        # As wide as the longest sequence needs.
        num_pages = -(-max(self._kv_lens) // page_size)
        return StepLayout(
            lanes_N=lanes_N,
            lengths_N=lengths_N,
            kv_lens_N=np.asarray(self._kv_lens, dtype=self._int),
            ids_T=np.concatenate(self._ids),
            positions_T=positions_T,
            places_T=pages_T * page_size + positions_T % page_size,
            page_table_NP=pages_LP[lanes_N, :num_pages],
            num_chunks=self._num_chunks,
            slots=self._slots,
            sampled=self._sampled,
            sampled_lanes=np.asarray(self._sampled_lanes, dtype=self._int),
            logits_rows=self._prompt_rows + self._sample_rows,
            prompt_rows=self._prompts,
            pooled=self._pooled,
            pooled_rows=self._pooled_rows,
        )

    def _add(self, sequence: RunningSequence, length: int, kv_len: int) -> None:
        self._num_tokens += length
        self._lanes.append(sequence.lane)
        self._lengths.append(length)
        self._kv_lens.append(kv_len)
        self._slots.append(sequence.slot)

    def _sample(self, seq: int, sequence: RunningSequence) -> None:
        self._sampled.append(seq)
        self._sampled_lanes.append(sequence.lane)
        self._sample_rows.append(self._num_tokens - 1)
