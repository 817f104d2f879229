"""Which waiting sequence is admitted next, and why nobody waits for ever.

**Room for adapters.** At most ``max_loras_per_batch`` adapters run at a time, and the device and host memory have to hold
them. A sequence whose adapter has no room is *blocked*: it waits alone and others pass it. Sequences of the base model
are never blocked, and their passing harms nobody who waits for an adapter's room.

**On its way.** A sequence whose adapter is being read or copied waits alone, too, but is not blocked: what it waits
for is time, and holding others back would not make it shorter. The same holds while its adapter stands in line for being
read, since only so many adapters are read at a time, in the order of the queue. A copy takes milliseconds and a slot; so
that its sequence finds the way open, an adapter that is being copied counts as running for those who stand behind it.

**The bound.** Requests that name an adapter are numbered as they arrive (``Sequence.serial``). Let b be the oldest
blocked one. Another is admitted before it only if ``serial <= b.serial + max_passes``. Every blocked sequence c has
``c.serial >= b.serial``, so whoever passes c has a serial in ``(c.serial, c.serial + max_passes]`` or came before it:
**while a request waits for room, no more than max_passes later ones that name an adapter pass it**, however often it
becomes blocked. When that window is used up, running sequences end one after the other until there is room, and b is
first in line for it. What was read or copied for it stays until it ran, unless one that stands before it needs the room
(``adapters/residency.py``); since that one was asked first, unless it was waiting for its turn then, it seldom comes again.

**Draining.** So that b seldom waits that long, one adapter, the one with the fewest running sequences, stops admitting
requests later than ``b.serial + max_passes // 8``. It falls idle soon and b takes its place, while the other adapters
keep their rows full.

**Longest prefix first** (``lpm``) reorders only among sequences that could run now, and within the same kind of window:
let o be the one that ``fcfs`` would choose. Another goes before it only if ``arrival <= o.arrival + max_passes``. So no
request that could run is passed by more than max_passes later ones of its length class or a longer one. Preempted
sequences keep their place in front.

**Shorter ones first.** For half of a step the scheduler asks for the shortest length class alone (``next(most)``;
``scheduler/scheduler.py`` says why nobody starves by that). Those that pass then wait for room like everybody else, and
the rules above hold for them. They take neither the last row nor pages that somebody was refused: the last row is for
the first in line; and when pages were short for p, only shorter classes than p's are asked, and of those only
``arrival <= p.arrival + max_passes``, and nobody if p was preempted. So **while a request waits for pages, no more than
max_passes later ones pass it**; then running sequences end, or are preempted by older ones, until it fits.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Protocol

from lorikeet.adapters.tiers import Tier
from lorikeet.core.sequence import Sequence
from lorikeet.scheduler.limits import SchedulerLimits, StepBudget
from lorikeet.scheduler.queue import RunningSet, WaitingQueue

# Sequences per adapter whose prefixes lpm compares; a match costs about 10 us for a prompt of 1,000 tokens.
_LPM_WINDOW = 16
# A pool that has no room for several adapters in a row seldom has it for the next; do not walk over hundreds.
_MAX_REFUSALS = 16
_ON_ITS_WAY = frozenset({Tier.READING, Tier.COPYING})


class Adapters(Protocol):
    """What admission asks of the residency."""

    @property
    def num_free_reads(self) -> int:
        """How many more adapters may be read at this moment."""
        ...

    def tier(self, version: int) -> Tier: ...

    def take_ended_reads(self) -> Iterable[int]:
        """Versions whose read has ended since the last call."""
        ...


class Admission:
    """Remembers between steps which adapter is draining, and which are being read; opens a round per step.

    Those that are read, or stand in line for it, are off the queue's list of heads until something has changed for them,
    so that a step costs nothing for the hundreds of them that a burst brings.

    Attributes:
        off: versions that are off the list.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        queue: WaitingQueue,
        running: RunningSet,
        match: Callable[[Sequence], int],
        adapters: Adapters,
    ) -> None:
        self.limits = limits
        self.queue = queue
        self.running = running
        self.match = match
        self.adapters = adapters
        self.off: set[int] = set()
        self._draining = 0
        # (order, version) of those whose adapters are on disk and stand in line for being read.
        self._unread: list[tuple[int, int]] = []

    def note_reads(self) -> None:
        """List those again whose adapters are not being read any more, and those that may be read now."""
        for version in self.adapters.take_ended_reads():
            self._offer(version)
        num_free = self.adapters.num_free_reads
        while num_free > 0 and self._unread:
            _, version = heapq.heappop(self._unread)
            # Otherwise it is listed already.
            if version in self.off and self.queue.head(version) is not None:
                num_free -= self.adapters.tier(version) is Tier.DISK
            self._offer(version)

    def waits_for_read(self, version: int) -> None:
        """A version that waits is being read or has to wait until others are: take it off the list."""
        head = self.queue.head(version)
        self.off.add(version)
        if self.adapters.tier(version) is not Tier.READING and head is not None:
            heapq.heappush(self._unread, (head.order, version))

    def is_off(self, version: int) -> bool:
        """True if the heads of a version are off the queue's list, to be offered again later."""
        return version in self.off

    def _offer(self, version: int) -> None:
        self.off.discard(version)
        self.queue.offer(version)

    def draining(self) -> int:
        """The adapter that gives its place to a blocked sequence; chosen again when it has fallen idle."""
        counts = self.running.num_of_version
        if self._draining not in counts:
            self._draining = min(counts, key=lambda version: counts[version], default=0)
        return self._draining


