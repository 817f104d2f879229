"""Grammars that an output must obey: compiled once by XGrammar, then followed token by token.

Nothing here imports XGrammar or the tokenizer library until a request asks for a grammar, so a server that is never
asked starts without them. That is also why a broken installation shows up as an error of that request.
"""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorikeet.core.request import SamplingParams
from lorikeet.errors import RequestError
from lorikeet.worker.grammar_check import (
    check_regex,
    checked_json_schema,
    checked_structural_tag,
)

if TYPE_CHECKING:
    import xgrammar

__all__ = ["GrammarCompiler", "GrammarMatcher"]

_CACHE_BYTES = 256 * 2**20
# Enough for pretty-printed JSON, and a bound on models that would otherwise write spaces for ever.
_MAX_WHITESPACE = 64
_MAX_REASON = 400
# XGrammar's messages begin with a time, a source file and, for failed checks, the C++ condition.
_MESSAGE_PREFIX = re.compile(r"^\[[\d:]+\] [^ ]+:\d+: (Check failed: \(.*?\) is false: )?")


# Control characters other than the line ends, which XGrammar itself keeps out of strings.
_CONTROL = re.compile(rb"[\x00-\x09\x0b\x0c\x0e-\x1f]")


# Parts of structural tags in which only the JSON varies.
_JSON_TAGS = ("structural_tag", "sequence", "tag", "tags_with_separator", "const_string")


class _Vocabulary(NamedTuple):
    """Which tokens a kind of grammar may use at all."""

    special: bool
    control: bool


