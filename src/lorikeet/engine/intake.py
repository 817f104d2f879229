"""The fields of ``/generate`` (and of ``LLM.generate``) -> requests for the engine, or one error that names the field.

Everything about a request that can be known without the engine is checked here, before any work: only whether an
adapter is loaded and whether a grammar compiles is left to the engine.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar, cast

import msgspec

from lorikeet.core.request import (
    MAX_SEED,
    MAX_TOP_LOGPROBS,
    Pooling,
    Request,
    SamplingParams,
)
from lorikeet.engine.params import check_unicode, is_int, parse_sampling, shown, wrong_type
from lorikeet.engine.tokenizer import Tokenizer
from lorikeet.errors import RequestError

__all__ = ["Intake", "RequestBatch", "parse_sampling"]

_Item = TypeVar("_Item")

MAX_TEXT = 4 * 2**20
"""Characters of one prompt: more than a million tokens of English. Tokenizing takes up to 150 times as many bytes of memory."""
MAX_TEXTS = 8 * 2**20
"""Characters of all prompts of one call: tokenizing takes a second for each million or two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBatch:
    """The requests of one call, in the order of its reply.

    Attributes:
        requests: prompt after prompt, and the n completions of a prompt side by side.
        is_list: the reply is a list, because the prompts came as a list or n is above 1.
        return_text_in_logprobs: log-probabilities carry the text of their tokens.
    """

    requests: list[Request]
    is_list: bool
    return_text_in_logprobs: bool = False


