"""Who leaves for whom, compared with looking at everything."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikeet.adapters.rank_pages import RankPageAllocator
from lorikeet.adapters.residency import AdapterAdmission, Residency
from lorikeet.adapters.tiers import Resident, Tier
from tests.support.count_operations import count_operations
from tests.support.residency_rig import has_host_room
from tests.support.slow_placement import SlowPages, leaving, victims

ELEMS, SLAB, MOST = (7, 24, 40), 120, (5, 9, 2)
NUM_ADAPTERS = 3


class Shadow:
    """A residency, and the slow form of what it decides beside it.

    Args:
        max_host: of the residency.
        num_slots: of the device, the base model's not counted.
    """

    def __init__(self, policy: str, max_host: int | None, num_slots: int) -> None:
        per_slab = [SLAB // elems for elems in ELEMS]
        reserved = [-(-NUM_ADAPTERS * n // per) for n, per in zip(MOST, per_slab, strict=True)]
        sizes = (ELEMS, SLAB, sum(reserved), reserved)
        self.policy = policy
        self.max_host = max_host
        self.num_slots = num_slots
        self.slow = SlowPages(*sizes)
        self.residency = Residency(
            allocator=RankPageAllocator(*sizes),
            num_slots=1 + num_slots,
            policy=policy,
            max_pinned=NUM_ADAPTERS - 1,
            max_host=max_host,
            clock=lambda: 0.0,
        )
        self.wanted: list[int] = []
        self.num_compared = 0

    @property
    def entries(self) -> dict[int, Resident]:
        return self.residency._entries

    def order(self, version: int, *, device: bool) -> list[int]:
        """Who may leave for a version."""
        wanted = {version: place for place, version in enumerate(self.wanted)}
        place = -1 if self.entries[version].pinned else wanted.get(version, len(wanted))
        return leaving(self.entries.values(), wanted, self.policy, place, device=device)

    def admit(self, version: int) -> None:
        entry, before = self.entries[version], {v: e.tier for v, e in self.entries.items()}
        pages = {v: e.pages for v, e in self.entries.items()}
        expected: list[int] | None = []
        if entry.tier is Tier.HOST:
            order = [self.entries[v] for v in self.order(version, device=True)]
            has_slot = len(self.residency.device.placed) < self.num_slots
            expected = victims(self.slow, order, entry, has_slot=has_slot)
        elif entry.tier is Tier.DISK:
            held = sum(tier not in (Tier.DISK, Tier.FAILED) for tier in before.values())
            if self.max_host is not None and held >= self.max_host:
                expected = self.order(version, device=False)[:1] or None
        answer = self.residency.admit(version)
        if entry.tier is Tier.DEVICE:
            assert answer is AdapterAdmission.READY
            return
        assert (answer is AdapterAdmission.NO_ROOM) == (expected is None)
        self.num_compared += expected is None or bool(expected)
        gone = {v for v, e in self.entries.items() if v != version and e.tier is not before[v]}
        assert gone == set(expected or ())
        for victim in gone:
            self.slow.free(pages[victim])
        if entry.tier is Tier.COPYING and before[version] is Tier.HOST:
            self.slow.alloc(entry.page_classes, entry.pages)

    def end_copy(self, version: int, *, ok: bool) -> None:
        pages = self.entries[version].pages
        self.residency.copies_done([version] if ok else [], [] if ok else [version])
        if not ok:
            self.slow.free(pages)

    def do_something(self, rng: random.Random) -> None:
        residency = self.residency
        match rng.randrange(6):
            case 0 | 1:
                self.admit(rng.choice(list(self.entries)))
            case 2:
                for copying in self.of(Tier.COPYING):
                    if rng.random() < 0.7:
                        self.end_copy(copying, ok=rng.random() < 0.8)
            case 3:
                for used in list(self.entries):
                    if residency.num_uses(used) and rng.random() < 0.6:
                        residency.release(used)
            case 4:
                for reading in self.of(Tier.READING):
                    residency.read_done(reading, page_classes(rng))
            case _:
                self.wanted = rng.sample(list(self.entries), rng.randint(0, 4))
                residency.ledger.want(self.wanted)
                self.pin(rng.choice(list(self.entries)), rng)

    def pin(self, version: int, rng: random.Random) -> None:
        """Unpin what is pinned; now and then pin something."""
        pinned = sum(entry.pinned for entry in self.entries.values())
        if self.entries[version].pinned:
            self.residency.set_pinned(version, pinned=False)
        elif rng.random() < 0.2 and pinned < NUM_ADAPTERS - 1:
            self.residency.set_pinned(version, pinned=True)

    def of(self, *tiers: Tier) -> list[int]:
        return [version for version, entry in self.entries.items() if entry.tier in tiers]


def page_classes(rng: random.Random) -> list[int]:
    return [c for c, most in enumerate(MOST) for _ in range(rng.randint(0, most))] or [0]


@pytest.mark.parametrize("policy", ["lru", "fifo"])
@pytest.mark.parametrize(("max_host", "num_slots"), [(None, 12), (None, 3), (5, 4), (8, 12)])
@settings(max_examples=25)
@given(rng=st.randoms(use_true_random=False))
def test_choices_agree_with_looking_at_everything(
    policy: str, max_host: int | None, num_slots: int, rng: random.Random
) -> None:
    shadow = Shadow(policy, max_host, num_slots)
    residency = shadow.residency
    for version in range(1, 13):
        if has_host_room(residency):
            residency.add(version, page_classes(rng))
    for _ in range(60):
        shadow.do_something(rng)
        residency.host.take_drops()
        residency.take_reads()
        residency.check_integrity()


def test_the_comparison_sees_evictions() -> None:
    """The test above compares something: in one run of it adapters leave."""
    rng = random.Random(1)
    shadow = Shadow("lru", None, 12)
    for version in range(1, 13):
        shadow.residency.add(version, page_classes(rng))
    for _ in range(40):
        version = rng.randint(1, 12)
        shadow.admit(version)
        for copying in shadow.of(Tier.COPYING):
            shadow.end_copy(copying, ok=True)
    assert shadow.num_compared > 10


def test_a_placement_costs_the_same_among_hundreds() -> None:
    """Of those that are on the device: one leaves, one comes."""
    counts: list[int] = []
    for num_slots in (30, 600):
        allocator = RankPageAllocator((10, 20), 40, num_slots, [num_slots // 2] * 2)
        residency = Residency(
            allocator=allocator, num_slots=1 + num_slots, policy="lru", max_pinned=0
        )
        for version in range(1, num_slots + 2):
            residency.add(version, [0, 0, 1])
        for version in range(1, num_slots + 1):
            assert residency.admit(version) is AdapterAdmission.WAIT
            residency.copies_done([version], [])
        residency.take_decisions()
        before = residency.device.num_evictions
        version = num_slots + 1
        count, answer = count_operations(lambda r=residency, v=version: r.admit(v))
        assert answer is AdapterAdmission.WAIT
        assert residency.device.num_evictions == before + 1
        counts.append(count)
    assert counts[1] <= counts[0] + 10, counts
