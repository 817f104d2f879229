"""Room for others beside a call that asks for many completions.

Whoever waits behind a thousand completions of one call would wait until most of them have run. So only the first completion
of a call goes to the queue at once; those that follow do so while fewer than a limit of such ones wait or run, one of each call
in turn. What is left of the rows is always for calls that have none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from lorikeet.core.sequence import Sequence


def most_following(max_running: int) -> int:
    """How many completions that are not the first of their call may wait in the queue or run at a time.

    An eighth of the rows is left for others. Less would soon be taken by a few of them; more would cost a call that is
    alone more of its speed.
    """
    return max_running - max_running // 8


class CallShares:
    """Sequences that are held back for the sake of others, by call.

    Args:
        limit: sequences that follow the first of their calls and are not held back.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: OrderedDict[int, OrderedDict[int, Sequence]] = OrderedDict()
        self._num_held = 0
        self._let_in: set[int] = set()

    def __len__(self) -> int:
        """How many are held back."""
        return self._num_held

    def take(self, seq: Sequence) -> bool:
        """True if a new sequence may go to the queue now; else it is held back until ``next`` returns it."""
        if seq.call is None or seq.call == seq.id:
            return True
        if len(self._let_in) < self._limit and not self._held:
            self._let_in.add(seq.id)
            return True
        self._held.setdefault(seq.call, OrderedDict())[seq.id] = seq
        self._num_held += 1
        return False

    def next(self) -> Sequence | None:
        """The next one that may go to the queue; None if there is none, or no room for one more."""
        if not self._held or len(self._let_in) >= self._limit:
            return None
        call, line = self._held.popitem(last=False)
        _, seq = line.popitem(last=False)
        if line:
            self._held[call] = line  # at the end: the others' turn
        self._num_held -= 1
        self._let_in.add(seq.id)
        return seq

    def forget(self, seq: Sequence) -> bool:
        """A sequence has ended. Returns whether it was held back until now."""
        self._let_in.discard(seq.id)
        line = self._held.get(seq.call) if seq.call is not None else None
        if line is None or line.pop(seq.id, None) is None:
            return False
        if not line:
            del self._held[seq.call]  # pyright: ignore[reportArgumentType]
        self._num_held -= 1
        return True

    def sequences(self) -> Iterator[Sequence]:
        """Those that are held back."""
        for line in self._held.values():
            yield from line.values()
