"""XGrammar's compilers for one tokenizer: the same for trying a grammar out and for using it.

Nothing here imports XGrammar or the tokenizer library until a grammar is compiled, so a server that is never asked for one
starts without them.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorikeet.errors import SAMPLING, RequestError

if TYPE_CHECKING:
    import xgrammar

__all__ = ["GrammarBackend", "Prepared", "Vocabulary", "reason"]

# Enough for pretty-printed JSON, and a bound on models that would otherwise write spaces for ever.
_MAX_WHITESPACE = 64
_MAX_THREADS = 4
# XGrammar's messages begin with a time, a source file and, for failed checks, the C++ condition.
_MESSAGE_PREFIX = re.compile(r"^\[[\d:]+\] [^ ]+:\d+: (Check failed: \(.*?\) is false: )?")
_ASSERTION = re.compile(r"Check failed|\.cc:|\bis<|\(\)")

# Control characters other than the line ends, which XGrammar itself keeps out of strings.
_CONTROL = re.compile(rb"[\x00-\x09\x0b\x0c\x0e-\x1f]")


class Vocabulary(NamedTuple):
    """Which tokens a grammar may use at all."""

    special: bool
    control: bool


class Prepared(NamedTuple):
    """A grammar that was checked, in the form that the compiler gets.

    Attributes:
        kind: json_schema, regex, ebnf or structural_tag.
        text: what is compiled: the client's, or written anew.
    """

    kind: str
    text: str
    vocabulary: Vocabulary


class GrammarBackend:
    """Compiles grammars. Safe to use from several threads.

    The constrained text is the text that the client sees: with ``skip_special_tokens`` a special token cannot be
    part of it, so the grammar does not admit any (a model could otherwise write ``<|im_start|>`` into a JSON string
    and the reply would lack it). Structural tags are the exception, since they are there to name such tokens.

    JSON has no raw control characters but line ends and tabs between its elements. XGrammar admits the others and tabs
    in strings of limited length, so tokens that contain them are left out for ``json_schema``, and for structural tags
    in which there is nothing but JSON between constants: no tabs for indentation.

    Args:
        tokenizer_file: ``tokenizer.json``.
        vocab_size: columns of the logits; may be more than the tokenizer has tokens, the rest is never admitted.
        eos_token_ids: tokens that end an output.
        cached: let XGrammar keep the masks of rules of JSON for grammars to come. It frees nothing, and takes rules
            that name different tokens for the same: only for a process that compiles one grammar.
    """

    def __init__(
        self, tokenizer_file: Path, vocab_size: int, eos_token_ids: tuple[int, ...], *, cached: bool
    ) -> None:
        self._tokenizer_file = tokenizer_file
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._cached = cached
        self._lock = threading.Lock()
        self._compilers: dict[Vocabulary, xgrammar.GrammarCompiler] = {}

    def compile(self, prepared: Prepared) -> xgrammar.CompiledGrammar:
        """Compile, with the GIL released.

        Raises:
            RuntimeError: what XGrammar raises for everything it refuses; see :func:`reason`.
        """
        compiler = self.compiler(prepared.vocabulary)
        match prepared.kind:
            case "json_schema":
                return compiler.compile_json_schema(
                    prepared.text, max_whitespace_cnt=_MAX_WHITESPACE
                )
            case "regex":
                return compiler.compile_regex(prepared.text)
            case "ebnf":
                return compiler.compile_grammar(prepared.text)
        return compiler.compile_structural_tag(prepared.text)

    def compiler(self, vocabulary: Vocabulary) -> xgrammar.GrammarCompiler:
        """XGrammar's compiler for a vocabulary, made when first asked for."""
        import xgrammar

        with self._lock:
            if vocabulary not in self._compilers:
                self._compilers[vocabulary] = xgrammar.GrammarCompiler(
                    self._tokenizer_info(vocabulary),
                    max_threads=min(_MAX_THREADS, os.cpu_count() or 1),
                    cache_enabled=self._cached and not any(vocabulary),
                )
            return self._compilers[vocabulary]

    def _tokenizer_info(self, vocabulary: Vocabulary) -> xgrammar.TokenizerInfo:
        import xgrammar
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer.from_file(str(self._tokenizer_file))
        # Made from tokenizer.json alone, not by AutoTokenizer, so that it is what the server itself decodes with.
        info = xgrammar.TokenizerInfo.from_huggingface(
            PreTrainedTokenizerFast(tokenizer_object=tokenizer),
            vocab_size=self._vocab_size,
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
        encoded = [""] * self._vocab_size
        for text, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
            if token_id < self._vocab_size and token_id not in hidden:
                encoded[token_id] = text
        return xgrammar.TokenizerInfo(
            encoded,
            info.vocab_type,
            vocab_size=self._vocab_size,
            stop_token_ids=list(self._eos_token_ids),
            add_prefix_space=info.add_prefix_space,
        )


_MAX_REASON = 400


def refuse(kind: str, why: str) -> RequestError:
    """The error for a grammar; ``why`` may be as long as the client's text."""
    shown = why if len(why) <= _MAX_REASON else why[:_MAX_REASON] + " …"
    return RequestError.about((SAMPLING, kind), f": {shown}")


def reason(error: BaseException) -> str:
    """Why XGrammar, or what checks a grammar before it, refuses one; never empty, no C++."""
    match error:
        case RecursionError():
            return "it is nested too deeply (recursion)"
        case MemoryError():
            return "it takes too much memory"
    text = _MESSAGE_PREFIX.sub("", str(error)).strip()
    if not text or _ASSERTION.search(text):
        return "it is not a grammar of this kind, or one that the compiler cannot handle"
    return text
