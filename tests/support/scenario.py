"""What is simulated: one engine, its traffic, and the answers that are right."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorikeet.core.request import FinishReason, TokenLogprobs
from lorikeet.core.sequence import Sequence
from tests.support.fake_worker import first_hash, next_token, pooled, prefix_hash

VOCAB_SIZE = 29
EOS = 3
CLASS_ELEMS = (48, 80)
SLAB_ELEMS = 240


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One simulated engine and its traffic."""

    seed: int
    num_requests: int = 150
    page_size: int = 4
    num_pages: int = 40
    radix: bool = True
    overlap: bool = False
    policy: str = "fcfs"
    max_running: int = 8
    max_step_tokens: int = 32
    max_prefill_tokens: int = 64
    max_loras: int = 3
    num_slots: int = 4
    num_adapters: int = 6
    num_pinned: int = 0
    popularity: str = "uniform"
    base_share: float = 0.25
    eviction: str = "lru"
    max_passes: int = 16
    arrivals_per_step: float = 1.0
    abort_rate: float = 0.0
    copy_failure_rate: float = 0.0
    token_error_rate: float = 0.0
    replace_rate: float = 0.0
    step_failure_rate: float = 0.0
    ignore_eos: float = 0.4
    pooling_rate: float = 0.0
    max_host: int | None = None
    read_steps: int = 6
    read_failure_rate: float = 0.0
    copy_steps: int = 0
    unload_rate: float = 0.0
    even_length: int | None = None
    max_reads: int = 64


@dataclass
class Answer:
    """What a request was answered with so far."""

    seq: Sequence
    name: str | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached: set[int] = field(default_factory=set)
    finish: FinishReason | None = None
    embedding: bytes | None = None
    was_aborted: bool = False


def expected_answer(seq: Sequence, context_length: int, capacity: int) -> tuple[list[int], str]:
    """The oracle: tokens and kind of finish of a request that runs alone, without cache, chunks or preemption."""
    sampling = seq.request.sampling
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
    state = first_hash(seq.version)
    for token in seq.request.prompt_token_ids:
        state = prefix_hash(state, token)
    tokens: list[int] = []
    length = len(seq.request.prompt_token_ids)
    if sampling.max_new_tokens is None:
        longest = min(context_length, capacity + 1) - length
    else:
        longest = min(sampling.max_new_tokens, context_length - length)
    while len(tokens) < longest:
        token = next_token(state, seq.seed, VOCAB_SIZE)
        tokens.append(token)
        state = prefix_hash(state, token)
        if token in stops and len(tokens) >= sampling.min_new_tokens:
            return tokens, "stop"
    return tokens, "length"


def expected_embedding(seq: Sequence) -> bytes:
    """The oracle: the vector of a request with pooling."""
    hashes: list[int] = []
    for token in seq.request.prompt_token_ids:
        hashes.append(prefix_hash(hashes[-1] if hashes else first_hash(seq.version), token))
    assert seq.request.pooling is not None
    return pooled(seq.request.pooling, hashes)
