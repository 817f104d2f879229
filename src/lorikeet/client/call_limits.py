"""Limits on what one call may ask for. Each number stands in docs/http.md with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from lorikeet.core.request import Prompt
from lorikeet.core.sampling import SamplingParams
from lorikeet.errors import RequestError

# Completions of one call: prompts x n. As many inputs as OpenAI's embeddings take, twice the largest n. Each costs the HTTP
# process about 4 KB and 20 us before the first token.
MAX_COMPLETIONS = 2048
# Tokens of all prompts of one call, unless the context is longer: 80 MB of integers in each process.
MAX_CALL_TOKENS = 2**21
# Log-probabilities of one call: each position counts one for its token and one for each of the most likely ones. That is a
# prompt of 131,072 tokens with the likeliest of each position; a value takes up to 230 bytes in each process.
MAX_LOGPROBS = 2**18

# Characters of one prompt: more than a million tokens of English. Tokenizing takes up to 150 times as many bytes of memory.
MAX_TEXT = 4 * 2**20
# Characters of all prompts of one call: tokenizing takes a second for each million or two.
MAX_TEXTS = 8 * 2**20


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What a call may ask for; None is without limit."""

    max_completions: int | None = MAX_COMPLETIONS
    max_tokens: int | None = MAX_CALL_TOKENS
    max_logprobs: int | None = MAX_LOGPROBS
    max_text: int | None = MAX_TEXT
    max_texts: int | None = MAX_TEXTS


SERVED = CallLimits()
"""The limits of a server, whose callers share two loops."""

OWN = CallLimits(max_completions=None, max_tokens=None, max_text=None, max_texts=None)
"""Those of a process that has an engine of its own: memory for log-probabilities is all that bounds a call."""


def check_completions(num_prompts: int, num_samples: int, limits: CallLimits) -> None:
    """Raise RequestError if a call has more completions than it may, before any of them is made."""
    most = limits.max_completions
    if most is not None and num_prompts * num_samples > most:
        each = f" with n = {num_samples} completions each" if num_samples > 1 else ""
        raise RequestError(
            f"the call has {num_prompts} prompts{each}; allowed: at most {most} completions in one call",
            "n" if num_samples > 1 else "text",
        )


def num_prompt_logprobs(prompt: Prompt) -> int:
    """How many log-probabilities of a prompt's own tokens the reply has."""
    if not prompt.return_logprob or prompt.logprob_start_len < 0:
        return 0
    num_positions = len(prompt.prompt_token_ids) - prompt.logprob_start_len
    return num_positions * (1 + prompt.top_logprobs_num)


def fit_logprobs(
    prompts: Sequence[Prompt],
    sampling: Sequence[SamplingParams],
    limits: CallLimits,
    context_length: int,
) -> list[SamplingParams]:
    """Give each prompt without ``max_new_tokens`` a number: what the context holds, or less, so that the call's
    log-probabilities stay within their limit. Parameters that prompts share stay shared.

    Raises:
        RequestError: prompts and ``max_new_tokens`` ask for more log-probabilities than a call may have.
    """
    most = limits.max_logprobs
    asked = open_ended = 0
    for prompt, params in zip(prompts, sampling, strict=True):
        if not prompt.return_logprob:
            continue
        each = params.n * (1 + prompt.top_logprobs_num)
        asked += params.n * num_prompt_logprobs(prompt)
        if params.max_new_tokens is None:
            open_ended += each
        else:
            room = context_length - len(prompt.prompt_token_ids)
            asked += each * min(params.max_new_tokens, room)
    if most is not None and asked + open_ended > most:
        raise RequestError.about(
            ("top_logprobs_num",),
            f": the call asks for {asked + open_ended} log-probabilities (positions of the prompts and of ",
            ("max_new_tokens",),
            ", each times 1 + ",
            ("top_logprobs_num",),
            f", for each completion); allowed: at most {most}",
        )
    longest = context_length
    if most is not None and open_ended:
        longest = min(longest, (most - asked) // open_ended)
    ended: dict[tuple[int, int], SamplingParams] = {}
    found: list[SamplingParams] = []
    for prompt, params in zip(prompts, sampling, strict=True):
        if params.max_new_tokens is None:
            end = longest if prompt.return_logprob else context_length
            if (id(params), end) not in ended:
                ended[id(params), end] = msgspec.structs.replace(params, max_new_tokens=end)
            params = ended[id(params), end]
        found.append(params)
    return found
