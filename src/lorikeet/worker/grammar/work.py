"""What the processes that try out grammars do: check one, compile it, and measure what following it costs.

A grammar that passes here is compiled again in the engine's process. That is less work than to bring what was compiled
there: masks for a vocabulary of 128,000 tokens are 17 MB, as text 25 MB or more, which takes ten times as long to write
and three times as long to read as to compute (docs/decisions/0006).
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorikeet.worker.grammar.backend import GrammarBackend, Prepared, Vocabulary, reason, refuse
from lorikeet.worker.grammar.check import checked_json_schema, checked_structural_tag
from lorikeet.worker.grammar.patterns import checked_regex

if TYPE_CHECKING:
    import xgrammar

__all__ = ["MAX_COMPILED_BYTES", "MAX_MATCHER_BYTES", "prepare", "setup"]

MAX_COMPILED_BYTES = 64 * 2**20
MAX_MATCHER_BYTES = 16 * 2**20
# Limits for one sequence, to begin and for one token. Ordinary grammars take a hundredth of them.
_MATCHER_SECONDS = 0.05
_MASK_SECONDS = 0.05
_TOKEN_BYTES = 2**18
# The same for a matcher that may be anywhere in the grammar at once, which no real one is.
_ANYWHERE_SECONDS = 0.25
_ANYWHERE_BYTES = 64 * 2**20
_NUM_WALKS, _WALK_TOKENS = 2, 20
# A grammar of fewer rules has no state that costs much.
_FEW_RULES = 500
# The engine's threads have at least twice as much.
_STACK_BYTES = 4 * 2**20

# Parts of structural tags in which only the JSON varies.
_JSON_TAGS = ("structural_tag", "sequence", "tag", "tags_with_separator", "const_string")
_WARNING = re.compile(r"^\[[\d:]+\] [^ ]+:\d+: Warning: (?:Regex parsing warning at [^:]*: )?(.*)$")
_RULE = re.compile(r"^(\w+)(?:\([^)]*\))? ::=", re.MULTILINE)


def setup(
    tokenizer_file: str, vocab_size: int, eos_token_ids: list[int]
) -> Callable[[list[Any]], dict[str, Any]]:
    """The handler of a sandbox; see :class:`lorikeet.sandbox.Sandbox`.

    A job is kind, source and ``skip_special_tokens``; the answer has ``text`` and ``vocabulary`` of :class:`Prepared`.
    """
    backend = GrammarBackend(Path(tokenizer_file), vocab_size, tuple(eos_token_ids), cached=True)
    for special in (False, True):
        for control in (False, True):
            vocabulary = Vocabulary(special, control)
            backend.compiler(vocabulary)
            # The masks of strings and numbers, which most schemas need: workers begin with them.
            first = (
                Prepared("regex", "a", vocabulary)
                if control
                else Prepared("json_schema", "{}", vocabulary)
            )
            _Proof(backend.compile(first), vocab_size, "").run()

    def handle(job: list[Any]) -> dict[str, Any]:
        kind, source, skip_special_tokens = job
        _, hard = resource.getrlimit(resource.RLIMIT_STACK)
        resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, hard))
        try:
            prepared = prepare(kind, source, skip_special_tokens=skip_special_tokens)
            compiled = _compile(backend, prepared)
            _Proof(compiled, vocab_size, source).run()
            _check_rules(backend, prepared, compiled)
        except MemoryError:
            raise
        except Exception as error:  # whatever it is, the grammar is at fault
            if "bad_alloc" in str(error):
                raise MemoryError from error
            raise refuse(kind, reason(error)) from error
        return {"text": prepared.text, "vocabulary": list(prepared.vocabulary)}

    return handle


def prepare(kind: str, source: str, *, skip_special_tokens: bool) -> Prepared:
    """Check a grammar.

    Raises:
        ValueError, RecursionError: it is wrong, or would be enforced in part only.
    """
    special, control = not skip_special_tokens, True
    text = source
    if kind == "json_schema":
        control = False
        text = _json_text(checked_json_schema(_parse_json(source)))
    elif kind == "regex":
        text = checked_regex(source)
    elif kind == "structural_tag":
        tag = _parse_json(source)
        special, control = True, not _is_json(tag)
        if isinstance(tag, dict) and "structures" in tag:
            tag = _from_structures(tag)
        text = _json_text(checked_structural_tag(tag))
    if "\0" in text:
        raise ValueError("the null character is not supported")
    return Prepared(kind, text, Vocabulary(special, control))


def _compile(backend: GrammarBackend, prepared: Prepared) -> xgrammar.CompiledGrammar:
    with _warnings() as warnings:
        compiled = backend.compile(prepared)
    for warning in warnings:
        raise ValueError(f"it would be enforced in part only: {warning}")
    if compiled.memory_size_bytes > MAX_COMPILED_BYTES:
        raise ValueError(
            f"it takes {compiled.memory_size_bytes / 2**20:,.0f} MB when compiled; allowed: "
            f"{MAX_COMPILED_BYTES / 2**20:,.0f} MB"
        )
    return compiled


class _Proof:
    """Follows a grammar for some random outputs, as the engine will."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, vocab_size: int, seed: str) -> None:
        self._compiled = compiled
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self._bits_1W = np.zeros((1, (vocab_size + 31) // 32), dtype=np.int32)

    def run(self) -> None:
        """Follow some outputs to their end.

        Raises:
            ValueError: it admits nothing, or costs too much.
        """
        matcher = start_matcher(self._compiled)
        if not self._tokens(matcher).any():
            raise ValueError("it admits no output at all")
        for _ in range(_NUM_WALKS):
            self._walk()

    def _walk(self) -> None:
        import xgrammar

        matcher = xgrammar.GrammarMatcher(self._compiled)
        before = _heap_bytes()
        for step in range(1, _WALK_TOKENS + 1):
            tokens = self._tokens(matcher).nonzero()[0]
            if not len(tokens):
                raise ValueError("after some text it admits neither another token nor an end")
            began = time.thread_time()
            token = int(tokens[self._random.randrange(len(tokens))])
            if not matcher.accept_token(token):
                raise ValueError(f"the compiler admits token {token} and then refuses it")
            _check_seconds("taking a token", time.thread_time() - began, _MASK_SECONDS)
            grown = _heap_bytes() - before
            if grown > MAX_MATCHER_BYTES // 4 and grown > step * _TOKEN_BYTES:
                raise ValueError(
                    f"following it takes {grown / step / 2**10:,.0f} KB of memory for each token; allowed: "
                    f"{_TOKEN_BYTES / 2**10:,.0f} KB (many optional properties in one object do that)"
                )
            if matcher.is_terminated():
                return

    def _tokens(self, matcher: xgrammar.GrammarMatcher) -> np.ndarray:
        """Which tokens may come next, as [vocab_size] of 0 and 1."""
        began = time.thread_time()
        if not matcher.fill_next_token_bitmask(self._bits_1W, 0):
            self._bits_1W[:] = -1
        _check_seconds("a mask", time.thread_time() - began, _MASK_SECONDS)
        return np.unpackbits(self._bits_1W.view(np.uint8), bitorder="little")[: self._vocab_size]


def start_matcher(
    compiled: xgrammar.CompiledGrammar,
    most_seconds: float = _MATCHER_SECONDS,
    most_bytes: int = MAX_MATCHER_BYTES,
) -> xgrammar.GrammarMatcher:
    """A matcher, if it is cheap enough for each of many sequences to have one.

    Raises:
        ValueError: it is not.
    """
    import xgrammar

    before, began = _heap_bytes(), time.thread_time()
    matcher = xgrammar.GrammarMatcher(compiled)
    _check_seconds("beginning with it", time.thread_time() - began, most_seconds)
    taken = _heap_bytes() - before
    if taken > most_bytes:
        raise ValueError(
            f"each output that follows it takes {taken / 2**20:,.0f} MB of memory; allowed: "
            f"{most_bytes / 2**20:,.0f} MB"
        )
    return matcher


def _check_rules(
    backend: GrammarBackend, prepared: Prepared, compiled: xgrammar.CompiledGrammar
) -> None:
    """Bound states that random outputs do not reach: a matcher that may begin with any rule costs more than any state.

    Raises:
        ValueError: that is too much.
    """
    text = str(compiled.grammar)
    names = list(dict.fromkeys(_RULE.findall(text)))
    if len(names) <= _FEW_RULES:
        return
    start = "any_of_all_rules"
    everywhere = f"{text}\n{start} ::= {' | '.join(names)}\n"
    compiler = backend.compiler(prepared.vocabulary)
    compiled = compiler.compile_grammar(everywhere, root_rule_name=start)
    start_matcher(compiled, _ANYWHERE_SECONDS, _ANYWHERE_BYTES)


def _check_seconds(what: str, seconds: float, allowed: float) -> None:
    if seconds > allowed:
        raise ValueError(f"{what} takes {seconds:.2f} s of processor time; allowed: {allowed:g} s")


class _MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def _make_heap_counter() -> Callable[[], int]:
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):  # not glibc
        return lambda: 0
    mallinfo2.restype = _MallInfo

    def count() -> int:
        info = mallinfo2()
        return info.uordblks + info.hblkhd

    return count


_heap_bytes = _make_heap_counter()


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """XGrammar's warnings while the context lasts: it writes them to stderr where it would ignore something."""
    found: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield found
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        lines = file.read(100_000).decode("utf-8", "replace").splitlines()
    found += [match[1] for match in map(_WARNING.match, lines) if match]


def _parse_json(source: str) -> Any:
    try:
        return json.loads(source)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from error


def _json_text(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        json.dumps(value, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair stands alone, which is not Unicode") from None
    except ValueError:
        raise ValueError("a number in it is infinite or none (NaN), which JSON has not") from None
    return text


def _is_json(tag: object) -> bool:
    """Whether a structural tag, or a part of it, has no free text."""
    if isinstance(tag, list):
        return all(map(_is_json, tag))
    if not isinstance(tag, dict):
        return True
    if tag.get("type") == "json_schema":
        return tag.get("style", "json") == "json"
    return tag.get("type") in _JSON_TAGS and all(map(_is_json, tag.values()))


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
