"""A completion while the engine works on it: its tokens, how far they are scheduled, and its state machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from lorikeet.core.request import Request, SamplingParams, TokenLogprobs


class SequenceState(Enum):
    """Where a sequence is in its life. ``LEGAL_TRANSITIONS`` says what may follow what."""

    #: In the queue for the first time: holds no pages, no adapter slot, and the worker has not heard of it.
    WAITING = "waiting"
    #: Admitted: holds pages for all its tokens; some of them are still to be computed.
    PREFILLING = "prefilling"
    #: Every known token is scheduled; each step computes the newest and samples one more.
    DECODING = "decoding"
    #: Lost its pages to an older sequence; in the queue, in front, with the tokens it has generated.
    PREEMPTED = "preempted"
    #: Its terminal output exists; it holds nothing.
    FINISHED = "finished"


LEGAL_TRANSITIONS: dict[SequenceState, frozenset[SequenceState]] = {
    SequenceState.WAITING: frozenset({SequenceState.PREFILLING, SequenceState.FINISHED}),
    SequenceState.PREFILLING: frozenset(
        {SequenceState.DECODING, SequenceState.PREEMPTED, SequenceState.FINISHED}
    ),
    SequenceState.DECODING: frozenset({SequenceState.PREEMPTED, SequenceState.FINISHED}),
    SequenceState.PREEMPTED: frozenset({SequenceState.PREFILLING, SequenceState.FINISHED}),
    SequenceState.FINISHED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion in the engine. Two sequences are equal only if they are the same object.

    Half-open ranges of token positions, in the order they are passed through::

        [0, num_scheduled)                      K/V is computed, or will be by a step that is already planned
        [num_scheduled, num_tokens)             known, still to be computed
        [num_tokens, num_tokens + num_pending)  sampled by a planned step that is not committed yet: the worker
                                                knows these tokens, we do not

    Attributes:
        id: the completion's; unique for the life of the engine, never reused.
        request: shared by the completions of one prompt.
        version: adapter version; 0 is the base model.
        seed: sampling seed, always set.
        call: id of the first completion of the call that it belongs to; None if it is to be treated as a call of its own.
        tokens: the prompt, then what was generated. While nothing was, it is the request's own list, so that many
            samples that wait cost no more than one: only :meth:`append` adds to it.
        max_tokens: the length at which it ends; set by ``Scheduler.add``.
        stop_tokens: token ids that end it; set by ``Scheduler.add``.
        cached_tokens: tokens that came from the prefix cache at the first admission; None before it.
        prompt_logprobs: collected so far; handed out with the first output.
        num_prompt_logprobs: how many were ever collected, so that a preemption asks only for the rest.
        arrival: number among all requests, in order of arrival.
        serial: number among the requests that name an adapter; -1 for the base model.
        order: place in the queue: ``arrival``, or below zero after a preemption.
        length_class: how long what was to be computed of its prompt was when it came into the queue; see
            ``SchedulerLimits.length_class``.
        last_step: newest plan that computes something for it; -1 if none does.
    """

    id: int
    request: Request
    version: int
    seed: int
    call: int | None = None
    tokens: list[int] = field(init=False)
    num_prompt: int = field(init=False)
    state: SequenceState = field(init=False, default=SequenceState.WAITING)
    max_tokens: int = field(init=False, default=0)
    stop_tokens: frozenset[int] = field(init=False, default=frozenset())
    num_scheduled: int = field(init=False, default=0)
    num_pending: int = field(init=False, default=0)
    cached_tokens: int | None = field(init=False, default=None)
    prompt_logprobs: list[TokenLogprobs] = field(init=False, default_factory=list[TokenLogprobs])
    num_prompt_logprobs: int = field(init=False, default=0)
    arrival: int = field(init=False, default=-1)
    serial: int = field(init=False, default=-1)
    order: int = field(init=False, default=-1)
    length_class: int = field(init=False, default=0)
    last_step: int = field(init=False, default=-1)

    def __post_init__(self) -> None:
        self.tokens = self.request.prompt_token_ids
        self.num_prompt = len(self.tokens)

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def num_tokens(self) -> int:
        """Tokens we know: the prompt and every committed output."""
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_top_logprobs(self) -> int:
        """Most likely tokens to report per output; -1 if no log-probabilities are wanted."""
        return self.request.top_logprobs_num if self.request.return_logprob else -1

    @property
    def logprob_start(self) -> int:
        """First prompt position whose log-probability is still to be computed, or -1."""
        first = self.request.logprob_start_len
        if not self.request.return_logprob or first < 0:
            return -1
        following = first + self.num_prompt_logprobs
        return following if following < self.num_prompt else -1

    @property
    def max_cacheable(self) -> int:
        """The most tokens that may come from the prefix cache at an admission.

        At least the newest token is computed, for there is nothing to sample from otherwise; and position p's
        log-probability comes from the computation of token p - 1. A mean is taken over all tokens.
        """
        pooling = self.request.pooling
        if pooling is not None and pooling.kind == "mean":
            return 0
        start = self.logprob_start
        limit = len(self.tokens) - 1
        return limit if start < 0 else min(limit, max(0, start - 1))

    def append(self, token_id: int) -> None:
        """Add a token that was generated."""
        if self.tokens is self.request.prompt_token_ids:
            self.tokens = list(self.tokens)
        self.tokens.append(token_id)

    def enter(self, state: SequenceState) -> None:
        """Change state.

        Raises:
            ValueError: the table of transitions does not allow it; a bug of the caller.
        """
        if state not in LEGAL_TRANSITIONS[self.state]:
            raise ValueError(
                f"sequence {self.id}: {self.state.value} -> {state.value} is not legal"
            )
        self.state = state