class Intake:
    """Checks and prepares requests for one engine.

    Args:
        tokenizer: the model's.
        vocab_size: ids from 0 to one below this may be sent to the model.
        context_length: most tokens of prompt and completion together.
        is_bounded: the texts of a call may be so long (``MAX_TEXT``, ``MAX_TEXTS``) and no longer, because others share
            this process.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        context_length: int,
        is_bounded: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._is_bounded = is_bounded

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
        """
        prompts, is_batch = self._read_prompts(body)
        num = len(prompts)
        sampling = self._read_sampling(body.get("sampling_params"), num)
        adapters = _spread(body, "lora_path", num, _read_adapter, default=None)
        wants_logprobs = _spread(body, "return_logprob", num, _read_bool, default=False)
        starts = _spread(body, "logprob_start_len", num, _read_int, default=-1)
        tops = _spread(body, "top_logprobs_num", num, _read_int, default=0)
        num_samples = _common_n(sampling)
        rids = _read_rids(body.get("rid"), num, num_samples)

        requests: list[Request] = []
        for index, token_ids in enumerate(prompts):
            where = f"prompt {index}: " if is_batch else ""
            room = self._room(len(token_ids), where, least=int(pooling is None))
            params = self._fit_context(sampling[index], room, where)
            _check_logprob_start(starts[index], len(token_ids), where)
            self._check_top_logprobs(tops[index], where)
            requests += [
                Request(
                    rid=rids[index * num_samples + sample],
                    prompt_token_ids=token_ids,
                    sampling=_sample_params(params, sample),
                    adapter=adapters[index],
                    return_logprob=wants_logprobs[index],
                    logprob_start_len=starts[index] if wants_logprobs[index] else -1,
                    top_logprobs_num=tops[index] if wants_logprobs[index] else 0,
                    pooling=pooling,
                )
                for sample in range(num_samples)
            ]
        text_wanted = body.get("return_text_in_logprobs")
        return RequestBatch(
            requests=requests,
            is_list=is_batch or num_samples > 1,
            return_text_in_logprobs=text_wanted is not None
            and _read_bool(text_wanted, "return_text_in_logprobs"),
        )

    def _read_prompts(self, body: Mapping[str, Any]) -> tuple[list[list[int]], bool]:
        """Return the token ids of each prompt, and whether there was a list of prompts."""
        text, input_ids = body.get("text"), body.get("input_ids")
        if (text is None) == (input_ids is None):
            given = "neither" if text is None else "both"
            raise RequestError(f"exactly one of text and input_ids is needed; got {given}", "text")
        if text is not None:
            return self._read_texts(text)
        return self._read_ids(input_ids)

    def _read_texts(self, value: object) -> tuple[list[list[int]], bool]:
        if isinstance(value, str):
            self._check_text(value, "text")
            return [self._encode(value, "text")], False
        allowed = "a string or a list of strings"
        if not _is_list(value):
            raise wrong_type(value, "text", "", allowed)
        if not value:
            raise RequestError("text is an empty list; allowed: at least one prompt", "text")
        for index, item in enumerate(value):
            if not isinstance(item, str):
                raise wrong_type(item, f"text[{index}]", "", allowed)
        texts = cast(Sequence[str], value)
        for index, item in enumerate(texts):
            self._check_text(item, f"text[{index}]")
        num = sum(map(len, texts))
        if self._is_bounded and num > MAX_TEXTS:
            raise RequestError(
                f"text has {num:,} characters in {len(texts):,} prompts; allowed: {MAX_TEXTS:,} in one call",
                "text",
            )
        return [self._encode(item, f"text[{index}]") for index, item in enumerate(texts)], True

    def _encode(self, text: str, name: str) -> list[int]:
        token_ids = self._tokenizer.encode(text)
        if not token_ids:
            raise RequestError(
                f"{name} is {shown(text)}, which has no tokens; allowed: at least one character",
                "text",
            )
        self._check_ids(token_ids, name)
        return token_ids

    def encode_rendered(self, text: str) -> list[int]:
        """Tokenize a rendered conversation, which has the special tokens in it.

        Raises:
            RequestError: it is too long, or no text.
        """
        self._check_text(text, "text")
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _check_text(self, text: str, name: str) -> None:
        """Refuse a prompt that cannot fit into the context, for its length."""
        least = self._tokenizer.least_tokens(check_unicode(text, name, ""))
        if least > self._context_length:
            raise RequestError(
                f"{name} has at least {least} tokens; allowed: at most {self._context_length}, the context length",
                "text",
            )
        if self._is_bounded and len(text) > MAX_TEXT:
            raise RequestError(
                f"{name} has {len(text):,} characters; allowed: {MAX_TEXT:,} in one prompt", "text"
            )

    def _read_ids(self, value: object) -> tuple[list[list[int]], bool]:
        allowed = "a list of token ids or a list of such lists"
        if not _is_list(value):
            raise wrong_type(value, "input_ids", "", allowed)
        if not value:
            raise RequestError(
                "input_ids is an empty list; allowed: at least one token", "input_ids"
            )
        is_batch = _is_list(value[0])
        rows = [
            (row, f"input_ids[{index}]" if is_batch else "input_ids")
            for index, row in enumerate(value if is_batch else [value])
        ]
        prompts: list[list[int]] = []
        for row, name in rows:
            if not _is_list(row):
                raise wrong_type(row, name, "", "a list of token ids")
            if not row:
                raise RequestError(
                    f"{name} is an empty list; allowed: at least one token", "input_ids"
                )
            for index, item in enumerate(row):
                if not is_int(item):
                    raise wrong_type(item, f"{name}[{index}]", "", "an integer")
            prompts.append(cast(list[int], list(row)))
            self._check_ids(prompts[-1], name)
        return prompts, is_batch

    def _check_ids(self, token_ids: list[int], name: str) -> None:
        if min(token_ids) >= 0 and max(token_ids) < self._vocab_size:
            return
        index = next(i for i, item in enumerate(token_ids) if not 0 <= item < self._vocab_size)
        raise RequestError(
            f"{name} has the token id {shown(token_ids[index])} at position {index}; "
            f"allowed: token ids in [0, {self._vocab_size - 1}]",
            name.partition("[")[0],
        )

    def _read_sampling(self, value: object, num: int) -> list[SamplingParams]:
        if not _is_list(value):
            params = self._check_sampling(value, "sampling_params")
            return [params] * num
        _check_length(value, "sampling_params", num)
        return [
            self._check_sampling(item, f"sampling_params[{index}]")
            for index, item in enumerate(value)
        ]

    def _check_sampling(self, value: object, where: str) -> SamplingParams:
        params = parse_sampling(cast(Any, value), where)
        try:
            params.validate(self._vocab_size)
        except RequestError as error:
            message = str(error).replace("sampling_params", where, 1)
            raise RequestError(message, error.param) from error
        # More than the whole vocabulary is the whole vocabulary, and the number has to fit a message to the engine.
        return msgspec.structs.replace(params, top_k=min(params.top_k, self._vocab_size))

    def _room(self, num_prompt: int, where: str, *, least: int) -> int:
        """Tokens that the context holds after a prompt; at least ``least`` are needed."""
        room = self._context_length - num_prompt
        if room < least:
            reason = " and at least one token is generated" if least else ""
            raise RequestError(
                f"{where}the prompt has {num_prompt} tokens; allowed: at most {self._context_length - least}, because "
                f"the context length is {self._context_length}{reason}",
                "text",
            )
        return room

    def _fit_context(self, params: SamplingParams, room: int, where: str) -> SamplingParams:
        """Lower ``max_new_tokens`` to what the context holds after the prompt."""
        if params.min_new_tokens > room:
            context = self._context_length
            raise RequestError(
                f"{where}sampling_params.min_new_tokens is {shown(params.min_new_tokens)}; allowed: at most {room}, "
                f"which the context of {context} tokens holds after a prompt of {context - room}",
                "min_new_tokens",
            )
        wanted = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
        return msgspec.structs.replace(params, max_new_tokens=wanted)

    def _check_top_logprobs(self, value: int, where: str) -> None:
        most = min(MAX_TOP_LOGPROBS, self._vocab_size)
        if not 0 <= value <= most:
            raise RequestError(
                f"{where}top_logprobs_num is {shown(value)}; allowed: an integer in [0, {most}]",
                "top_logprobs_num",
            )


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def _check_length(value: Sequence[Any], name: str, num: int) -> None:
    if len(value) != num:
        raise RequestError(
            f"{name} has {len(value)} entries for {num} prompt{'' if num == 1 else 's'}; "
            "allowed: one value for all, or a list with one entry per prompt",
            name,
        )


