"""The waiting and the running sequences, by what the decisions ask of them."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from itertools import islice

from lorikeet.core.sequence import Sequence, SequenceState


class WaitingQueue:
    """Sequences that wait, in order, one list per adapter version.

    One list per version, because whatever keeps the first sequence of a version from running for lack of room for
    its adapter keeps the others of that version, too: planning looks at heads and never walks over a queue full of
    sequences that cannot run. Order is that of arrival; preempted sequences stand in front of all others.
    """

    def __init__(self) -> None:
        self._by_version: dict[int, OrderedDict[int, Sequence]] = {}
        # (order, version) of heads. Entries go stale; every waiting version has at least its present one, except
        # while it is taken out by an admission round.
        self._heads: list[tuple[int, int]] = []
        # (order, version) of the head of each waiting adapter version, sorted, never stale.
        self._line: list[tuple[int, int]] = []
        self._num_waiting = 0
        self._next_arrival = 0
        self._next_serial = 0
        self._next_front = -1

    def __len__(self) -> int:
        return self._num_waiting

    def push(self, seq: Sequence) -> None:
        """A new request; gives it its number of arrival and, if it names an adapter, its serial number."""
        seq.arrival = seq.order = self._next_arrival
        self._next_arrival += 1
        if seq.version != 0:
            seq.serial = self._next_serial
            self._next_serial += 1
        self._lane(seq.version)[seq.id] = seq
        self._num_waiting += 1
        if len(self._by_version[seq.version]) == 1:
            self._enter_line(seq)
            self.offer(seq.version)

    def push_front(self, seq: Sequence) -> None:
        """A preempted sequence. Victims come youngest first, so the oldest ends up in front."""
        seq.order = self._next_front
        self._next_front -= 1
        lane = self._lane(seq.version)
        self._leave_line(seq.version)
        self._enter_line(seq)
        lane[seq.id] = seq
        lane.move_to_end(seq.id, last=False)
        self._num_waiting += 1
        self.offer(seq.version)

    def remove(self, seq: Sequence) -> None:
        lane = self._by_version[seq.version]
        was_head = next(iter(lane)) == seq.id
        if was_head:
            self._leave_line(seq.version)
        del lane[seq.id]
        self._num_waiting -= 1
        if not lane:
            del self._by_version[seq.version]
        elif was_head:
            self._enter_line(next(iter(lane.values())))
            self.offer(seq.version)

    def num_of_version(self, version: int) -> int:
        """Waiting sequences of a version."""
        return len(self._by_version.get(version, ()))

    def of_version(self, version: int) -> list[Sequence]:
        """All waiting sequences of a version, in order."""
        lane = self._by_version.get(version)
        return list(lane.values()) if lane else []

    def head(self, version: int) -> Sequence | None:
        """First in order among the sequences of a version."""
        lane = self._by_version.get(version)
        return next(iter(lane.values())) if lane else None

    def first(self, version: int, count: int) -> Iterator[Sequence]:
        """The first ``count`` sequences of a version, in order."""
        lane = self._by_version.get(version)
        return islice(lane.values(), count) if lane else iter(())

    def offer(self, version: int) -> None:
        """List the head of a version (again) for ``pop_idle``."""
        head = self.head(version)
        if head is not None and version != 0:
            heapq.heappush(self._heads, (head.order, version))

    def peek_idle(self, running: Collection[int]) -> Sequence | None:
        """First in order among the heads of adapter versions that are listed and not in ``running``.

        Heads of versions in ``running`` are taken off the list; ``offer`` them when they stop running.
        """
        while self._heads:
            order, version = self._heads[0]
            head = self.head(version)
            if head is not None and head.order == order and version not in running:
                return head
            heapq.heappop(self._heads)
        return None

    def pop_idle(self) -> None:
        """Take what ``peek_idle`` returned off the list, until it is offered again."""
        entry = heapq.heappop(self._heads)
        while self._heads and self._heads[0] == entry:
            heapq.heappop(self._heads)

    def versions(self, count: int) -> list[int]:
        """At most ``count`` waiting adapter versions, in the order of their heads."""
        return [version for _, version in self._line[:count]]

    @property
    def num_versions(self) -> int:
        """Distinct adapter versions that wait."""
        return len(self._by_version) - (0 in self._by_version)

    def sequences(self) -> Iterator[Sequence]:
        for lane in self._by_version.values():
            yield from lane.values()

    def check_integrity(
        self, running: Collection[int], is_off: Callable[[int], bool] = lambda version: False
    ) -> None:
        """Compare counts, orders and the list of heads.

        Args:
            is_off: tells of a version whether somebody keeps it to offer it again.

        Raises:
            AssertionError: names what does not match.
        """
        found = list(self.sequences())
        if len(found) != self._num_waiting:
            raise AssertionError(f"{self._num_waiting} waiting counted, {len(found)} found")
        listed = set(self._heads)
        line = sorted((head.order, v) for v in self._by_version if v and (head := self.head(v)))
        if line != self._line:
            raise AssertionError(f"the line of versions is {self._line}, not {line}")
        for version, lane in self._by_version.items():
            orders = [seq.order for seq in lane.values()]
            if not orders or orders != sorted(orders):
                raise AssertionError(f"version {version} waits in the order {orders}")
            if version in running or version == 0 or is_off(version):
                continue
            if (orders[0], version) not in listed:
                raise AssertionError(f"the head of version {version} is not listed")
        for seq in found:
            if seq.state not in (SequenceState.WAITING, SequenceState.PREEMPTED):
                raise AssertionError(f"sequence {seq.id} waits in state {seq.state}")

    def _enter_line(self, head: Sequence) -> None:
        if head.version:
            insort(self._line, (head.order, head.version))

    def _leave_line(self, version: int) -> None:
        head = self.head(version)
        if head is not None and version:
            del self._line[bisect_left(self._line, (head.order, version))]

    def _lane(self, version: int) -> OrderedDict[int, Sequence]:
        return self._by_version.setdefault(version, OrderedDict())


class RunningSet:
    """Sequences that hold pages, in order of admission, and the adapters they use.

    Attributes:
        prefilling: part of the prompt is still to be planned. All of these were admitted after all of ``decoding``,
            because prompts are planned in order of admission.
        decoding: each step plans one token.
        num_of_version: adapter version -> running sequences; the base model is not listed.
    """

    def __init__(self) -> None:
        self.prefilling: dict[int, Sequence] = {}
        self.decoding: dict[int, Sequence] = {}
        self.num_of_version: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    def add(self, seq: Sequence) -> None:
        seq.enter(SequenceState.PREFILLING)
        self.prefilling[seq.id] = seq
        if seq.version:
            self.num_of_version[seq.version] = self.num_of_version.get(seq.version, 0) + 1

    def start_decoding(self, seq: Sequence) -> None:
        seq.enter(SequenceState.DECODING)
        del self.prefilling[seq.id]
        self.decoding[seq.id] = seq

    def remove(self, seq: Sequence) -> bool:
        """Returns True if its adapter runs in no other sequence."""
        if self.prefilling.pop(seq.id, None) is None:
            del self.decoding[seq.id]
        if not seq.version:
            return False
        self.num_of_version[seq.version] -= 1
        if self.num_of_version[seq.version]:
            return False
        del self.num_of_version[seq.version]
        return True

    def youngest(self) -> Sequence:
        """The sequence admitted last: the victim that loses least work, and never one that others wait behind."""
        return next(reversed((self.prefilling or self.decoding).values()))

    def sequences(self) -> list[Sequence]:
        """All of them, in order of admission."""
        return [*self.decoding.values(), *self.prefilling.values()]
