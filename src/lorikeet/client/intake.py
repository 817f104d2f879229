"""Turns the fields of ``/generate`` (and of ``LLM.generate``) into requests for the engine, or into an error that names the field.

Everything about a request that can be known without the engine is checked here, before any work: only whether an
adapter is loaded and whether a grammar compiles is left to the engine.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import msgspec

from lorikeet.client.params import parse_sampling
from lorikeet.core.request import MAX_TOP_LOGPROBS, Pooling, Prompt, Request, SamplingParams
from lorikeet.errors import SAMPLING, ContextLengthError, Field, RequestError, field_name
from lorikeet.fields import (
    is_integer,
    is_list,
    read_flag,
    read_integer,
    read_list,
    read_text,
    refused,
    shown,
)
from lorikeet.names import MAX_RID, check_name
from lorikeet.text.completion import Completion
from lorikeet.text.stop import SearchBudget, StopRules
from lorikeet.text.tokenizer import Tokenizer

_Item = TypeVar("_Item")

# What one call may ask for; each number stands in docs/http.md with its reason.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBatch:
    """The requests of one call, in the order of its reply: prompt after prompt, the n completions of one side by side.

    Attributes:
        requests: one per prompt; n is the same for all.
        stops: what ends the completions of each request, compiled, with one budget for the call.
        rids: what the caller calls each completion. Labels, and nothing else: they never leave this process.
        labels: each name by which the caller may end completions -> their places. Those are the rids, and the one that
            several were expanded from.
        is_list: the reply is a list, because the prompts came as a list or n is above 1.
        return_text_in_logprobs: log-probabilities carry the text of their tokens.
    """

    requests: list[Request]
    stops: list[StopRules]
    rids: list[str]
    labels: Mapping[str, list[int]]
    is_list: bool
    return_text_in_logprobs: bool = False

    @property
    def num_completions(self) -> int:
        return len(self.rids)

    def request_of(self, index: int) -> Request:
        """The request of the completion at this place of the reply."""
        return self.requests[index // self.requests[0].num_samples]

    def completion(
        self, index: int, tokenizer: Tokenizer, *, markers: Collection[int] = ()
    ) -> Completion:
        """A new completion for this place of the reply."""
        place = index // self.requests[0].num_samples
        return Completion(
            self.requests[place],
            tokenizer,
            stops=self.stops[place],
            rid=self.rids[index],
            markers=markers,
        )


class Intake:
    """Checks and prepares requests for one engine.

    Args:
        tokenizer: the model's.
        vocab_size: ids from 0 to one below this may be sent to the model.
        context_length: most tokens of prompt and completion together.
        limits: what one call may ask for.
        check_room: raises UnavailableError if that many new completions cannot be taken now; asked before anything is
            made of them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        context_length: int,
        limits: CallLimits = SERVED,
        check_room: Callable[[int], None] = lambda num_completions: None,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._limits = limits
        self._check_room = check_room

    def make_requests(
        self, body: Mapping[str, Any], pooling: Pooling | None = None
    ) -> RequestBatch:
        """Check a call and turn it into requests.

        Args:
            body: the fields of ``POST /generate`` by name: one of ``text`` and ``input_ids``, and any of
                ``sampling_params``, ``lora_path``, ``rid``, ``return_logprob``, ``logprob_start_len``,
                ``top_logprobs_num``, ``return_text_in_logprobs``. None counts as not given; keys that are not among
                these are ignored, as the API promises. A field that may differ by prompt is one value or a list.
            pooling: asks for vectors in place of completions; ``max_new_tokens`` has to be 0 then.

        Raises:
            RequestError: names the field, its value and what is allowed.
            UnavailableError: there is no room for so many.
        """
        name, prompts, is_batch = _read_prompts(body)
        num = len(prompts)
        check_completions(num, 1, self._limits)
        sampling, stops = self._read_sampling(body.get("sampling_params"), num)
        num_samples = _common_n(sampling)
        check_completions(num, num_samples, self._limits)
        self._check_room(num * num_samples)
        adapters = _spread(body, "lora_path", num, _read_adapter, default=None)
        wants_logprobs = _spread(body, "return_logprob", num, read_flag, default=False)
        starts = _spread(body, "logprob_start_len", num, read_integer, default=-1)
        tops = _spread(body, "top_logprobs_num", num, read_integer, default=0)
        rids, labels = _read_rids(body.get("rid"), num, num_samples)
        tokens = self._read_tokens(name, prompts, is_batch=is_batch)
        made: list[Prompt] = []
        for index, token_ids in enumerate(tokens):
            try:
                room = self._room(len(token_ids), least=int(pooling is None))
                _check_min_tokens(sampling[index], room, self._context_length)
                _check_logprob_start(starts[index], len(token_ids))
                self._check_top_logprobs(tops[index])
            except RequestError as error:
                if is_batch:
                    error.prefix(f"prompt {index}: ")
                raise
            wanted = wants_logprobs[index]
            made.append(
                Prompt(
                    prompt_token_ids=token_ids,
                    adapter=adapters[index],
                    return_logprob=wanted,
                    logprob_start_len=starts[index] if wanted else -1,
                    top_logprobs_num=tops[index] if wanted else 0,
                    pooling=pooling,
                )
            )
        sampling = fit_logprobs(made, sampling, self._limits, self._context_length)
        text_wanted = body.get("return_text_in_logprobs")
        return RequestBatch(
            requests=[Request.of(*pair) for pair in zip(made, sampling, strict=True)],
            stops=stops,
            rids=rids,
            labels=labels,
            is_list=is_batch or num_samples > 1,
            return_text_in_logprobs=text_wanted is not None
            and read_flag(text_wanted, ("return_text_in_logprobs",)),
        )

    def _read_tokens(self, name: str, prompts: Sequence[Any], *, is_batch: bool) -> list[list[int]]:
        """The token ids of each prompt. One after the other, so that a call that is too large is soon refused."""
        if name == "text":
            self._check_texts(prompts, is_batch=is_batch)
        tokens: list[list[int]] = []
        most = self._limits.max_tokens
        most = None if most is None else max(most, self._context_length)
        total = 0
        for index, prompt in enumerate(prompts):
            where = (name, index) if is_batch else (name,)
            read = self._encode if name == "text" else self._read_ids
            tokens.append(read(prompt, where))
            total += len(tokens[-1])
            if most is not None and total > most:
                raise RequestError.about(
                    (name,),
                    f": the prompts of the call have more than {most} tokens; allowed: at most {most} in one call",
                )
        return tokens

    def _check_texts(self, texts: Sequence[Any], *, is_batch: bool) -> None:
        """Refuse texts that cannot fit, before any of them is tokenized."""
        for index, text in enumerate(texts):
            self._check_text(text, ("text", index) if is_batch else ("text",))
        num, most = sum(map(len, texts)), self._limits.max_texts
        if most is not None and num > most:
            raise RequestError.about(
                ("text",),
                f" has {num:,} characters in {len(texts):,} prompts; allowed: {most:,} in one call",
            )

    def _encode(self, text: str, field: Field) -> list[int]:
        token_ids = self._tokenizer.encode(text)
        if not token_ids:
            problem = f" is {shown(text)}, which has no tokens; allowed: at least one character"
            raise RequestError.about(field, problem)
        self._check_ids(token_ids, field)
        return token_ids

    def encode_rendered(self, text: str) -> list[int]:
        """Tokenize a rendered conversation, which has the special tokens in it.

        Raises:
            RequestError: it is too long, or no text.
        """
        self._check_text(text, ("text",))
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _check_text(self, text: str, field: Field) -> None:
        """Refuse a prompt that cannot fit into the context, for its length."""
        least = self._tokenizer.least_tokens(read_text(text, field))
        if least > self._context_length:
            raise ContextLengthError.about(
                field,
                f" has at least {least} tokens; allowed: at most {self._context_length}, because the maximum "
                f"context length is {self._context_length}",
            )
        most = self._limits.max_text
        if most is not None and len(text) > most:
            problem = f" has {len(text):,} characters; allowed: {most:,} in one prompt"
            raise RequestError.about(field, problem)

    def _read_ids(self, row: object, field: Field) -> list[int]:
        items = read_list(row, field, "a list of token ids")
        if not items:
            raise _empty(field, "token")
        for index, item in enumerate(items):
            # Without a path for each: there may be a million.
            if not is_integer(item):
                raise refused((*field, index), item, "an integer")
        token_ids = list(items)
        self._check_ids(token_ids, field)
        return token_ids

    def _check_ids(self, token_ids: list[int], field: Field) -> None:
        if min(token_ids) >= 0 and max(token_ids) < self._vocab_size:
            return
        index = next(i for i, item in enumerate(token_ids) if not 0 <= item < self._vocab_size)
        raise RequestError.about(
            field,
            f" has the token id {shown(token_ids[index])} at position {index}; "
            f"allowed: token ids in [0, {self._vocab_size - 1}]",
        )

    def _read_sampling(
        self, value: object, num: int
    ) -> tuple[list[SamplingParams], list[StopRules]]:
        """Parameters and stops of each prompt; one of each for all where one was given."""
        budget = SearchBudget()
        if not is_list(value):
            params = self._check_sampling(value, (SAMPLING,))
            return [params] * num, [StopRules(params.stop, params.stop_regex, budget)] * num
        _check_length(value, SAMPLING, num)
        sampling = [
            self._check_sampling(item, (SAMPLING, index)) for index, item in enumerate(value)
        ]
        return sampling, [StopRules(item.stop, item.stop_regex, budget) for item in sampling]

    def _check_sampling(self, value: object, where: Field) -> SamplingParams:
        params = parse_sampling(cast(Any, value), where)
        params.validate(self._vocab_size, where)
        # More than the whole vocabulary is the whole vocabulary, more than the whole context the context; and a number has
        # to fit a message to the engine. What the context holds after each prompt is the scheduler's to say.
        wanted = params.max_new_tokens
        return msgspec.structs.replace(
            params,
            top_k=min(params.top_k, self._vocab_size),
            max_new_tokens=None if wanted is None else min(wanted, self._context_length),
        )

    def _room(self, num_prompt: int, *, least: int) -> int:
        """Tokens that the context holds after a prompt; at least ``least`` are needed."""
        room = self._context_length - num_prompt
        if room < least:
            reason = " and at least one token is generated" if least else ""
            # Clients look for "maximum context length is".
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens; allowed: at most {self._context_length - least}, because "
                f"the maximum context length is {self._context_length}{reason}",
                "text",
            )
        return room

    def _check_top_logprobs(self, value: int) -> None:
        most = min(MAX_TOP_LOGPROBS, self._vocab_size)
        if not 0 <= value <= most:
            raise refused(("top_logprobs_num",), value, f"an integer in [0, {most}]")