class Round:
    """Admission in one step: ask ``next``, then admit the sequence, ``park`` or ``refuse`` it; ``close`` at the end."""

    def __init__(self, admission: Admission, budget: StepBudget) -> None:
        self._admission = admission
        self._limits = admission.limits
        self._queue = admission.queue
        self._running = admission.running
        self._budget = budget
        # Adapters that are not to be asked for in this round, and those of them that come back into line at its end.
        self._out: set[int] = set(admission.off)
        self._aside: list[int] = []
        self._blocked: Sequence | None = None
        self._num_refused = 0
        self._lengths: dict[int, int] = {}
        # Sequences that were refused pages.
        self._short: list[Sequence] = []

    def next(self, most: int | None = None) -> Sequence | None:
        """The waiting sequence to try next, of the length classes up to ``most`` (None: all); None if nobody may run."""
        if most is not None and self._budget.sequences == 1:
            first = self.next()
            return first if first is not None and first.length_class <= most else None
        if not self._short:
            return self._pick(most)
        # Sequences that were refused pages hold up nobody in front of them; behind them only shorter ones may pass.
        found = self._pick(most)
        if found is None or found.order < min(seq.order for seq in self._short):
            return found
        shorter = min(-1 if seq.order < 0 else seq.length_class - 1 for seq in self._short)
        return self._pick(shorter if most is None else min(most, shorter))

    def refuse(self, seq: Sequence) -> None:
        """There is no room for the adapter of ``seq``, which ``next`` returned."""
        # All who wait for that adapter are blocked, longer ones included.
        head = self._queue.head(seq.version) or seq
        if self._blocked is None or head.order < self._blocked.order:
            self._blocked = head
        self._num_refused += 1
        self._set_aside(seq)

    def park(self, seq: Sequence) -> None:
        """The adapter of ``seq``, which ``next`` returned, is on its way now."""
        if self._admission.adapters.tier(seq.version) is Tier.COPYING:
            self._set_aside(seq)
            self._budget.adapters -= 1
        else:
            self._out.add(seq.version)
            self._admission.waits_for_read(seq.version)

    def short_of_pages(self, seq: Sequence) -> None:
        """There are no pages for ``seq``, which waits."""
        self._short.append(seq)

    def close(self) -> None:
        """Put those that were set aside back in line."""
        for version in self._aside:
            self._queue.offer(version)

    def _pick(self, most: int | None) -> Sequence | None:
        blocked = self._blocked
        if self._budget.adapters <= 0:
            waiting = [seq for seq in (blocked, self._next_idle(None)) if seq is not None]
            blocked = min(waiting, key=lambda seq: seq.order, default=None)
        idle = None
        if self._budget.adapters > 0 and self._num_refused < _MAX_REFUSALS:
            idle = self._next_idle(most)
            # The place of the last adapter may have gone to one that is being copied.
            if self._budget.adapters <= 0:
                return self._pick(most)
        heads = [self._queue.head(0, most), idle]
        heads.extend(self._queue.head(version, most) for version in self._running.num_of_version)
        eligible = [h for h in heads if h is not None and self._may_pass(h, blocked)]
        if not eligible:
            return None
        oldest = min(eligible, key=lambda seq: seq.order)
        if self._limits.policy == "fcfs" or oldest.order < 0:
            return oldest
        return self._longest_match(eligible, oldest, blocked, most)

    def _next_idle(self, most: int | None) -> Sequence | None:
        """First in order among those whose adapter neither runs nor is on its way."""
        running = self._running.num_of_version
        while (idle := self._queue.peek_idle(running, self._out, most)) is not None:
            if self._admission.adapters.tier(idle.version) not in _ON_ITS_WAY:
                return idle
            self.park(idle)
        return None

    def _set_aside(self, seq: Sequence) -> None:
        self._out.add(seq.version)
        self._aside.append(seq.version)

    def _may_pass(self, seq: Sequence, blocked: Sequence | None) -> bool:
        window = self._limits.max_passes
        if any(seq.order > s.order and seq.arrival > s.arrival + window for s in self._short):
            return False
        if blocked is None or seq.version == 0 or seq.order <= blocked.order:
            return True
        if seq.version == self._admission.draining():
            window //= 8
        return seq.serial <= blocked.serial + window

    def _longest_match(
        self,
        heads: list[Sequence],
        oldest: Sequence,
        blocked: Sequence | None,
        most: int | None,
    ) -> Sequence:
        best, best_length = oldest, self._match(oldest)
        for head in heads:
            for seq in self._queue.first(head.version, _LPM_WINDOW, most):
                if seq.arrival > oldest.arrival + self._limits.max_passes:
                    break
                if self._may_pass(seq, blocked) and self._match(seq) > best_length:
                    best, best_length = seq, self._match(seq)
        return best

    def _match(self, seq: Sequence) -> int:
        length = self._lengths.get(seq.id)
        if length is None:
            length = self._lengths[seq.id] = self._admission.match(seq)
        return length
