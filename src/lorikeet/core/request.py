"""What callers see of the engine: a request, and the outputs that answer it.

A request enters the engine as a :class:`Request`, and each of its completions leaves it as a series of
:class:`RequestOutput`, of which exactly one, the last, carries a :class:`FinishReason`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from lorikeet.core.failure import Failure
from lorikeet.core.sampling import MAX_SEED, SamplingParams
from lorikeet.errors import EngineFault, UserError

MAX_TOP_LOGPROBS = 1024


class Pooling(msgspec.Struct, frozen=True, kw_only=True):
    """How the hidden states of a prompt, behind the final norm, become one vector.

    Attributes:
        kind: ``last`` is the state of the last token, ``mean`` the mean over all tokens.
        normalize: divide by the Euclidean length.
    """

    kind: Literal["last", "mean"] = "last"
    normalize: bool = True


class Prompt(msgspec.Struct, kw_only=True):
    """One prompt and what is asked of it, but for the sampling parameters, which the prompts of a call may share.

    Attributes:
        adapter: an adapter's name; None is the base model.
        logprob_start_len: first prompt position whose log-probability is wanted; -1 means none of the prompt.
        top_logprobs_num: how many of the most likely tokens to report for each position.
        pooling: asks for one vector in place of tokens; ``max_new_tokens`` is 0 then.
    """

    prompt_token_ids: list[int]
    adapter: str | None = None
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    pooling: Pooling | None = None


class Request(Prompt, kw_only=True):
    """One prompt and its ``sampling.n`` completions. They share everything here, the list of tokens included.

    Each completion has an integer of its own, its id, which whoever submits the request hands out.
    """

    sampling: SamplingParams

    @classmethod
    def of(cls, prompt: Prompt, sampling: SamplingParams) -> Request:
        """A prompt with its parameters; nothing is copied."""
        return cls(
            sampling=sampling, **{name: getattr(prompt, name) for name in Prompt.__struct_fields__}
        )

    @property
    def num_samples(self) -> int:
        return self.sampling.n

    def seed(self, sample: int) -> int | None:
        """Sampling seed of one of the completions, None if any will do: they differ, or the completions would not."""
        seed = self.sampling.sampling_seed
        return None if seed is None else (seed + sample) % (MAX_SEED + 1)


FinishKind = Literal["stop", "length", "abort"]


class FinishReason(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a completion ended.

    Attributes:
        kind: ``stop`` (``matched`` says by what), ``length`` or ``abort`` (``failure`` says why).
        matched: token id of the end-of-sequence or stop token, or the stop string or pattern.
        length: the number of tokens generated, for ``length``.
        failure: an error, or an end that somebody asked for.
    """

    kind: FinishKind
    matched: int | str | None = None
    length: int | None = None
    failure: Failure | None = None

    @property
    def message(self) -> str | None:
        return None if self.failure is None else self.failure.message

    @property
    def status_code(self) -> int | None:
        """HTTP status of the error; None if it is none."""
        return None if self.failure is None else self.failure.status_code

    def error(self) -> UserError | EngineFault | None:
        """The exception that it stands for; None if the completion ended as it should, or as somebody asked."""
        if self.failure is None or self.failure.kind == "aborted":
            return None
        return self.failure.error()


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token at its position, and of the most likely ones there.

    Attributes:
        logprob: natural logarithm; None where there is none (the first token of a prompt).
        token_id: the token that the position holds.
        top: (logprob, token id) pairs, most likely first; empty if not asked for.
    """

    logprob: float | None
    token_id: int
    top: list[tuple[float, int]]


class RequestOutput(msgspec.Struct, kw_only=True):
    """What one step added to a completion.

    Attributes:
        id: the completion's.
        token_ids: the new tokens, oldest first; may be empty in a terminal output.
        logprobs: one per new token if the request asked for them.
        prompt_logprobs: positions ``logprob_start_len`` to the end of the prompt, once, with the first new token (or
            with the terminal output if there is no token).
        cached_tokens: prompt tokens whose K/V came from the prefix cache.
        embedding: with the terminal output of a request with ``pooling`` that has not failed: its vector, as
            little-endian float32.
        finish: set in the last output and only there.
    """

    id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    cached_tokens: int = 0
    embedding: bytes | None = None
    finish: FinishReason | None = None