def _read_prompts(body: Mapping[str, Any]) -> tuple[str, Sequence[Any], bool]:
    """The field that has the prompts, the prompts as they were given, and whether there was a list of them."""
    text, input_ids = body.get("text"), body.get("input_ids")
    if (text is None) == (input_ids is None):
        given = "neither" if text is None else "both"
        raise RequestError(f"exactly one of text and input_ids is needed; got {given}", "text")
    if text is None:
        return _read_rows(input_ids)
    if isinstance(text, str):
        return "text", [text], False
    allowed = "a string or a list of strings"
    texts = read_list(text, ("text",), allowed)
    if not texts:
        raise _empty(("text",), "prompt")
    for index, item in enumerate(texts):
        if not isinstance(item, str):
            raise refused(("text", index), item, allowed)
    return "text", texts, True


def _read_rows(value: object) -> tuple[str, Sequence[Any], bool]:
    rows = read_list(value, ("input_ids",), "a list of token ids or a list of such lists")
    if not rows:
        raise _empty(("input_ids",), "token")
    is_batch = is_list(rows[0])
    return "input_ids", rows if is_batch else [rows], is_batch


def _empty(field: Field, what: str) -> RequestError:
    return RequestError.about(field, f" is an empty list; allowed: at least one {what}")


def _check_length(value: Sequence[Any], name: str, num: int) -> None:
    if len(value) != num:
        raise RequestError.about(
            (name,),
            f" has {len(value)} entries for {num} prompt{'' if num == 1 else 's'}; "
            "allowed: one value for all, or a list with one entry per prompt",
        )