def _spread(
    body: Mapping[str, Any],
    name: str,
    num: int,
    read: Callable[[object, str], _Item],
    *,
    default: _Item,
) -> list[_Item]:
    """One value per prompt from a field that is one value or a list of them."""
    value = body.get(name)
    if value is None:
        return [default] * num
    if not _is_list(value):
        return [read(value, name)] * num
    _check_length(value, name, num)
    return [
        default if item is None else read(item, f"{name}[{index}]")
        for index, item in enumerate(value)
    ]


def _read_adapter(value: object, name: str) -> str | None:
    if not isinstance(value, str) or not value:
        raise wrong_type(value, name, "", "an adapter's name, or null for the base model")
    return check_unicode(value, name, "")


def _read_bool(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(value, name, "", "true or false")
    return value


def _read_int(value: object, name: str) -> int:
    if not is_int(value):
        raise wrong_type(value, name, "", "an integer")
    return cast(int, value)


def _common_n(sampling: list[SamplingParams]) -> int:
    counts = {params.n for params in sampling}
    if len(counts) > 1:
        raise RequestError(
            f"sampling_params.n differs between prompts: {sorted(counts)}; allowed: the same n for all of them",
            "n",
        )
    return counts.pop()


def _read_rids(value: object, num: int, num_samples: int) -> list[str]:
    """Ids of all requests: given, made from a given one by a suffix, or random."""
    if value is None:
        return [uuid.uuid4().hex for _ in range(num * num_samples)]
    if _is_list(value):
        _check_length(value, "rid", num)
        bases = [_read_rid(item, f"rid[{index}]") for index, item in enumerate(value)]
    else:
        base = _read_rid(value, "rid")
        bases = [base] if num == 1 else [f"{base}_{index}" for index in range(num)]
    if num_samples > 1:
        bases = [f"{base}_{sample}" for base in bases for sample in range(num_samples)]
    seen: set[str] = set()
    for rid in bases:
        if rid in seen:
            raise RequestError(f"rid {shown(rid)} is given twice; allowed: ids that differ", "rid")
        seen.add(rid)
    return bases


def _read_rid(value: object, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise wrong_type(value, name, "", "a non-empty string")
    return check_unicode(value, name, "")


def _check_logprob_start(value: int, num_prompt: int, where: str) -> None:
    if not -1 <= value < num_prompt:
        raise RequestError(
            f"{where}logprob_start_len is {shown(value)}; allowed: -1 (nothing of the prompt) or a position of the "
            f"prompt in [0, {num_prompt - 1}]",
            "logprob_start_len",
        )


def _sample_params(params: SamplingParams, sample: int) -> SamplingParams:
    """Parameters of one of n completions: the seeds differ, or the completions would not."""
    seed = params.sampling_seed
    if seed is not None:
        seed = (seed + sample) % (MAX_SEED + 1)
    return msgspec.structs.replace(params, n=1, sampling_seed=seed)
