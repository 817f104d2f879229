"""``sampling_params`` of a request -> :class:`SamplingParams`: types, accepted spellings, unknown keys.

Ranges are checked by :meth:`SamplingParams.validate`; here a value only has to be of the right type, and types are
strict: a string is no number, a boolean is no integer. An integer does where a number is wanted. ``null`` stands for
the default, except that ``max_new_tokens: null`` means as many as the context holds.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, cast

from lorikeet.core.request import SamplingParams, check_grammar_length
from lorikeet.errors import RequestError

# OpenAI has 4 stops, clients of the field send some more. Strings cost their length once a call and nothing per token; each
# pattern is searched for after each token.
MAX_STOPS = 32
MAX_STOP_LENGTH = 1024
MAX_PATTERNS = 8
# Every end-of-turn token that a model has and some more; each completion has a set of them.
MAX_STOP_TOKENS = 256
# OpenAI's number.
MAX_BIASES = 300

# Characters of a wrong value in a message.
MAX_SHOWN = 80
_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxstring = 3, 8, 8, MAX_SHOWN

Reader = Callable[[object, str, str], Any]
"""(value, field's name, what holds it) -> the value as the engine wants it; raises RequestError."""


def parse_sampling(
    value: Mapping[str, Any] | SamplingParams | None, where: str = "sampling_params"
) -> SamplingParams:
    """Check the types of sampling parameters and bring them into their one form.

    Args:
        value: as in the request's body; None is all defaults.
        where: what to call it in messages.

    Raises:
        RequestError: an unknown key (the known ones are listed), a value of a wrong type, more entries than a list may
            have, JSON text that cannot be parsed.
    """
    if value is None:
        return SamplingParams()
    if isinstance(value, SamplingParams):
        value = {name: getattr(value, name) for name in _READERS}
    if not isinstance(value, Mapping):
        raise RequestError(
            f"{where} is {shown(value)}; allowed: an object", where.partition("[")[0]
        )
    unknown = sorted(islice((str(name)[:MAX_SHOWN] for name in value if name not in _READERS), 4))
    if unknown:
        raise RequestError(
            f"{where} has unknown keys: {', '.join(map(repr, unknown))[:200]}; "
            f"allowed: {', '.join(sorted(_READERS))}",
            unknown[0] if unknown[0].isidentifier() else "sampling_params",
        )
    fields = {
        name: _READERS[name](item, name, where) for name, item in value.items() if item is not None
    }
    if "max_new_tokens" in value and value["max_new_tokens"] is None:
        fields["max_new_tokens"] = None
    return SamplingParams(**fields)


def shown(value: object) -> str:
    """A value as a message quotes it: its beginning, in one line, however large or deeply nested it is."""
    if isinstance(value, str):
        return f"{value[:MAX_SHOWN]!r:.{MAX_SHOWN}}"
    if isinstance(value, int):
        # The digits of a long integer take a time that is quadratic, and are refused by the interpreter.
        return repr(value) if value.bit_length() <= 256 else "an integer of many digits"
    return f"{_short.repr(value):.{MAX_SHOWN}}"


def wrong_type(value: object, name: str, where: str, allowed: str) -> RequestError:
    """The error of a field that holds something else than ``allowed``."""
    field = f"{where}.{name}" if where else name
    param = name.partition("[")[0].partition(":")[0]
    return RequestError(f"{field} is {shown(value)}; allowed: {allowed}", param)


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_unicode(text: str, name: str, where: str) -> str:
    """Refuse half of a surrogate pair, which JSON can spell but no text holds."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise wrong_type(text, name, where, "valid Unicode") from error
    return text


def _read_int(value: object, name: str, where: str) -> int:
    if not is_int(value):
        raise wrong_type(value, name, where, "an integer")
    return cast(int, value)


def _read_number(value: object, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(value, name, where, "a number")
    try:
        return float(value)
    except OverflowError as error:
        raise wrong_type(value, name, where, "a finite number") from error


def _read_bool(value: object, name: str, where: str) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(value, name, where, "true or false")
    return value


def _read_text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(value, name, where, "a string")
    return check_unicode(value, name, where)


def _read_stops(value: object, name: str, where: str) -> tuple[str, ...]:
    return _read_texts(value, name, where, MAX_STOPS)


def _read_patterns(value: object, name: str, where: str) -> tuple[str, ...]:
    """Patterns; whether they compile is found where they are compiled."""
    return _read_texts(value, name, where, MAX_PATTERNS)


def _read_texts(value: object, name: str, where: str, most: int) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise wrong_type(value, name, where, "a string or a list of strings")
    entries = cast(list[object], items)
    if len(entries) > most:
        raise RequestError(
            f"{where}.{name} has {len(entries)} entries; allowed: at most {most}", name
        )
    texts = tuple(_read_text(item, name, where) for item in entries)
    if any(len(text) > MAX_STOP_LENGTH for text in texts):
        raise RequestError(
            f"{where}.{name} has an entry of {max(map(len, texts))} characters; "
            f"allowed: at most {MAX_STOP_LENGTH}",
            name,
        )
    return texts


def _read_ints(value: object, name: str, where: str) -> tuple[int, ...]:
    """Token ids, each once."""
    items = [value] if is_int(value) else value
    if not isinstance(items, list | tuple):
        raise wrong_type(value, name, where, "a list of token ids")
    found: dict[int, None] = {}
    for item in cast(list[object], items):
        if not is_int(item):
            raise wrong_type(item, name, where, "a list of token ids")
        found[cast(int, item)] = None
        if len(found) > MAX_STOP_TOKENS:
            raise RequestError(
                f"{where}.{name} has more than {MAX_STOP_TOKENS} different ids; allowed: at most {MAX_STOP_TOKENS}",
                name,
            )
    return tuple(found)


def _read_bias(value: object, name: str, where: str) -> dict[int, float]:
    """JSON has only strings as keys, so token ids come as ``"15"``."""
    allowed = "an object from token ids to numbers"
    if not isinstance(value, Mapping):
        raise wrong_type(value, name, where, allowed)
    biases: dict[int, float] = {}
    if len(value) > MAX_BIASES:
        raise RequestError(
            f"{where}.{name} has {len(value)} entries; allowed: at most {MAX_BIASES}", name
        )
    for key, bias in cast(Mapping[object, object], value).items():
        token_id = key
        if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 18:
            token_id = int(key)
        if not is_int(token_id):
            raise wrong_type(key, f"{name}: key", where, allowed)
        biases[cast(int, token_id)] = _read_number(bias, f"{name}[{token_id}]", where)
    return biases


def _too_deep(name: str, where: str) -> RequestError:
    return RequestError(f"{where}.{name} is nested too deeply; allowed: a few hundred levels", name)


def _read_json_text(value: object, name: str, where: str) -> str:
    """JSON as text or as the value itself; returns text."""
    if isinstance(value, Mapping):
        try:
            return json.dumps(value)
        except (TypeError, ValueError) as error:
            raise wrong_type(value, name, where, "an object of JSON values") from error
        except RecursionError:
            raise _too_deep(name, where) from None
    if not isinstance(value, str):
        raise wrong_type(value, name, where, "an object, or its JSON as a string")
    check_grammar_length(name, value)
    try:
        json.loads(value)
    except ValueError as error:
        raise RequestError(f"{where}.{name} is not valid JSON: {error}", name) from error
    except RecursionError:
        raise _too_deep(name, where) from None
    return check_unicode(value, name, where)


_READERS: dict[str, Reader] = {
    "max_new_tokens": _read_int,
    "min_new_tokens": _read_int,
    "temperature": _read_number,
    "top_p": _read_number,
    "top_k": _read_int,
    "min_p": _read_number,
    "frequency_penalty": _read_number,
    "presence_penalty": _read_number,
    "repetition_penalty": _read_number,
    "stop": _read_stops,
    "stop_token_ids": _read_ints,
    "stop_regex": _read_patterns,
    "ignore_eos": _read_bool,
    "skip_special_tokens": _read_bool,
    "spaces_between_special_tokens": _read_bool,
    "no_stop_trim": _read_bool,
    "n": _read_int,
    "sampling_seed": _read_int,
    "logit_bias": _read_bias,
    "json_schema": _read_json_text,
    "regex": _read_text,
    "ebnf": _read_text,
    "structural_tag": _read_json_text,
}
