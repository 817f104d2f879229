"""A step as data: what rank 0 decided (:class:`StepPlan`) and what came of it (:class:`StepResult`).

Plans are made by the scheduler, cross process boundaries as msgpack and are executed by every rank as they are. They
hold ints (and the sampling parameters of sequences that start), never tensors, so that they can be compared, logged
and replayed.

A worker keeps a small state per sequence between steps (tokens, page table, sampling state); a plan therefore says
only what is new: a :class:`SequenceStart` opens that state, chunks and rows extend it, ``ended`` closes it. The token
that a step samples is known to the worker before the scheduler commits it, so a :class:`DecodeRow` names no token:
that is what lets step n+1 be planned while step n runs.
"""

from __future__ import annotations

import msgspec

from lorikeet.core.request import Pooling, SamplingParams, TokenLogprobs

NOT_FINITE_LOGITS = "the model returned logits that are not finite (NaN or infinity)"
NOT_FINITE_STATES = "the model returned states that are not finite (NaN or infinity)"
NOT_FINITE = frozenset({NOT_FINITE_LOGITS, NOT_FINITE_STATES})
"""Errors of sequences that come of an adapter's weights, or the model's."""


class SequenceStart(msgspec.Struct, array_like=True, kw_only=True):
    """A sequence begins (or begins anew after a preemption) to run.

    Attributes:
        seq: the sequence's number, unique for the life of the engine.
        token_ids: the prompt, and after a preemption the tokens generated so far.
        num_prompt: how many of ``token_ids`` are the prompt; the rest count as output for penalties and seeds.
        page_ids: pages that already hold K/V of a cached prefix; ``num_cached`` tokens of it are valid.
        slot: device slot of the adapter; 0 is the base model.
        seed: sampling seed, always set.
        logprob_start: first prompt position whose log-probability is wanted, or -1.
        num_top_logprobs: -1 if the request wants no log-probabilities, else how many of the most likely to report.
        pooling: set if the sequence is to become a vector: it samples nothing.
    """

    seq: int
    token_ids: list[int]
    num_prompt: int
    num_cached: int
    page_ids: list[int]
    slot: int
    sampling: SamplingParams
    seed: int
    logprob_start: int = -1
    num_top_logprobs: int = -1
    pooling: Pooling | None = None


class PrefillChunk(msgspec.Struct, array_like=True, kw_only=True):
    """Compute tokens ``[start, end)`` of a sequence.

    Attributes:
        new_page_ids: appended to the sequence's page table before the step.
        sample: True if ``end`` is the end of the known tokens: the next token is sampled.
        pool: True in place of ``sample`` if the sequence is pooled: its vector is complete.
    """

    seq: int
    start: int
    end: int
    new_page_ids: list[int]
    sample: bool
    pool: bool = False


class DecodeRow(msgspec.Struct, array_like=True, kw_only=True):
    """Compute the newest token of a sequence, at ``position``, and sample the next one."""

    seq: int
    position: int
    new_page_ids: list[int]


class PageCopy(msgspec.Struct, array_like=True, kw_only=True):
    """An adapter version moves from the host to device memory, beside the computation of this step and of later ones.

    No sequence uses it before a ``StepResult`` has named it in ``copied``.

    Attributes:
        slot: row of the device's page table that will describe it.
        page_ids: rank pages it gets, in the order of ``HostAdapter.pages`` (see ``lora/adapter.py``).
    """

    version: int
    slot: int
    page_ids: list[int]


class StepPlan(msgspec.Struct, kw_only=True):
    """Everything that one step does.

    Attributes:
        step: increasing number.
        ended: sequences whose worker state is dropped before anything else (finished, aborted or preempted).
        freed_slots: adapter slots whose contents were evicted; they become rank 0 before the copies.
        copies: adapters whose copy to the device begins now.
        starts: sequences that begin to run in this step.
        chunks: prompt parts to compute, in batch order.
        rows: sequences that decode one token, in batch order after the chunks.
    """

    step: int
    ended: list[int] = []
    freed_slots: list[int] = []
    copies: list[PageCopy] = []
    starts: list[SequenceStart] = []
    chunks: list[PrefillChunk] = []
    rows: list[DecodeRow] = []

    @property
    def is_empty(self) -> bool:
        """True if the step computes nothing. It may still free worker state, or only ask whether copies have ended: then
        the worker waits for one."""
        return not (self.chunks or self.rows)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.end - chunk.start for chunk in self.chunks) + len(self.rows)


class SampledToken(msgspec.Struct, array_like=True, kw_only=True):
    """The token that a chunk or row sampled.

    Attributes:
        logprobs: set if the sequence asked for log-probabilities.
        error: set instead of a valid token if this sequence alone failed (a grammar that admits no token, say).
    """

    seq: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class PooledVector(msgspec.Struct, array_like=True, kw_only=True):
    """What a sequence was pooled to.

    Attributes:
        values: little-endian float32, as many as there are hidden features.
        error: set instead if the vector is none (not finite).
    """

    seq: int
    values: bytes = b""
    error: str | None = None


class StepResult(msgspec.Struct, kw_only=True):
    """What a step produced.

    Attributes:
        tokens: one per chunk with ``sample`` and per row, in batch order.
        vectors: one per chunk with ``pool``, in batch order.
        prompt_logprobs: sequence -> log-probabilities of the prompt positions that this step computed.
        copied: versions whose copy, of this plan or an earlier one, has become complete.
        failed_copies: version -> what went wrong; the next plan frees its slot.
    """

    step: int
    tokens: list[SampledToken] = []
    vectors: list[PooledVector] = []
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    copied: list[int] = []
    failed_copies: dict[int, str] = {}
