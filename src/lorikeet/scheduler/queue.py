"""The sequences that wait, are held back, or run, by what the decisions ask of them."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from itertools import islice

from lorikeet.core.sequence import Sequence, SequenceState
from lorikeet.kv.manager import KVManager


class WaitingQueue:
    """Sequences that wait, in order, one queue per adapter version and length class.

    By version, because whatever keeps the first sequence of a version from running for lack of room for its adapter
    keeps the others of that version, too: planning looks at heads and never walks over a queue full of sequences that
    cannot run. By length class, because short prompts may pass long ones. Order is that of arrival; preempted
    sequences stand in front of all others.

    Where a method takes ``most``, sequences of longer classes do not count; None counts everybody.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, dict[int, OrderedDict[int, Sequence]]] = {}
        # By length class: (order, version) of the heads of queues. Entries go stale; each queue of a waiting adapter
        # version has at least its present one, except while it is taken out by an admission round.
        self._heads: dict[int, list[tuple[int, int]]] = {}
        # (order, version) of the head of each waiting adapter version, sorted, never stale.
        self._line: list[tuple[int, int]] = []
        self._num_waiting = 0
        self._num_of_class: dict[int, int] = {}
        self._next_arrival = 0
        self._next_serial = 0
        self._next_front = -1

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def length_classes(self) -> Collection[int]:
        """Length classes of the waiting sequences, in no order."""
        return self._num_of_class.keys()

    def push(self, seq: Sequence) -> None:
        """Add a new request: it gets its arrival number and, if it names an adapter, its serial number."""
        seq.arrival = seq.order = self._next_arrival
        self._next_arrival += 1
        if seq.version != 0:
            seq.serial = self._next_serial
            self._next_serial += 1
        self._insert(seq, in_front=False)

    def push_front(self, seq: Sequence) -> None:
        """Put a preempted sequence in front. Victims come youngest first, so the oldest ends up first."""
        seq.order = self._next_front
        self._next_front -= 1
        self._insert(seq, in_front=True)

    def remove(self, seq: Sequence) -> None:
        queues = self._waiting[seq.version]
        before = self.head(seq.version)
        del queues[seq.length_class][seq.id]
        if not queues[seq.length_class]:
            del queues[seq.length_class]
        if not queues:
            del self._waiting[seq.version]
        self._num_waiting -= 1
        self._num_of_class[seq.length_class] -= 1
        if not self._num_of_class[seq.length_class]:
            del self._num_of_class[seq.length_class]
        self._list_head(seq.version, seq.length_class)
        self._move_in_line(seq.version, before)

    def num_of_version(self, version: int) -> int:
        """Waiting sequences of a version."""
        return sum(map(len, self._waiting.get(version, {}).values()))

    def head(self, version: int, most: int | None = None) -> Sequence | None:
        """First in order among the sequences of a version."""
        return next(self.first(version, 1, most), None)

    def first(self, version: int, count: int, most: int | None = None) -> Iterator[Sequence]:
        """The first ``count`` sequences of a version, in order."""
        queues = [
            queue.values()
            for length_class, queue in self._waiting.get(version, {}).items()
            if most is None or length_class <= most
        ]
        merged = queues[0] if len(queues) == 1 else heapq.merge(*queues, key=lambda seq: seq.order)
        return islice(merged, count)

    def offer(self, version: int) -> None:
        """List the heads of a version (again) for ``peek_idle``."""
        for length_class in self._waiting.get(version, ()):
            self._list_head(version, length_class)

    def peek_idle(
        self, running: Collection[int], aside: Collection[int] = (), most: int | None = None
    ) -> Sequence | None:
        """First in order among the heads of adapter versions that are listed and neither in ``running`` nor ``aside``.

        Heads of versions in these two are taken off the list; ``offer`` them when they leave.
        """
        best = None
        for length_class, heads in self._heads.items():
            if most is not None and length_class > most:
                continue
            head = self._first_listed(length_class, heads, running, aside)
            if head is not None and (best is None or head.order < best.order):
                best = head
        return best

    def versions(self, count: int) -> list[int]:
        """At most ``count`` waiting adapter versions, in the order of their heads."""
        return [version for _, version in self._line[:count]]

    @property
    def num_versions(self) -> int:
        """Distinct adapter versions that wait."""
        return len(self._waiting) - (0 in self._waiting)

    def sequences(self) -> Iterator[Sequence]:
        for queues in self._waiting.values():
            for queue in queues.values():
                yield from queue.values()

    def check_integrity(
        self, running: Collection[int], is_off: Callable[[int], bool] = lambda version: False
    ) -> None:
        """Compare counts, orders and the lists of heads.

        Args:
            is_off: whether a version is off the list because somebody will offer it again.

        Raises:
            AssertionError: names what does not match.
        """
        found = list(self.sequences())
        classes = Counter(seq.length_class for seq in found)
        if len(found) != self._num_waiting or classes != self._num_of_class:
            raise AssertionError(f"{self._num_waiting} waiting counted, {len(found)} found")
        line = sorted((head.order, v) for v in self._waiting if v and (head := self.head(v)))
        if line != self._line:
            raise AssertionError(f"the line of versions is {self._line}, not {line}")
        for version, queues in self._waiting.items():
            for length_class, queue in queues.items():
                orders = [seq.order for seq in queue.values()]
                if not orders or orders != sorted(orders):
                    raise AssertionError(f"version {version} waits in the order {orders}")
                listed = (orders[0], version) in self._heads.get(length_class, ())
                is_out = version in running or version == 0 or is_off(version)
                if not is_out and not listed:
                    raise AssertionError(f"the head of version {version} is not listed")
        for seq in found:
            if seq.state not in (SequenceState.WAITING, SequenceState.PREEMPTED):
                raise AssertionError(f"sequence {seq.id} waits in state {seq.state}")

    def _insert(self, seq: Sequence, *, in_front: bool) -> None:
        before = self.head(seq.version)
        queue = self._waiting.setdefault(seq.version, {}).setdefault(
            seq.length_class, OrderedDict()
        )
        queue[seq.id] = seq
        if in_front:
            queue.move_to_end(seq.id, last=False)
        self._num_waiting += 1
        self._num_of_class[seq.length_class] = self._num_of_class.get(seq.length_class, 0) + 1
        if in_front or len(queue) == 1:
            self._list_head(seq.version, seq.length_class)
        self._move_in_line(seq.version, before)

    def _list_head(self, version: int, length_class: int) -> None:
        queue = self._waiting.get(version, {}).get(length_class)
        if queue and version != 0:
            head = next(iter(queue.values()))
            heapq.heappush(self._heads.setdefault(length_class, []), (head.order, version))

    def _first_listed(
        self,
        length_class: int,
        heads: list[tuple[int, int]],
        running: Collection[int],
        aside: Collection[int],
    ) -> Sequence | None:
        while heads:
            order, version = heads[0]
            queue = self._waiting.get(version, {}).get(length_class)
            head = next(iter(queue.values())) if queue else None
            is_out = version in running or version in aside
            if head is not None and head.order == order and not is_out:
                return head
            heapq.heappop(heads)
        return None

    def _move_in_line(self, version: int, before: Sequence | None) -> None:
        """Move a version in the line, after its head may have changed from ``before`` to another."""
        head = self.head(version)
        if version == 0 or head is before:
            return
        if before is not None:
            del self._line[bisect_left(self._line, (before.order, version))]
        if head is not None:
            insort(self._line, (head.order, version))


