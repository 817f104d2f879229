"""Room, order of leaving and victims, each by looking at everything: what the counters and lines must agree with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lorikeet.adapters.tiers import Resident, Tier


class SlowPages:
    """Which pages are in use, and by which class; as ``RankPageAllocator`` is told."""

    def __init__(
        self,
        class_elems: Sequence[int],
        slab_elems: int,
        num_slabs: int,
        reserved_slabs: Sequence[int],
    ) -> None:
        self.slab_elems = slab_elems
        self.per_slab = [slab_elems // elems for elems in class_elems]
        self.num_slabs = num_slabs
        self.reserved = list(reserved_slabs)
        self.used: dict[int, int] = {}  # offset -> class

    def alloc(self, classes: Sequence[int], offsets: Sequence[int]) -> None:
        assert self.used.keys().isdisjoint(offsets)
        self.used.update(zip(offsets, classes, strict=True))

    def free(self, offsets: Iterable[int]) -> None:
        for offset in offsets:
            del self.used[offset]

    def fits(self, classes: Sequence[int], freed: Iterable[int] = ()) -> bool:
        """Count the slabs and pages that are left when the pages at ``freed`` are free."""
        gone = set(freed)
        left = {o: c for o, c in self.used.items() if o not in gone}
        slabs: dict[int, tuple[int, int]] = {}
        for offset, page_class in left.items():
            slab = offset // self.slab_elems
            assert slabs.get(slab, (page_class, 0))[0] == page_class, "two classes in a slab"
            slabs[slab] = (page_class, slabs.get(slab, (page_class, 0))[1] + 1)
        num_free = self.num_slabs - len(slabs)
        loose = [0] * len(self.per_slab)
        held = [0] * len(self.per_slab)
        for page_class, count in slabs.values():
            held[page_class] += 1
            loose[page_class] += self.per_slab[page_class] - count
        for page_class, count in Counter(classes).items():
            short = max(0, count - loose[page_class])
            num_claimed = -(-short // self.per_slab[page_class])
            num_free -= num_claimed
            held[page_class] += num_claimed
        return num_free >= sum(
            max(0, reserved - count) for reserved, count in zip(self.reserved, held, strict=True)
        )


def leaving(
    entries: Iterable[Resident], wanted: dict[int, int], policy: str, place: int, *, device: bool
) -> list[int]:
    """Versions that may leave for one that stands at ``place``, in the order in which they go."""

    def rank(entry: Resident) -> tuple[bool, int, int, int]:
        since = entry.since if device else entry.host_since
        age = entry.last_use if policy == "lru" else since
        at = wanted.get(entry.version)
        return (at is not None, -(at or 0), age, entry.version)

    tiers = {Tier.DEVICE} if device else {Tier.HOST, Tier.DEVICE}
    idle = [
        entry
        for entry in entries
        if entry.tier in tiers
        and not (entry.uses or entry.pinned or entry.removed)
        and wanted.get(entry.version, place + 1) > place
    ]
    return [entry.version for entry in sorted(idle, key=rank)]


def victims(
    pages: SlowPages, order: Sequence[Resident], entry: Resident, *, has_slot: bool
) -> list[int] | None:
    """Whom to evict for ``entry``: the first of ``order`` that are enough, without those that can stay."""

    def has_room(gone: Sequence[Resident]) -> bool:
        freed = [page for victim in gone for page in victim.pages]
        return (has_slot or bool(gone)) and pages.fits(entry.page_classes, freed)

    chosen: list[Resident] = []
    for victim in [None, *order]:
        chosen += [victim] if victim is not None else []
        if has_room(chosen):
            break
    else:
        return None
    for victim in chosen[:-1][::-1]:
        others = [other for other in chosen if other is not victim]
        if has_room(others):
            chosen = others
    return [victim.version for victim in chosen]
