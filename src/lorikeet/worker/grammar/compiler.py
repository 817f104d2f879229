"""Grammars that outputs must obey: tried out in processes that may die, compiled by XGrammar, followed token by token.

What a client sends meets XGrammar in a process of a sandbox first, under limits of time and memory (``work.py``).
What has compiled there, and costs little to follow, is compiled again on a thread of this process (``backend.py``);
equal grammars once, for all requests that wait for them. ``masks.py`` follows the outputs.

Nothing here starts a process, or imports XGrammar, until a request asks for a grammar.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from lorikeet.core.sampling import SamplingParams, check_grammar_length
from lorikeet.errors import SAMPLING, EngineFault, LorikeetError, UnavailableError
from lorikeet.sandbox import Job, JobLimits, LimitError, Sandbox
from lorikeet.worker.grammar.backend import GrammarBackend, Prepared, Vocabulary, reason, refuse
from lorikeet.worker.grammar.masks import (
    CompiledGrammar,
    GrammarMatcher,
    MaskFiller,
    start_thread,
)

__all__ = ["CompiledGrammar", "GrammarCompiler", "GrammarMatcher"]

# The first try gets little processor time, so that quick grammars do not wait for slow ones.
_FIRST = JobLimits(wall_seconds=5, cpu_seconds=0.5, memory_bytes=192 * 2**20, answer_bytes=2**22)
_LIMITS = JobLimits(wall_seconds=40, cpu_seconds=15, memory_bytes=192 * 2**20, answer_bytes=2**22)
# Threads, each with one process at a time, for first and second tries.
_NUM_THREADS = 2
_MAX_WAITING = 256
_MAX_WAIT_SECONDS = 60.0
# Compiled grammars in this process: of requests that are open, and of earlier ones.
_MAX_OPEN_BYTES = 2**30
_MAX_IDLE_BYTES = 256 * 2**20

_Key = tuple[str, bool, bytes]


class _Compilation:
    """A grammar on its way, and the requests that wait for it."""

    def __init__(self, key: _Key, source: str) -> None:
        self.key = key
        self.kind, self.skip_special_tokens, _ = key
        self.source = source
        self.since = time.monotonic()
        self.waiting: list[Future[CompiledGrammar]] = []
        self.job: Job | None = None

    @property
    def is_cancelled(self) -> bool:
        """True if nobody waits any more."""
        return all(future.cancelled() for future in self.waiting)

    def cancel_if_unwanted(self) -> None:
        job = self.job
        if job is not None and self.is_cancelled:
            job.cancel()


class _WorkThreads:
    """A few threads, and the compilations that wait for them; short ones go first."""

    def __init__(self, name: str, work: Callable[[_Compilation], None]) -> None:
        self._name = name
        self._work = work
        self._condition = threading.Condition()
        self._heap: list[tuple[int, int, _Compilation]] = []
        self._numbers = itertools.count()
        self._num_threads = 0
        self._is_closed = False

    def put(self, compilation: _Compilation) -> None:
        """Raises UnavailableError if too many wait."""
        with self._condition:
            if self._is_closed:
                raise EngineFault("the engine is closed")
            self._heap = [entry for entry in self._heap if not entry[2].is_cancelled]
            heapq.heapify(self._heap)
            if len(self._heap) >= _MAX_WAITING:
                raise UnavailableError(
                    f"{len(self._heap)} grammars wait to be compiled, which is as many as may; try again later"
                )
            heapq.heappush(self._heap, (len(compilation.source), next(self._numbers), compilation))
            self._condition.notify()
            if self._num_threads < _NUM_THREADS:
                self._num_threads += 1
                start_thread(f"{self._name}-{self._num_threads}", self._run)

    def close(self) -> None:
        with self._condition:
            self._is_closed = True
            self._heap.clear()
            self._condition.notify_all()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._heap and not self._is_closed:
                    self._condition.wait()
                if self._is_closed:
                    return
                compilation = heapq.heappop(self._heap)[2]
            self._work(compilation)


class GrammarCompiler:
    """Compiles the grammars of requests for one tokenizer. Safe to use from several threads.

    Args:
        tokenizer_dir: directory that holds ``tokenizer.json``.
        vocab_size: columns of the logits; may be more than the tokenizer has tokens, the rest is never admitted.
        eos_token_ids: tokens that end an output.
    """

    def __init__(
        self, tokenizer_dir: str | Path, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        self.vocab_size = vocab_size
        self.masks = MaskFiller()
        self._tokenizer_file = Path(tokenizer_dir) / "tokenizer.json"
        # An id beyond the vocabulary cannot be produced, so it can never end a sequence.
        self.eos_token_ids = tuple(token for token in eos_token_ids if token < vocab_size)
        self._backend = GrammarBackend(
            self._tokenizer_file, vocab_size, self.eos_token_ids, cached=False
        )
        self._sandbox = Sandbox(
            "lorikeet.worker.grammar.work:setup",
            {
                "tokenizer_file": str(self._tokenizer_file.absolute()),
                "vocab_size": vocab_size,
                "eos_token_ids": list(self.eos_token_ids),
            },
            limits=_LIMITS,
            num_workers=2 * _NUM_THREADS,
            num_spares=1,
            name="grammar-process",
        )
        self._first = _WorkThreads("grammar", lambda compilation: self._try(compilation, _FIRST))
        self._second = _WorkThreads(
            "large-grammar", lambda compilation: self._try(compilation, _LIMITS)
        )
        self._lock = threading.Lock()
        self._compiling: dict[_Key, _Compilation] = {}
        self._known: WeakValueDictionary[_Key, CompiledGrammar] = WeakValueDictionary()
        self._recent: OrderedDict[_Key, CompiledGrammar] = OrderedDict()

    def request(self, sampling: SamplingParams) -> Future[CompiledGrammar]:
        """Check and compile a request's grammar, on other threads and in other processes.

        Returns:
            the grammar, which ``matcher`` finds while somebody holds it. Whoever does not wait any more cancels the
            future; when all have, the work ends. Its exception may be a ``RequestError`` that names json_schema, regex,
            ebnf or structural_tag and says what is wrong with it, an ``UnavailableError`` if too much is to be done, or
            an ``EngineFault``.
        """
        assert sampling.grammar is not None
        kind, source = sampling.grammar
        future: Future[CompiledGrammar] = Future()
        try:
            key = self._checked(kind, source, skip_special_tokens=sampling.skip_special_tokens)
            with self._lock:
                if (known := self._known.get(key)) is not None:
                    self._note_use(key, known)
                    future.set_result(known)
                    return future
                compilation = self._compiling.get(key)
                if compilation is None or compilation.is_cancelled:
                    compilation = _Compilation(key, source)
                    compilation.waiting.append(future)
                    self._first.put(compilation)
                    self._compiling[key] = compilation
                else:
                    compilation.waiting.append(future)
        except LorikeetError as error:
            future.set_exception(error)
            return future
        future.add_done_callback(lambda _: compilation.cancel_if_unwanted())
        return future

    def matcher(self, sampling: SamplingParams) -> GrammarMatcher:
        """A matcher at the beginning of the request's grammar, which is compiled now unless somebody holds it.

        Raises:
            RequestError, UnavailableError, EngineFault: as ``request``.
        """
        return GrammarMatcher(self.request(sampling).result(), self.vocab_size, self.eos_token_ids)

    def close(self) -> None:
        """End all threads and processes; what is not compiled yet fails."""
        self._first.close()
        self._second.close()
        self._sandbox.close()
        self.masks.close()
        with self._lock:
            compilations = list(self._compiling.values())
            self._compiling.clear()
            self._recent.clear()
        for compilation in compilations:
            _finish(compilation, EngineFault("the engine is closed"))

    def _checked(self, kind: str, source: str, *, skip_special_tokens: bool) -> _Key:
        """Check what can be checked without reading the grammar; returns its key."""
        if not self.eos_token_ids:
            raise refuse(kind, "the model has no end-of-sequence token that could end the output")
        check_grammar_length((SAMPLING, kind), source)
        try:
            encoded = source.encode()
        except UnicodeEncodeError:
            raise refuse(
                kind, "half of a surrogate pair stands alone, which is not Unicode"
            ) from None
        if not self._tokenizer_file.is_file():
            raise refuse(kind, f"grammars need {self._tokenizer_file}, which does not exist")
        return kind, skip_special_tokens, hashlib.sha256(encoded).digest()

    def _try(self, compilation: _Compilation, limits: JobLimits) -> None:
        """Body of a thread, for one compilation: whoever waits gets the result, or it moves on to the second try."""
        try:
            if compilation.is_cancelled:
                raise EngineFault("nobody waits for it")
            waited = time.monotonic() - compilation.since
            if waited > _MAX_WAIT_SECONDS:
                raise UnavailableError(
                    f"its grammar has waited for {waited:.0f} s to be compiled; try again later"
                )
            result: CompiledGrammar | BaseException = self._compile(compilation, limits)
        except LimitError as error:
            if limits is _FIRST and error.limit in ("cpu", "time"):
                try:
                    self._second.put(compilation)
                except LorikeetError as full:
                    self._end(compilation, full)
                return
            result = refuse(compilation.kind, _limit_text(error, limits))
        except BaseException as error:  # noqa: BLE001  # a thread that ended would take its requests along
            result = error
        self._end(compilation, result)

    def _compile(self, compilation: _Compilation, limits: JobLimits) -> CompiledGrammar:
        work = [compilation.kind, compilation.source, compilation.skip_special_tokens]
        job = compilation.job = self._sandbox.submit(work, limits)
        compilation.cancel_if_unwanted()
        try:
            answer: dict[str, Any] = job.future.result()
        except CancelledError:
            raise EngineFault("the engine is closed") from None
        if compilation.is_cancelled:
            raise EngineFault("nobody waits for it")
        prepared = Prepared(compilation.kind, answer["text"], Vocabulary(*answer["vocabulary"]))
        try:
            grammar = self._backend.compile(prepared)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise refuse(compilation.kind, reason(error)) from error
        return CompiledGrammar(grammar, grammar.memory_size_bytes + len(compilation.source))

    def _end(self, compilation: _Compilation, result: CompiledGrammar | BaseException) -> None:
        key = compilation.key
        with self._lock:
            if self._compiling.get(key) is compilation:
                del self._compiling[key]
            if isinstance(result, CompiledGrammar):
                try:
                    self._keep(key, result)
                except UnavailableError as error:
                    result = error
        _finish(compilation, result)

    def _keep(self, key: _Key, compiled: CompiledGrammar) -> None:
        self._drop_idle(_MAX_IDLE_BYTES - compiled.num_bytes)
        taken = sum(known.num_bytes for known in self._known.values())
        if taken + compiled.num_bytes > _MAX_OPEN_BYTES + _MAX_IDLE_BYTES:
            raise UnavailableError(
                f"the grammars of open requests take {taken / 2**20:,.0f} MB, and no more is allowed; try again later"
            )
        self._known[key] = compiled
        self._note_use(key, compiled)

    def _note_use(self, key: _Key, compiled: CompiledGrammar) -> None:
        self._recent[key] = compiled
        self._recent.move_to_end(key)
        self._drop_idle(_MAX_IDLE_BYTES)

    def _drop_idle(self, most_bytes: int) -> None:
        """Forget the grammars that were used least recently; those that requests hold stay known."""
        total = sum(compiled.num_bytes for compiled in self._recent.values())
        while self._recent and total > most_bytes:
            total -= self._recent.popitem(last=False)[1].num_bytes


def _finish(compilation: _Compilation, result: CompiledGrammar | BaseException) -> None:
    # Breaks a cycle: each future has a callback that refers to the compilation.
    waiting, compilation.waiting = compilation.waiting, []
    for future in waiting:
        if future.done() or not future.set_running_or_notify_cancel():
            continue
        if isinstance(result, CompiledGrammar):
            future.set_result(result)
        else:
            future.set_exception(result)


def _limit_text(error: LimitError, limits: JobLimits) -> str:
    match error.limit:
        case "memory":
            return (
                f"compiling it takes more than {limits.memory_bytes / 2**20:,.0f} MB of memory, "
                "which is what one grammar may take"
            )
        case "cpu":
            return (
                f"compiling it takes more than {limits.cpu_seconds:g} s of processor time, "
                "which is what one grammar may take"
            )
        case "time":
            return f"compiling it takes longer than {limits.wall_seconds:g} s, which is what one grammar may take"
    return f"it is nested too deeply, or repeats too much, for the compiler ({error})"
