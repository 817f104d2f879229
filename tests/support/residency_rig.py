"""A small residency, and the way of a version through it."""

from __future__ import annotations

from typing import Any

from lorikeet.adapters.rank_pages import RankPageAllocator
from lorikeet.adapters.residency import AdapterAdmission, Residency
from lorikeet.adapters.tiers import FIRST

READY, WAIT, NO_ROOM = AdapterAdmission.READY, AdapterAdmission.WAIT, AdapterAdmission.NO_ROOM


def make(
    *,
    num_slots: int = 3,
    num_pages: int = 4,
    policy: str = "lru",
    max_pinned: int = 1,
    max_host: int | None = None,
    **options: Any,
) -> Residency:
    """A pool of pages of 10 elements, one to a slab."""
    allocator = RankPageAllocator((10,), 10, num_pages, [num_pages])
    return Residency(
        allocator=allocator,
        num_slots=num_slots,
        policy=policy,
        max_pinned=max_pinned,
        max_host=max_host,
        **options,
    )


def bring(residency: Residency, *versions: int) -> None:
    """To the device, and into use."""
    for version in versions:
        assert residency.admit(version) is WAIT
        residency.copies_done([version], {})
        assert residency.admit(version) is READY


def use(residency: Residency, version: int) -> None:
    """Copy, admit, run, release."""
    if not residency.is_resident(version):
        assert residency.admit(version) is WAIT
        residency.copies_done([version], {})
    assert residency.admit(version) is READY
    residency.release(version)


def has_host_room(residency: Residency) -> bool:
    """Whether there is or can be made room in host memory for a version that is loaded."""
    host = residency.host
    is_free = host._max_host is None or host._num_held < host._max_host
    return is_free or any(residency.ledger.leaving_host(FIRST))