class RunningSet:
    """Sequences that hold pages, in order of admission, and the adapters they use.

    Attributes:
        prefilling: part of the prompt is still to be planned; the others decode, each step plans one token of them.
        num_of_version: adapter version -> running sequences; the base model is not listed.
    """

    def __init__(self) -> None:
        self._by_id: dict[int, Sequence] = {}
        self.prefilling: dict[int, Sequence] = {}
        self.num_of_version: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, seq: Sequence) -> None:
        seq.enter(SequenceState.PREFILLING)
        self._by_id[seq.id] = self.prefilling[seq.id] = seq
        if seq.version:
            self.num_of_version[seq.version] = self.num_of_version.get(seq.version, 0) + 1

    def start_decoding(self, seq: Sequence) -> None:
        seq.enter(SequenceState.DECODING)
        del self.prefilling[seq.id]

    def remove(self, seq: Sequence) -> bool:
        """Remove a sequence; True if its adapter runs in no other one."""
        del self._by_id[seq.id]
        self.prefilling.pop(seq.id, None)
        if not seq.version:
            return False
        self.num_of_version[seq.version] -= 1
        if self.num_of_version[seq.version]:
            return False
        del self.num_of_version[seq.version]
        return True

    def youngest(self) -> Sequence:
        """The sequence admitted last: the victim that loses least work, and never one that others wait behind."""
        return next(reversed(self._by_id.values()))

    def first_prefilling(self, most: int | None = None) -> Sequence | None:
        """First in the order of the queue among those whose prompt is under way, of length classes up to ``most``."""
        found = [
            seq for seq in self.prefilling.values() if most is None or seq.length_class <= most
        ]
        return min(found, key=lambda seq: seq.order, default=None)

    def decoding(self) -> list[Sequence]:
        """Those that decode, in order of admission."""
        return [seq for seq in self._by_id.values() if seq.id not in self.prefilling]

    def sequences(self) -> list[Sequence]:
        """All of them, in order of admission."""
        return list(self._by_id.values())

    def check_integrity(self, kv: KVManager, *, has_steps: bool) -> None:
        """Compare the sequences' counts with each other and with the pages that they hold.

        Args:
            has_steps: plans are in flight, so that tokens may be on their way.

        Raises:
            AssertionError: names what does not match.
        """
        if kv.sequences() != set(self._by_id):
            raise AssertionError("page tables are not those of the running sequences")
        for seq in self._by_id.values():
            reach = max(seq.num_scheduled, seq.num_tokens)
            # A sampled token that is not scheduled yet needs a page only when it is computed.
            least = kv.pages_for(seq.num_scheduled)
            if not least <= len(kv.page_table(seq.id)) <= kv.pages_for(reach):
                raise AssertionError(f"sequence {seq.id}: the page table does not fit its tokens")
            decoding = seq.id not in self.prefilling
            if decoding and seq.num_scheduled != seq.num_tokens + seq.num_pending - 1:
                raise AssertionError(f"sequence {seq.id}: {seq.num_scheduled} tokens scheduled")
            if not has_steps and seq.num_pending:
                raise AssertionError(f"sequence {seq.id} waits for a token that nobody samples")


def most_following(max_running: int) -> int:
    """How many completions that are not the first of their call may wait in the queue or run at a time.

    An eighth of the rows is left for others. Less would soon be taken by a few of them; more would cost a call that is
    alone more of its speed.
    """
    return max_running - max_running // 8


class CallShares:
    """Room for others beside a call that asks for many completions: sequences that are held back, by call.

    Whoever waits behind a thousand completions of one call would wait until most of them have run. So only the first
    completion of a call goes to the queue at once; those that follow do so while fewer than a limit of such ones wait or
    run, one of each call in turn. What is left of the rows is always for calls that have none.

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
