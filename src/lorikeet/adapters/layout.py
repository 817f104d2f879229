"""How the adapter pool is divided: page classes, slabs, and how much of them the default budget needs.

A *page* holds ``page_ranks`` ranks of one slice of one site. Its row r is ``concat(A[r, :], B[:, r])``, so a page of a
slice with K inputs and O outputs has ``page_ranks * (K + O)`` elements. Slices with equal K + O share a *page class*:
their pages are interchangeable. The pool is one flat buffer, cut into *slabs* of equal size; a slab holds pages of one
class at a time and returns to the common list when its last page is freed.

**Why the default budget always suffices.** The promise is: any ``max_loras_per_batch`` adapters within the limits fit
together, whatever was in the pool before. Let a full adapter (largest rank, every enabled module) need P_c pages of
class c, let a slab hold n_c of them, and let M be ``max_loras_per_batch``. Pages of one class are interchangeable, so
a class that may hold ``Q_c = ceil(M P_c / n_c)`` slabs never turns away the M-th adapter: the other M - 1 in use hold
at most ``(M - 1) P_c`` pages, and everything not in use can be evicted. What could break the promise is another class
holding those slabs, one page in use in each. Therefore Q_c slabs are *reserved* for class c: a class takes a free slab
beyond its own Q only while the free slabs outnumber what the other classes may still claim. The pool has the sum of
all Q_c slabs, and that keeps ``free slabs >= sum of max(0, Q_c - held by c)`` true for good: a claim within Q lowers
both sides by one, a claim beyond Q needs a strict inequality, and a freed slab adds one to the left and at most one to
the right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lorikeet.adapters.targets import ModuleKey
from lorikeet.core.sites import LoRASite

# The smallest rank that is common: a rank-8 adapter pads nothing, and kernels find the page of a rank as fast with 8.
PAGE_RANKS = 8

# Resident adapters beyond this gain nothing that the pages would not limit first; it bounds the page tables.
_MAX_RESIDENT = 1024
# Larger slabs waste less at their ends, smaller ones are shared more freely: the first size within this of the ideal.
_ACCEPTED_WASTE = 1.05
_MAX_PAGES_OF_LARGEST_CLASS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLayout:
    """Sizes of the adapter pool; everything counts elements, not bytes, unless it says so.

    Attributes:
        targets: names of the modules that adapters may change.
        classes: class of the pages of each slice that adapters may change, by (site, part).
        class_elems: size of a page of each class, ascending.
        slab_elems: size of a slab.
        reserved_slabs: slabs that each class can claim whatever the others do; see the module's docstring.
        num_slots: rows of the page tables; slot 0 is the base model.
        max_pages_per_slice: pages that a slice of an adapter of ``max_rank`` has.
    """

    page_ranks: int
    max_rank: int
    max_loras_per_batch: int
    element_size: int
    targets: frozenset[str]
    classes: dict[ModuleKey, int]
    class_elems: tuple[int, ...]
    slab_elems: int
    reserved_slabs: tuple[int, ...]
    num_slots: int
    max_pages_per_slice: int

    @classmethod
    def make(
        cls,
        sites: Sequence[LoRASite],
        targets: frozenset[str],
        *,
        max_rank: int,
        max_loras_per_batch: int,
        element_size: int,
        page_ranks: int = PAGE_RANKS,
    ) -> PoolLayout:
        """Lay out a pool for ``max_loras_per_batch`` adapters of ``max_rank`` on all enabled modules.

        Args:
            sites: as this rank holds them (:func:`lorikeet.lora.pool_plan.shard_site`).
            element_size: bytes per element.

        Raises:
            ValueError: a target that no site has, no target at all, or a number below 1.
        """
        if min(max_rank, max_loras_per_batch, element_size, page_ranks) < 1:
            raise ValueError(
                "max_rank, max_loras_per_batch, element_size and page_ranks must be at least 1"
            )
        sizes = _page_sizes(sites, targets, page_ranks)
        class_elems = tuple(sorted(set(sizes.values())))
        pages_per_slice = -(-max_rank // page_ranks)
        slices_of_class = Counter(sizes.values())
        full = [
            max_loras_per_batch * pages_per_slice * slices_of_class[elems] for elems in class_elems
        ]
        slab_elems = _choose_slab(class_elems, full)
        reserved = _slabs_for(class_elems, full, slab_elems)
        capacity = sum(
            slabs * (slab_elems // elems)
            for slabs, elems in zip(reserved, class_elems, strict=True)
        )
        return cls(
            page_ranks=page_ranks,
            max_rank=max_rank,
            max_loras_per_batch=max_loras_per_batch,
            element_size=element_size,
            targets=targets,
            classes={key: class_elems.index(elems) for key, elems in sizes.items()},
            class_elems=class_elems,
            slab_elems=slab_elems,
            reserved_slabs=reserved,
            num_slots=1 + max(max_loras_per_batch, min(capacity, _MAX_RESIDENT)),
            max_pages_per_slice=pages_per_slice,
        )

    @property
    def num_slabs(self) -> int:
        return sum(self.reserved_slabs)

    @property
    def num_elems(self) -> int:
        return self.num_slabs * self.slab_elems

    @property
    def nbytes(self) -> int:
        """Bytes of the pool on each rank."""
        return self.num_elems * self.element_size

    def num_pages(self, rank: int) -> int:
        """Pages that one slice needs for ``rank``."""
        return -(-rank // self.page_ranks)


def _page_sizes(
    sites: Sequence[LoRASite], targets: frozenset[str], page_ranks: int
) -> dict[ModuleKey, int]:
    known = {part.name for site in sites for part in site.slices}
    if not targets or targets - known:
        raise ValueError(f"targets {sorted(targets)} must be some of {sorted(known)}")
    return {
        (site_index, slice_index): page_ranks * (site.in_features + part.out_features)
        for site_index, site in enumerate(sites)
        for slice_index, part in enumerate(site.slices)
        if part.name in targets
    }


def _slabs_for(
    class_elems: Sequence[int], num_pages: Sequence[int], slab_elems: int
) -> tuple[int, ...]:
    """Slabs that each class needs for its pages."""
    return tuple(
        -(-pages // (slab_elems // elems))
        for elems, pages in zip(class_elems, num_pages, strict=True)
    )


def _choose_slab(class_elems: Sequence[int], num_pages: Sequence[int]) -> int:
    """Smallest multiple of the largest page whose slabs waste little, else the one that wastes least."""
    ideal = sum(elems * pages for elems, pages in zip(class_elems, num_pages, strict=True))
    best_slab, best_total = 0, 0
    for multiple in range(1, _MAX_PAGES_OF_LARGEST_CLASS + 1):
        slab = multiple * class_elems[-1]
        total = slab * sum(_slabs_for(class_elems, num_pages, slab))
        if total <= ideal * _ACCEPTED_WASTE:
            return slab
        if not best_slab or total < best_total:
            best_slab, best_total = slab, total
    return best_slab
