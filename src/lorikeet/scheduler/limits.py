"""What the scheduler must keep to, and what follows from it: how much a step can take, and when a sequence ends."""

from __future__ import annotations

from dataclasses import dataclass

from lorikeet.core.failure import Failure
from lorikeet.core.request import FinishReason
from lorikeet.core.sequence import Sequence
from lorikeet.errors import RequestError
from lorikeet.kv.manager import KVManager

_HIGHEST_PRICE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What the scheduler must keep to; fixed for the life of the engine.

    Attributes:
        max_running: sequences that run at a time.
        max_step_tokens: tokens computed in a step (chunked prefill); decoding sequences claim theirs first.
        max_prefill_tokens: prompt tokens computed in a step.
        context_length: tokens of a prompt and its completion together.
        max_loras_per_batch: distinct adapters among the running sequences; the base model does not count.
        eos_token_ids: tokens that end a completion unless the request ignores them.
        policy: ``fcfs`` (first come, first served) or ``lpm`` (longest cached prefix first).
        max_passes: requests that may be admitted before one that came earlier and waits for room for its adapter
            (or, with ``lpm``, has a shorter cached prefix).
        max_queued: sequences that may wait; None for any number. Kept to by whoever adds sequences.
        vocab_size: how many tokens there are to choose from.
        even_length: tokens of context up to which a prompt's tokens cost about the same, because attention costs less
            than the rest of the network; None if they always do.
    """

    max_running: int
    max_step_tokens: int
    max_prefill_tokens: int
    context_length: int
    max_loras_per_batch: int
    eos_token_ids: frozenset[int]
    policy: str = "fcfs"
    max_passes: int = 64
    max_queued: int | None = None
    vocab_size: int | None = None
    even_length: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "max_running",
            "max_step_tokens",
            "max_prefill_tokens",
            "context_length",
            "max_loras_per_batch",
            "max_passes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.even_length is not None and self.even_length < 1:
            raise ValueError(f"even_length is {self.even_length}; at least 1 is needed")
        if self.policy not in ("fcfs", "lpm"):
            raise ValueError(f"schedule policy {self.policy!r}; known: fcfs, lpm")

    def length_class(self, num_tokens: int) -> int:
        """Prompts of one class are served in order, shorter classes pass longer ones (``scheduler/scheduler.py``).

        Class 0 fits in half of a step; each further class takes twice as long as the one before.
        """
        half = max(1, min(self.max_step_tokens, self.max_prefill_tokens) // 2)
        return ((num_tokens - 1) // half).bit_length()

    def price(self, position: int) -> int:
        """What computing a prompt's token at ``position`` costs, in tokens of a short prompt.

        Steps should take about the same time wherever in a prompt they are; otherwise everybody else would wait longer,
        the longer somebody's prompt is. The highest price keeps chunks large enough to be worth a step.
        """
        if self.even_length is None:
            return 1
        return min(_HIGHEST_PRICE, max(1, position // self.even_length))


@dataclass(slots=True)
class StepBudget:
    """What the step being planned can still take. Pages are not counted here: what an eviction yields only
    ``KVManager`` knows.

    Attributes:
        tokens: prompt tokens, by their price.
        sequences: sequences that may still be admitted.
        adapters: adapters that may still begin to run beside those that already do.
    """

    tokens: int
    sequences: int
    adapters: int

    @classmethod
    def for_step(
        cls, limits: SchedulerLimits, *, num_rows: int, num_running: int, num_adapters: int
    ) -> StepBudget:
        """Budget once the rows of decoding sequences have had their share."""
        return cls(
            tokens=max(0, min(limits.max_step_tokens - num_rows, limits.max_prefill_tokens)),
            sequences=limits.max_running - num_running,
            adapters=limits.max_loras_per_batch - num_adapters,
        )

    def take(self, num_wanted: int, price: int) -> int:
        """Spend tokens on at most ``num_wanted`` of a prompt. Returns how many; at least one if there are any."""
        num = min(num_wanted, max(1, self.tokens // price))
        self.tokens -= num * price
        return num

    @property
    def can_admit(self) -> bool:
        return self.tokens > 0 and self.sequences > 0


def prepare(seq: Sequence, limits: SchedulerLimits, kv: KVManager) -> None:
    """Work out the length at which a sequence ends and the tokens that end it.

    ``max_new_tokens=None`` means as many as the context and the K/V pool hold.

    Raises:
        RequestError: the prompt alone, or with the tokens it asks for, is longer than the context or the pool; or
            min_new_tokens forbids every token.
    """
    wanted = seq.sampling.max_new_tokens
    # The last token is sampled but never computed, so it takes no room in the pool.
    longest = min(limits.context_length, kv.capacity + 1)
    if wanted is None:
        seq.max_tokens = longest
    else:
        seq.max_tokens = min(seq.num_prompt + wanted, limits.context_length)
    shortest = seq.num_prompt if wanted == 0 else seq.num_prompt + 1
    if seq.num_prompt == 0:
        raise RequestError("the prompt is empty; at least one token is needed", "input_ids")
    if shortest > limits.context_length:
        raise RequestError(
            f"the prompt has {seq.num_prompt} tokens; the context holds {limits.context_length}, "
            "the completion included",
            "input_ids",
        )
    if max(seq.num_prompt, seq.max_tokens - 1) > kv.capacity or seq.max_tokens < shortest:
        raise RequestError.about(
            f"the prompt has {seq.num_prompt} tokens and ",
            ("max_new_tokens",),
            f" is {wanted}; K/V memory holds {kv.capacity} tokens ({kv.num_pages} pages of {kv.page_size})",
            param="max_new_tokens" if seq.num_prompt <= kv.capacity else "input_ids",
        )
    # A grammar that is complete admits nothing but an end-of-sequence token, so there it always counts.
    ignored = seq.sampling.ignore_eos and seq.sampling.grammar is None
    eos = frozenset[int]() if ignored else limits.eos_token_ids
    seq.stop_tokens = eos.union(seq.sampling.stop_token_ids)
    _check_first_token(seq, limits)


def _check_first_token(seq: Sequence, limits: SchedulerLimits) -> None:
    sampling, size = seq.sampling, limits.vocab_size
    if sampling.min_new_tokens == 0 or size is None:
        return
    # End-of-sequence tokens are forbidden, too, whether they are ignored or not.
    ends = limits.eos_token_ids.union(sampling.stop_token_ids)
    if sum(token < size for token in ends) == size:
        raise RequestError.about(
            ("min_new_tokens",),
            f" is {sampling.min_new_tokens} and stop_token_ids and the end-of-sequence tokens are all "
            f"{size} tokens: none may come first; allowed: ",
            ("min_new_tokens",),
            " 0, or fewer stop_token_ids",
        )


def finish_reason(seq: Sequence, token: int) -> FinishReason | None:
    """Why ``seq`` ends with ``token``, which has just been appended; None if it goes on."""
    if token in seq.stop_tokens and seq.num_output >= seq.sampling.min_new_tokens:
        return FinishReason(kind="stop", matched=token)
    if len(seq.tokens) >= seq.max_tokens:
        return FinishReason(kind="length", length=seq.num_output)
    return None


def failure(message: str) -> FinishReason:
    """The finish reason of a sequence that failed through no fault of the request."""
    return FinishReason(kind="abort", failure=Failure("failed", message))


def adapter_failure(reason: str) -> str:
    """The message for a request whose adapter was evicted from host memory and could not be read again."""
    return f"the adapter could not be read again: {reason}"
