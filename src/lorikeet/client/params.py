"""Reads ``sampling_params`` of a request into :class:`SamplingParams`, and refuses wrong types and unknown keys.

``null`` stands for the default, except that ``max_new_tokens: null`` means as many as the context holds. Ranges are
checked by :meth:`SamplingParams.validate`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from lorikeet.core.sampling import PARAMS, Param, SamplingParams, check_grammar_length
from lorikeet.errors import SAMPLING, Field, RequestError
from lorikeet.fields import (
    MAX_SHOWN,
    check_length,
    is_integer,
    read_flag,
    read_integer,
    read_list,
    read_mapping,
    read_number,
    read_text,
    refused,
    shown,
)

# Characters of one stop string or pattern.
MAX_STOP_LENGTH = 1024


def parse_sampling(
    value: Mapping[str, Any] | SamplingParams | None, where: Field = (SAMPLING,)
) -> SamplingParams:
    """Check the types of sampling parameters and bring them into their one form.

    Args:
        value: as in the request's body; None is all defaults.
        where: path to it in the request.

    Raises:
        RequestError: an unknown key (the known ones are listed), a value of a wrong type, more entries than a list may
            have, JSON text that cannot be parsed.
    """
    if value is None:
        return SamplingParams()
    if isinstance(value, SamplingParams):
        value = {name: getattr(value, name) for name in PARAMS}
    given = read_mapping(value, where, "an object")
    unknown = sorted(islice((str(name)[:MAX_SHOWN] for name in given if name not in PARAMS), 4))
    if unknown:
        raise RequestError.about(
            where,
            f" has unknown keys: {', '.join(map(repr, unknown))[:200]}; "
            f"allowed: {', '.join(sorted(PARAMS))}",
            param=unknown[0] if unknown[0].isidentifier() else SAMPLING,
        )
    read = {
        name: _read(item, (*where, name), PARAMS[name])
        for name, item in given.items()
        if item is not None
    }
    if "max_new_tokens" in given and given["max_new_tokens"] is None:
        read["max_new_tokens"] = None
    return SamplingParams(**read)


def _read(value: object, field: Field, param: Param) -> Any:
    if param.is_json:
        return _read_json_text(value, field)
    if param.kind in _SINGLE:
        return _SINGLE[param.kind](value, field)
    return _SEVERAL[param.kind](value, field, int(param.most))


def _read_texts(value: object, field: Field, most: int) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    entries = read_list(items, field, "a string or a list of strings")
    check_length(len(entries), field, most)
    texts = tuple(read_text(item, field) for item in entries)
    if any(len(text) > MAX_STOP_LENGTH for text in texts):
        raise RequestError.about(
            field,
            f" has an entry of {max(map(len, texts))} characters; allowed: at most {MAX_STOP_LENGTH}",
        )
    return texts


def _read_ids(value: object, field: Field, most: int) -> tuple[int, ...]:
    """Token ids, each once."""
    allowed = "a list of token ids"
    found: dict[int, None] = {}
    for item in read_list([value] if is_integer(value) else value, field, allowed):
        if not is_integer(item):
            raise refused(field, item, allowed)
        found[item] = None
        if len(found) > most:
            raise RequestError.about(
                field, f" has more than {most} different ids; allowed: at most {most}"
            )
    return tuple(found)


def _read_biases(value: object, field: Field, most: int) -> dict[int, float]:
    """An object from token ids to numbers. JSON has only strings as keys, so token ids come as ``"15"``."""
    allowed = "an object from token ids to numbers"
    given = read_mapping(value, field, allowed)
    check_length(len(given), field, most)
    biases: dict[int, float] = {}
    for key, bias in given.items():
        token_id = key
        if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 18:
            token_id = int(key)
        if not is_integer(token_id):
            raise RequestError.about(field, f": key is {shown(key)}; allowed: {allowed}")
        biases[token_id] = read_number(bias, (*field, token_id))
    return biases


def _read_json_text(value: object, field: Field) -> str:
    """JSON as text or as the value itself; returns text."""
    try:
        if isinstance(value, Mapping):
            return json.dumps(value)
        text = read_text(value, field, "an object, or its JSON as a string")
        check_grammar_length(field, text)
        json.loads(text)
    except RecursionError:
        raise RequestError.about(
            field, " is nested too deeply; allowed: a few hundred levels"
        ) from None
    except (TypeError, ValueError) as error:
        if isinstance(value, str):
            raise RequestError.about(field, f" is not valid JSON: {error}") from error
        raise refused(field, value, "an object of JSON values") from error
    return text


_SINGLE: Mapping[Any, Callable[[object, Field], Any]] = {
    bool: read_flag,
    float: read_number,
    int: read_integer,
    str: read_text,
}
_SEVERAL: Mapping[Any, Callable[[object, Field, int], Any]] = {
    tuple[str, ...]: _read_texts,
    tuple[int, ...]: _read_ids,
    dict[int, float]: _read_biases,
}
