"""When a sequence ends."""

from __future__ import annotations

from lorikeet.core.failure import Failure
from lorikeet.core.request import FinishReason
from lorikeet.core.sequence import Sequence
from lorikeet.errors import RequestError
from lorikeet.kv.manager import KVManager
from lorikeet.scheduler.budget import SchedulerLimits


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
