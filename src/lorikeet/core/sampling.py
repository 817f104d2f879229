"""How tokens are chosen and when a completion ends: :class:`SamplingParams`, which is the table of sampling parameters.

Whatever else knows the parameters follows from it: the reader of ``sampling_params`` (``client/params.py``), the fields of
OpenAI's bodies (``server/openai/bodies.py``), ``/openapi.json`` and ``docs/sampling.md``. A new one is a field here with its
line in the docstring, and the code that obeys it.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from types import UnionType
from typing import Annotated, Any, get_args, get_type_hints

import msgspec

from lorikeet.errors import SAMPLING, Field, RequestError
from lorikeet.fields import refused

# A seed is a 63-bit integer so that it fits a signed 64-bit tensor element.
MAX_SEED = 2**63 - 1
# Characters of a grammar's text. Compiling takes more than in proportion; OpenAI's limit for schemas is 120,000.
MAX_GRAMMAR = 2**17
# OpenAI has 4 stops, clients of the field send some more. Strings cost their length once a call and nothing per token; each
# pattern is searched for after each token.
MAX_STOPS = 32
MAX_PATTERNS = 8
# Every end-of-turn token that a model has and some more; each completion has a set of them.
MAX_STOP_TOKENS = 256
# OpenAI's number.
MAX_BIASES = 300


@dataclass(frozen=True, slots=True)
class Param:
    """What there is to know of a sampling parameter.

    Attributes:
        least, most: of a number; of a list or an object, ``most`` is how many entries it may have.
        is_above: ``least`` itself is not allowed.
        special: a number outside of the range, and what it means.
        is_json: the text is JSON, which may be given as an object.
        openai: its name in the bodies of the OpenAI API; None: there is no such field.
        name, default: those of the field of :class:`SamplingParams`.
        kind: its type, without None.
        about: what it does: its entry in the docstring.
    """

    least: float = -math.inf
    most: float = math.inf
    _: KW_ONLY
    is_above: bool = False
    special: tuple[int, str] | None = None
    is_json: bool = False
    openai: str | None = ""
    name: str = ""
    default: Any = None
    kind: Any = None
    about: str = ""

    @property
    def is_number(self) -> bool:
        return self.kind in (int, float)

    def allows(self, value: float) -> bool:
        """Whether a number is in the range."""
        if self.special is not None and value == self.special[0]:
            return True
        is_inside = self.least <= value <= self.most and not (self.is_above and value == self.least)
        return is_inside and value != math.inf

    @property
    def words(self) -> str:
        """Its type, in words."""
        return "JSON" if self.is_json else _WORDS[self.kind]

    @property
    def allowed(self) -> str:
        """Which values are allowed, in words."""
        if not self.is_number:
            return self.words + (f", at most {self.most}" if math.isfinite(self.most) else "")
        if math.isfinite(self.most):
            words = f"{self.words} in {'(' if self.is_above else '['}{self.least}, {self.most}]"
        else:
            words = f"{'an integer' if self.kind is int else 'a finite number'} >= {self.least}"
        return f"{self.special[0]} ({self.special[1]}) or {words}" if self.special else words


_WORDS: Mapping[Any, str] = {
    bool: "true or false",
    dict[int, float]: "an object from token ids to numbers",
    float: "a number",
    int: "an integer",
    str: "a string",
    tuple[int, ...]: "a list of token ids",
    tuple[str, ...]: "a string or a list of strings",
}


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen and when a completion ends. Defaults are those of the native HTTP API.

    The fields are in the order of OpenAI's, with ours behind them. ``max_new_tokens=None`` is as many as the context holds.

    Attributes:
        n: completions of each prompt.
        max_new_tokens: most tokens to generate.
        temperature: logits are divided by it; 0 is greedy.
        top_p: only the likeliest tokens that together have this probability are drawn.
        stop: strings that end the completion; the text ends before them, unless ``no_stop_trim`` is set.
        sampling_seed: the same seed and prompt give the same tokens whatever shares the batch; the n completions take this
            seed and the ones that follow it.
        logit_bias: token id to a number in [-100, 100], added to its logit.
        presence_penalty: taken from the logit of each token that the output has.
        frequency_penalty: taken from a token's logit as often as the output has the token.
        json_schema: the output is JSON that obeys this schema: an object, or its JSON as a string.
        top_k: only so many of the likeliest tokens are drawn.
        min_p: only tokens with this part of the likeliest one's probability are drawn.
        repetition_penalty: logits above 0 of tokens that prompt or output have are divided by it, those below are
            multiplied.
        min_new_tokens: no end-of-sequence token, stop id or stop string counts before this many tokens.
        stop_token_ids: token ids that end the completion.
        stop_regex: regular expressions that end the completion as ``stop`` does.
        no_stop_trim: the text ends behind the stop string or token, not before it.
        ignore_eos: the model's end-of-sequence tokens do not end the completion.
        skip_special_tokens: special tokens are left out of the text.
        spaces_between_special_tokens: spaces stand around special tokens, where the tokenizer joins tokens by spaces.
        regex: the output matches this regular expression.
        ebnf: the output obeys this grammar, in EBNF.
        structural_tag: the output obeys this structural tag of XGrammar: an object, or its JSON as a string.
    """

    n: Annotated[int, Param(1, 1024)] = 1
    max_new_tokens: Annotated[int | None, Param(0, openai="max_tokens")] = 128
    temperature: Annotated[float, Param(0)] = 1.0
    top_p: Annotated[float, Param(0, 1, is_above=True)] = 1.0
    stop: Annotated[tuple[str, ...], Param(most=MAX_STOPS)] = ()
    sampling_seed: Annotated[int | None, Param(0, MAX_SEED, openai="seed")] = None
    logit_bias: Annotated[dict[int, float], Param(most=MAX_BIASES)] = {}
    presence_penalty: Annotated[float, Param(-2, 2)] = 0.0
    frequency_penalty: Annotated[float, Param(-2, 2)] = 0.0
    json_schema: Annotated[str | None, Param(is_json=True, openai="response_format")] = None
    top_k: Annotated[int, Param(1, special=(-1, "all tokens"))] = -1
    min_p: Annotated[float, Param(0, 1)] = 0.0
    repetition_penalty: Annotated[float, Param(0, 2, is_above=True)] = 1.0
    min_new_tokens: Annotated[int, Param(0, openai="min_tokens")] = 0
    stop_token_ids: Annotated[tuple[int, ...], Param(most=MAX_STOP_TOKENS)] = ()
    stop_regex: Annotated[tuple[str, ...], Param(most=MAX_PATTERNS)] = ()
    no_stop_trim: Annotated[bool, Param()] = False
    ignore_eos: Annotated[bool, Param()] = False
    skip_special_tokens: Annotated[bool, Param()] = True
    spaces_between_special_tokens: Annotated[bool, Param()] = True
    regex: Annotated[str | None, Param()] = None
    ebnf: Annotated[str | None, Param()] = None
    structural_tag: Annotated[str | None, Param(is_json=True, openai=None)] = None

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

    def validate(self, vocab_size: int, where: Field = (SAMPLING,)) -> None:
        """Check every field's range.

        Args:
            where: path to the parameters in the request.

        Raises:
            RequestError: names the field, its value and the allowed values.
        """
        for name, param in PARAMS.items():
            value = getattr(self, name)
            if param.is_number and value is not None and not param.allows(value):
                raise refused((*where, name), value, param.allowed)
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise RequestError.about(
                (*where, "min_new_tokens"),
                f" is {self.min_new_tokens}; allowed: at most ",
                ("max_new_tokens",),
                f" ({self.max_new_tokens})",
            )
        self._validate_tokens(vocab_size, where)
        given = [kind for kind in GRAMMAR_FIELDS if getattr(self, kind) is not None]
        if len(given) > 1:
            fields = ((*where, given[0]), " and ", (given[1],))
            raise RequestError.about(*fields, " exclude each other; give one", param=given[1])
        for kind in given:
            check_grammar_length((*where, kind), getattr(self, kind))

    def _validate_tokens(self, vocab_size: int, where: Field) -> None:
        allowed = f"token ids in [0, {vocab_size - 1}]"
        for token in self.stop_token_ids:
            if not 0 <= token < vocab_size:
                raise refused((*where, "stop_token_ids"), token, allowed)
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocab_size:
                raise refused((*where, "logit_bias"), token, allowed)
            if not (math.isfinite(bias) and -100 <= bias <= 100):
                raise refused((*where, "logit_bias"), bias, "values in [-100, 100]")
        if any(not text for text in self.stop):
            raise refused((*where, "stop"), "", "strings of at least one character")


GRAMMAR_FIELDS = ("json_schema", "regex", "ebnf", "structural_tag")


def check_grammar_length(field: Field, source: str) -> None:
    """Check that the text of a grammar is not too long.

    Raises:
        RequestError: it is.
    """
    if len(source) > MAX_GRAMMAR:
        raise RequestError.about(
            field, f": it has {len(source):,} characters; allowed: up to {MAX_GRAMMAR:,}"
        )


def _read_table() -> dict[str, Param]:
    table: dict[str, Param] = {}
    defaults = SamplingParams()
    entries = (inspect.getdoc(SamplingParams) or "").partition("Attributes:")[2]
    about = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", entries, re.MULTILINE))
    for name, hint in get_type_hints(SamplingParams, include_extras=True).items():
        kind, param = get_args(hint)
        table[name] = replace(
            param,
            name=name,
            default=getattr(defaults, name),
            kind=get_args(kind)[0] if isinstance(kind, UnionType) else kind,
            openai=name if param.openai == "" else param.openai,
            about=" ".join(about.get(name, "").replace("``", "`").split()),
        )
    return table


PARAMS: Mapping[str, Param] = _read_table()
"""Each sampling parameter by its name, in the order of the fields."""