class GrammarMatcher:
    """How far one sequence's output has got in its grammar.

    After the text is complete only end-of-sequence tokens may follow, and after one of those only more of them: a
    grammar ends the output whatever ``ignore_eos`` and ``min_new_tokens`` say, because there is nothing left that
    it admits.
    """

    def __init__(
        self, matcher: xgrammar.GrammarMatcher, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._eos_bits_W = _token_bits(eos_token_ids, vocab_size)
        self._avoided: tuple[int, ...] = ()
        self._avoided_bits_W: Tensor | None = None

    @property
    def is_terminated(self) -> bool:
        """True once an end-of-sequence token was accepted."""
        return self._matcher.is_terminated()

    def fill(self, bits_GW: Tensor, row: int, avoid: tuple[int, ...] = ()) -> None:
        """Write the tokens that may come next into ``bits_GW[row]``: bit t % 32 of word t // 32.

        Args:
            bits_GW: int32 on the CPU, contiguous, W = ceil(vocab_size / 32).
            avoid: tokens to leave out, unless that leaves nothing (min_new_tokens; the grammar wins).
        """
        if self._matcher.is_terminated():
            bits_GW[row] = self._eos_bits_W
            return
        if not self._matcher.fill_next_token_bitmask(bits_GW, row):
            bits_GW[
                row
            ] = -1  # False: every token is admitted, and the row may not have been written
        if not avoid:
            return
        if self._avoided_bits_W is None or avoid != self._avoided:
            self._avoided, self._avoided_bits_W = avoid, _token_bits(avoid, self._vocab_size)
        left_W = bits_GW[row] & ~self._avoided_bits_W
        if left_W.any():
            bits_GW[row] = left_W

    def accept(self, token_id: int) -> bool:
        """Advance by one token; False, and nothing changes, if the grammar does not admit it here."""
        if self._matcher.is_terminated():
            return token_id in self._eos_token_ids
        return self._matcher.accept_token(token_id)


class GrammarCompiler:
    """Compiles the grammars of requests for one tokenizer. Safe to use from several threads.

    The constrained text is the text that the client sees: with ``skip_special_tokens`` a special token can not be
    part of it, so the grammar does not admit any (a model could otherwise write ``<|im_start|>`` into a JSON string
    and the reply would lack it). Structural tags are the exception, since they are there to name such tokens.

    JSON has no raw control characters but line ends and tabs between its elements. XGrammar admits the others and tabs
    in strings of limited length, so tokens that contain them are left out for ``json_schema``, and for structural tags
    in which there is nothing but JSON between constants: no tabs for indentation.

    Args:
        tokenizer_dir: directory that holds ``tokenizer.json``.
        vocab_size: columns of the logits; may be more than the tokenizer has tokens, the rest is never admitted.
        eos_token_ids: tokens that end an output.
    """

    def __init__(
        self, tokenizer_dir: str | Path, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        self.vocab_size = vocab_size
        self._tokenizer_file = Path(tokenizer_dir) / "tokenizer.json"
        # An id beyond the vocabulary can not be produced, so that it ends nothing.
        self._eos_token_ids = tuple(token for token in eos_token_ids if token < vocab_size)
        self._lock = threading.Lock()
        self._backends: dict[_Vocabulary, xgrammar.GrammarCompiler] = {}

    def compile(self, sampling: SamplingParams) -> None:
        """Check and compile a request's grammar, so that ``matcher`` finds it in the cache.

        Takes milliseconds for most grammars and seconds for the largest, with the GIL released: call it from a
        thread that may wait. Does nothing for a request without a grammar.

        Raises:
            RequestError: names json_schema, regex, ebnf or structural_tag and says what is wrong with it.
        """
        if sampling.grammar is not None:
            self._compiled(sampling)

    def matcher(self, sampling: SamplingParams) -> GrammarMatcher:
        """A matcher at the beginning of the request's grammar (compiled now, if it is not in the cache).

        Raises:
            RequestError: as ``compile``.
        """
        import xgrammar

        matcher = xgrammar.GrammarMatcher(self._compiled(sampling))
        return GrammarMatcher(matcher, self.vocab_size, self._eos_token_ids)

    def _compiled(self, sampling: SamplingParams) -> xgrammar.CompiledGrammar:
        assert sampling.grammar is not None
        kind, source = sampling.grammar
        if not self._eos_token_ids:
            raise _refuse(kind, "the model has no end-of-sequence token that could end the output")
        try:
            vocabulary = _vocabulary(kind, source, skip_special_tokens=sampling.skip_special_tokens)
            compiled = _COMPILE[kind](self._backend(kind, vocabulary), source)
        except (ValueError, RecursionError) as error:
            raise _refuse(kind, str(error)) from error
        except RuntimeError as error:  # what XGrammar raises for everything it refuses
            raise _refuse(kind, _MESSAGE_PREFIX.sub("", str(error)).strip()) from error
        if not _admits_anything(compiled, self.vocab_size):
            raise _refuse(kind, "it admits no output at all")
        return compiled

    def _backend(self, kind: str, vocabulary: _Vocabulary) -> xgrammar.GrammarCompiler:
        """XGrammar's compiler, which also holds the cache (thread-safe; one compilation of equal grammars)."""
        import xgrammar

        with self._lock:
            if vocabulary not in self._backends:
                if not self._tokenizer_file.is_file():
                    raise _refuse(
                        kind, f"grammars need {self._tokenizer_file}, which does not exist"
                    )
                self._backends[vocabulary] = xgrammar.GrammarCompiler(
                    self._tokenizer_info(vocabulary),
                    max_threads=min(8, os.cpu_count() or 1),
                    cache_limit_bytes=_CACHE_BYTES,
                )
            return self._backends[vocabulary]

    def _tokenizer_info(self, vocabulary: _Vocabulary) -> xgrammar.TokenizerInfo:
        import xgrammar
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer.from_file(str(self._tokenizer_file))
        # Made from tokenizer.json alone, not by AutoTokenizer, so that it is what the server itself decodes with.
        info = xgrammar.TokenizerInfo.from_huggingface(
            PreTrainedTokenizerFast(tokenizer_object=tokenizer),
            vocab_size=self.vocab_size,
            stop_token_ids=list(self._eos_token_ids),
        )
        hidden: set[int] = set()
        if not vocabulary.special:
            added = tokenizer.get_added_tokens_decoder()
            hidden |= {token_id for token_id, token in added.items() if token.special}
        if not vocabulary.control:
            texts = enumerate(info.decoded_vocab)
            hidden |= {token_id for token_id, text in texts if _CONTROL.search(text)}
        if not hidden:
            return info
        # XGrammar never admits a token without text.
        encoded = [""] * self.vocab_size
        for text, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
            if token_id < self.vocab_size and token_id not in hidden:
                encoded[token_id] = text
        return xgrammar.TokenizerInfo(
            encoded,
            info.vocab_type,
            vocab_size=self.vocab_size,
            stop_token_ids=list(self._eos_token_ids),
            add_prefix_space=info.add_prefix_space,
        )


def _vocabulary(kind: str, source: str, *, skip_special_tokens: bool) -> _Vocabulary:
    special = kind == "structural_tag" or not skip_special_tokens
    is_json = kind == "json_schema" or (kind == "structural_tag" and _is_json(_parse_json(source)))
    return _Vocabulary(special=special, control=not is_json)


def _is_json(tag: object) -> bool:
    """Whether a structural tag, or a part of it, has no free text."""
    if isinstance(tag, list):
        return all(map(_is_json, tag))
    if not isinstance(tag, dict):
        return True
    if tag.get("type") == "json_schema":
        return tag.get("style", "json") == "json"
    return tag.get("type") in _JSON_TAGS and all(map(_is_json, tag.values()))


def _compile_json_schema(backend: xgrammar.GrammarCompiler, source: str) -> Any:
    schema = json.dumps(checked_json_schema(_parse_json(source)), ensure_ascii=False)
    return backend.compile_json_schema(schema, max_whitespace_cnt=_MAX_WHITESPACE)


def _compile_regex(backend: xgrammar.GrammarCompiler, source: str) -> Any:
    check_regex(source)
    return backend.compile_regex(source)


def _compile_ebnf(backend: xgrammar.GrammarCompiler, source: str) -> Any:
    return backend.compile_grammar(source)


def _compile_structural_tag(backend: xgrammar.GrammarCompiler, source: str) -> Any:
    tag = _parse_json(source)
    if isinstance(tag, dict) and "structures" in tag:
        tag = _from_structures(tag)
    return backend.compile_structural_tag(
        json.dumps(checked_structural_tag(tag), ensure_ascii=False)
    )


_COMPILE = {
    "json_schema": _compile_json_schema,
    "regex": _compile_regex,
    "ebnf": _compile_ebnf,
    "structural_tag": _compile_structural_tag,
}


def _from_structures(tag: dict[str, Any]) -> dict[str, Any]:
    """The older form ``{"structures": [{begin, schema, end}], "triggers": [...]}`` that clients still send."""
    unknown = sorted(set(tag) - {"type", "structures", "triggers"})
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; allowed: type, structures, triggers")
    structures = tag["structures"]
    if not isinstance(structures, list) or not all(
        isinstance(item, dict) and set(item) == {"begin", "schema", "end"} for item in structures
    ):
        raise ValueError("structures must be a list of objects with begin, schema and end")
    tags = [
        {
            "begin": item["begin"],
            "content": {"type": "json_schema", "json_schema": item["schema"]},
            "end": item["end"],
        }
        for item in structures
    ]
    triggers = tag.get("triggers", [])
    return {
        "type": "structural_tag",
        "format": {"type": "triggered_tags", "triggers": triggers, "tags": tags},
    }


def _parse_json(source: str) -> Any:
    try:
        return json.loads(source)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from error


def _admits_anything(compiled: xgrammar.CompiledGrammar, vocab_size: int) -> bool:
    import xgrammar

    bits_1W = torch.zeros((1, (vocab_size + 31) // 32), dtype=torch.int32)
    xgrammar.GrammarMatcher(compiled).fill_next_token_bitmask(bits_1W)
    return bool(bits_1W.any())


def _token_bits(token_ids: tuple[int, ...], vocab_size: int) -> Tensor:
    """Int32 words [W] with the bits of the given tokens set."""
    bits_V = np.zeros((vocab_size + 31) // 32 * 32, dtype=np.uint8)
    bits_V[list(token_ids)] = 1
    return torch.from_numpy(np.packbits(bits_V, bitorder="little").view(np.int32))


def _refuse(kind: str, reason: str) -> RequestError:
    shown = reason if len(reason) <= _MAX_REASON else reason[:_MAX_REASON] + " …"
    return RequestError(f"sampling_params.{kind}: {shown}", kind)
