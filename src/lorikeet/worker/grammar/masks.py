"""Grammars of running sequences: what may come next, computed on a thread that the step does not wait for too long.

XGrammar cannot be interrupted, and what one mask costs is known for the outputs that were tried only. So a thread
computes the masks of a step, with the GIL released, and the step watches its processor time: a row that takes too long
fails, the others go on with another thread.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import xgrammar

__all__ = ["CompiledGrammar", "GrammarMatcher", "MaskFiller", "start_thread"]

# Processor time: of one mask with the tokens before it, and of all masks of a sequence on the average, after a start.
MASK_SECONDS = 0.1
AVERAGE_SECONDS = 0.005
START_SECONDS = 0.5
_LONG_SECONDS = 0.002
# How often the step looks at the thread that it waits for.
_POLL_SECONDS = 0.02
# Twice as much as where the grammars were tried; see ``work.py``.
_STACK_BYTES = 16 * 2**20
_stack_lock = threading.Lock()


def start_thread(name: str, body: Callable[[], None]) -> threading.Thread:
    """A daemon thread with room for XGrammar's recursion.

    Its priority is normal: a low one could hold the interpreter's lock while it gets no processor.
    """
    thread = threading.Thread(target=body, name=name, daemon=True)
    with _stack_lock:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return thread


@dataclass(slots=True, weakref_slot=True, eq=False)
class CompiledGrammar:
    """A grammar in this process; requests that use it hold it."""

    grammar: xgrammar.CompiledGrammar
    num_bytes: int


class GrammarMatcher:
    """How far one sequence's output has got in its grammar.

    After the text is complete only end-of-sequence tokens may follow, and after one of those only more of them: a
    grammar ends the output whatever ``ignore_eos`` and ``min_new_tokens`` say, because there is nothing left that
    it admits.

    Attributes:
        compiled: its grammar.
        error: why the sequence cannot go on; None while it can.
    """

    def __init__(
        self, compiled: CompiledGrammar, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        self.compiled = compiled
        self.error: str | None = None
        self._matcher: xgrammar.GrammarMatcher | None = None
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._eos_bits_W: Tensor | None = None
        self._avoided: tuple[int, ...] = ()
        self._avoided_bits_W: Tensor | None = None
        self._noted: list[int] = []
        self._num_tokens = 0
        self._seconds = 0.0

    def note(self, token_id: int) -> None:
        """Note the token with which the output goes on; the matcher advances when the next mask is wanted."""
        self._noted.append(token_id)

    def fill(self, bits_GW: Tensor, row: int, avoid: tuple[int, ...] = ()) -> None:
        """Write the tokens that may come next into ``bits_GW[row]``: bit t % 32 of word t // 32.

        Args:
            bits_GW: int32 on the CPU, contiguous, W = ceil(vocab_size / 32).
            avoid: tokens to leave out, unless that leaves nothing (min_new_tokens; the grammar wins).
        """
        matcher = self._caught_up()
        if matcher.is_terminated():
            if self._eos_bits_W is None:
                self._eos_bits_W = _token_bits(self._eos_token_ids, self._vocab_size)
            bits_GW[row] = self._eos_bits_W
            return
        if not matcher.fill_next_token_bitmask(bits_GW, row):
            # Every token is admitted, and the row may not have been written.
            bits_GW[row] = -1
        if not avoid:
            return
        if self._avoided_bits_W is None or avoid != self._avoided:
            self._avoided, self._avoided_bits_W = avoid, _token_bits(avoid, self._vocab_size)
        left_W = bits_GW[row] & ~self._avoided_bits_W
        if left_W.any():
            bits_GW[row] = left_W

    def begin(self) -> float:
        """Called before ``fill``: the processor time that it may take, with the tokens that were noted."""
        self._num_tokens += len(self._noted)
        return MASK_SECONDS + AVERAGE_SECONDS * len(self._noted)

    def charge(self, seconds: float) -> None:
        """Count the processor time that ``fill`` has taken; sets ``error`` if it is too much together."""
        self._seconds += seconds
        if self._seconds > START_SECONDS + AVERAGE_SECONDS * self._num_tokens:
            self.error = TOO_SLOW

    def _caught_up(self) -> xgrammar.GrammarMatcher:
        if self._matcher is None:
            import xgrammar

            self._matcher = xgrammar.GrammarMatcher(self.compiled.grammar)
        noted, self._noted = self._noted, []
        for token_id in noted:
            if not self._accept(self._matcher, token_id):
                raise ValueError(f"it does not admit output token {token_id}")
        return self._matcher

    def _accept(self, matcher: xgrammar.GrammarMatcher, token_id: int) -> bool:
        if matcher.is_terminated():
            return token_id in self._eos_token_ids
        return matcher.accept_token(token_id)


TOO_SLOW = (
    f"following the grammar takes too long; allowed: {MASK_SECONDS:g} s of processor time for a token, "
    f"{AVERAGE_SECONDS:g} s on the average"
)


@dataclass(slots=True)
class _Masks:
    """The rows of one step that have grammars, while a thread computes their masks.

    Attributes:
        index: the row that is computed now.
        ends: processor time of the thread when it must be done with that row; infinity between rows.
        moving: held while the thread goes from row to row.
        is_abandoned: nobody waits for the rows behind this one.
        done: held until every row is computed.
    """

    bits_MW: Tensor
    rows: Sequence[tuple[GrammarMatcher, tuple[int, ...]]]
    index: int
    ends: float = math.inf
    moving: threading.Lock = field(default_factory=threading.Lock)
    is_abandoned: bool = False
    done: threading.Lock = field(default_factory=threading.Lock)


class MaskFiller:
    """Computes masks on a thread of its own, which starts with the first one."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._tasks: queue.SimpleQueue[_Masks | None] = queue.SimpleQueue()

    def fill(
        self, bits_MW: Tensor, rows: Sequence[tuple[GrammarMatcher, tuple[int, ...]]]
    ) -> Tensor:
        """Masks of sequences, one row of bits each; those of sequences with an ``error`` stay 0.

        Args:
            bits_MW: zeros, int32, on the CPU.
            rows: matchers, and tokens to avoid.

        Returns:
            ``bits_MW``, or a copy if a thread that takes too long may still write there.
        """
        first = 0
        while first < len(rows):
            masks = _Masks(bits_MW, rows, first)
            masks.done.acquire()
            thread = self._running()
            self._tasks.put(masks)
            if self._wait(masks, thread):
                break
            slow = masks.index
            bits_MW = bits_MW.clone()
            bits_MW[slow:] = 0
            # It ends with that row.
            self._thread, self._tasks = None, queue.SimpleQueue()
            for matcher, _ in rows[slow:]:
                # Others of the same grammar are about to take as long, one after the other.
                if matcher.compiled is rows[slow][0].compiled:
                    matcher.error = TOO_SLOW
            first = slow + 1
        return bits_MW

    def close(self) -> None:
        """End the thread."""
        self._tasks.put(None)
        self._thread = None

    def _running(self) -> threading.Thread:
        if self._thread is None:
            tasks = self._tasks
            self._thread = start_thread("masks", lambda: _fill_masks(tasks))
        return self._thread

    def _wait(self, masks: _Masks, thread: threading.Thread) -> bool:
        """False if a row takes too long; ``masks.index`` says which."""
        assert thread.ident is not None
        while not masks.done.acquire(timeout=_POLL_SECONDS):
            index, ends = masks.index, masks.ends
            if _processor_seconds(thread.ident) <= ends:
                continue
            with masks.moving:
                if (index, ends) == (masks.index, masks.ends):
                    masks.is_abandoned = True
                    return False
        return True