def _spread(
    body: Mapping[str, Any],
    name: str,
    num: int,
    read: Callable[[object, Field], _Item],
    *,
    default: _Item,
) -> list[_Item]:
    """One value per prompt from a field that is one value or a list of them."""
    value = body.get(name)
    if value is None:
        return [default] * num
    if not is_list(value):
        return [read(value, (name,))] * num
    _check_length(value, name, num)
    return [
        default if item is None else read(item, (name, index)) for index, item in enumerate(value)
    ]


def _read_adapter(value: object, field: Field) -> str | None:
    if not isinstance(value, str) or not value:
        raise refused(field, value, "an adapter's name, or null for the base model")
    return check_name(value, field_name(field))


def _common_n(sampling: list[SamplingParams]) -> int:
    counts = {params.n for params in sampling}
    if len(counts) > 1:
        raise RequestError.about(
            (SAMPLING, "n"),
            f" differs between prompts: {sorted(counts)}; allowed: the same n for all of them",
        )
    return counts.pop()


def _read_rids(value: object, num: int, num_samples: int) -> tuple[list[str], dict[str, list[int]]]:
    """The name of each completion (given, a given one with a suffix, or random), and each name with its completions."""
    if value is None:
        rids = [uuid.uuid4().hex for _ in range(num * num_samples)]
        return rids, {rid: [index] for index, rid in enumerate(rids)}
    if is_list(value):
        _check_length(value, "rid", num)
        given = [_read_rid(item, ("rid", index)) for index, item in enumerate(value)]
        bases = given
    else:
        given = [_read_rid(value, ("rid",))] * num
        bases = given if num == 1 else [f"{base}_{index}" for index, base in enumerate(given)]
    rids = bases
    if num_samples > 1:
        rids = [f"{base}_{sample}" for base in bases for sample in range(num_samples)]
    labels: dict[str, list[int]] = {}
    for index, rid in enumerate(rids):
        if rid in labels:
            raise RequestError(f"rid {shown(rid)} is given twice; allowed: ids that differ", "rid")
        labels[rid] = [index]
    for index, rid in enumerate(rids):
        if given[index // num_samples] != rid:
            labels.setdefault(given[index // num_samples], []).append(index)
    return rids, labels


def _read_rid(value: object, field: Field) -> str:
    if not isinstance(value, str):
        raise refused(field, value, "a non-empty string")
    return check_name(value, field_name(field), most=MAX_RID)


def _check_min_tokens(params: SamplingParams, room: int, context: int) -> None:
    if params.min_new_tokens > room:
        allowed = f"at most {room}, which the context of {context} tokens holds after a prompt of {context - room}"
        raise refused((SAMPLING, "min_new_tokens"), params.min_new_tokens, allowed)


def _check_logprob_start(value: int, num_prompt: int) -> None:
    if not -1 <= value < num_prompt:
        raise refused(
            ("logprob_start_len",),
            value,
            f"-1 (nothing of the prompt) or a position of the prompt in [0, {num_prompt - 1}]",
        )


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
