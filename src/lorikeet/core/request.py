"""What callers see: sampling parameters, a request, and the outputs it is answered with.

A request enters the engine as a :class:`Request`, and each of its completions leaves it as a series of
:class:`RequestOutput`, of which exactly one, the last, carries a :class:`FinishReason`.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from lorikeet.core.failure import Failure
from lorikeet.errors import EngineFault, RequestError, UserError

# A seed is a 63-bit integer so that it fits a signed 64-bit tensor element.
MAX_SEED = 2**63 - 1
MAX_TOP_LOGPROBS = 1024
# Characters of a grammar's text. Compiling takes more than in proportion; OpenAI's limit for schemas is 120,000.
MAX_GRAMMAR = 2**17


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen and when a completion ends. Defaults are those of the native HTTP API.

    Attributes:
        max_new_tokens: most tokens to generate; None means as many as the context holds.
        min_new_tokens: no end-of-sequence, stop id or stop string counts before this many tokens.
        temperature: 0 is greedy.
        top_k: -1 keeps all tokens.
        stop: strings that end the completion; trimmed from the text unless ``no_stop_trim``.
        stop_regex: regular expressions that end the completion like ``stop`` does.
        n: completions per prompt.
        sampling_seed: the same seed and prompt give the same tokens whatever shares the batch; the n completions take
            this seed and the ones that follow it.
        logit_bias: token id -> value added to its logit.
        json_schema, regex, ebnf, structural_tag: at most one; the grammar that the output obeys. ``json_schema``
            and ``structural_tag`` are JSON text.
    """

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_regex: tuple[str, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    n: int = 1
    sampling_seed: int | None = None
    logit_bias: dict[int, float] = {}
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def grammar(self) -> tuple[str, str] | None:
        """(kind, source) of the grammar that constrains the output, or None."""
        for kind in GRAMMAR_FIELDS:
            source = getattr(self, kind)
            if source is not None:
                return kind, source
        return None

    def validate(self, vocab_size: int) -> None:
        """Check every field's range.

        Raises:
            RequestError: names the field, its value and the allowed values.
        """
        for name, (low, high, text) in RANGES.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise _refuse(name, value, text)
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise _refuse("max_new_tokens", self.max_new_tokens, "an integer >= 0")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise _refuse(
                "min_new_tokens",
                self.min_new_tokens,
                f"at most max_new_tokens ({self.max_new_tokens})",
            )
        if self.repetition_penalty == 0:
            raise _refuse("repetition_penalty", 0, "a number above 0, at most 2")
        if self.top_k != -1 and self.top_k < 1:
            raise _refuse("top_k", self.top_k, "-1 (all tokens) or an integer >= 1")
        if self.top_p == 0:
            raise _refuse("top_p", self.top_p, "a number in (0, 1]")
        if self.sampling_seed is not None and not 0 <= self.sampling_seed <= MAX_SEED:
            raise _refuse("sampling_seed", self.sampling_seed, f"an integer in [0, {MAX_SEED}]")
        self._validate_tokens(vocab_size)
        self._validate_grammar()

    def _validate_grammar(self) -> None:
        given = [kind for kind in GRAMMAR_FIELDS if getattr(self, kind) is not None]
        if len(given) > 1:
            raise RequestError(
                f"sampling_params: {' and '.join(given)} exclude each other; give one", given[1]
            )
        for kind in given:
            check_grammar_length(kind, getattr(self, kind))

    def _validate_tokens(self, vocab_size: int) -> None:
        allowed = f"token ids in [0, {vocab_size - 1}]"
        for token in self.stop_token_ids:
            if not 0 <= token < vocab_size:
                raise _refuse("stop_token_ids", token, allowed)
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocab_size:
                raise _refuse("logit_bias", token, allowed)
            if not (math.isfinite(bias) and -100 <= bias <= 100):
                raise _refuse("logit_bias", bias, "values in [-100, 100]")
        if any(not text for text in self.stop):
            raise _refuse("stop", "''", "strings of at least one character")


GRAMMAR_FIELDS = ("json_schema", "regex", "ebnf", "structural_tag")


def check_grammar_length(kind: str, source: str) -> None:
    """Raises:
    RequestError: the text of a grammar is too long.
    """
    if len(source) > MAX_GRAMMAR:
        raise RequestError(
            f"sampling_params.{kind}: it has {len(source):,} characters; allowed: up to {MAX_GRAMMAR:,}",
            kind,
        )


RANGES: dict[str, tuple[float, float, str]] = {
    "min_new_tokens": (0, math.inf, "an integer >= 0"),
    "temperature": (0, math.inf, "a finite number >= 0"),
    "top_p": (0, 1, "a number in (0, 1]"),
    "min_p": (0, 1, "a number in [0, 1]"),
    "frequency_penalty": (-2, 2, "a number in [-2, 2]"),
    "presence_penalty": (-2, 2, "a number in [-2, 2]"),
    "repetition_penalty": (0, 2, "a number above 0, at most 2"),
    "n": (1, 1024, "an integer in [1, 1024]"),
}
"""Sampling parameter -> least and largest value, and both in words."""


def _refuse(name: str, value: object, allowed: str) -> RequestError:
    return RequestError(f"sampling_params.{name} is {value}; allowed: {allowed}", name)


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