@torch.inference_mode()  # so are the steps whose tensors it writes to, and that is a state of each thread
def _fill_masks(tasks: queue.SimpleQueue[_Masks | None]) -> None:
    """Body of the thread."""
    while (masks := tasks.get()) is not None:
        # What a row takes is read off the wall's clock, which is cheap, and off the processor's if that is much.
        processor, last = time.thread_time(), time.perf_counter()
        for index in range(masks.index, len(masks.rows)):
            matcher, avoid = masks.rows[index]
            if matcher.error is not None:
                continue
            allowed = matcher.begin()
            with masks.moving:
                if masks.is_abandoned:
                    return
                masks.index, masks.ends = index, processor + allowed
            try:
                matcher.fill(masks.bits_MW, index, avoid)
            except Exception as error:  # noqa: BLE001  # whatever it is, that row's grammar is at fault
                matcher.error = f"the grammar cannot be followed: {error}"
                masks.bits_MW[index] = 0
            now = time.perf_counter()
            seconds, last = now - last, now
            if seconds > _LONG_SECONDS:
                seconds = max(time.thread_time() - processor, 0.0)
            processor += seconds
            matcher.charge(seconds)
            if seconds > allowed:
                matcher.error = TOO_SLOW
        with masks.moving:
            if masks.is_abandoned:
                return
            masks.ends = math.inf
        masks.done.release()


def _processor_seconds(thread_ident: int) -> float:
    """Of a thread, on the clock that is its own ``time.thread_time``; infinity if it has ended."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return 0.0  # never late: what took too long is found afterwards
    try:
        return time.clock_gettime(time.pthread_getcpuclockid(thread_ident))
    except OSError:
        return math.inf


def _token_bits(token_ids: tuple[int, ...], vocab_size: int) -> Tensor:
    """Int32 words [W] with the bits of the given tokens set."""
    bits_V = np.zeros((vocab_size + 31) // 32 * 32, dtype=np.uint8)
    bits_V[list(token_ids)] = 1
    return torch.from_numpy(np.packbits(bits_V, bitorder="little").view(np.int32))
