"""Which rank pages of the adapter pool are free. Element offsets only, no memory.

The pool is one flat buffer cut into slabs of equal size. A slab holds pages of one class (one page size) at a time and
returns to the common list when its last page is freed, so that memory moves between adapters that touch different
modules. ``adapters/layout.py`` chooses the sizes, and shows why the reservations below keep the promise that any
``max_loras_per_batch`` adapters within the limits fit together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_NOBODY = -1

#: Slab -> pages of one holder in it.
Spread = Mapping[int, int]


class RankPageAllocator:
    """Pages of several sizes out of slabs of one size.

    A slab with pages in use belongs to exactly one class. A class may claim a free slab if it holds fewer than its
    reserved number, or if free slabs outnumber what the other classes may still claim. By default there is no memory.

    Attributes:
        owner: class that holds each slab, -1: none.
        per_slab, reserved: by class, the pages that fit a slab, and the slabs that it can always claim.
        free_slabs: held by no class.
        free_pages: slab -> a bit for each of its free pages, for slabs that a class holds.
        num_held, num_loose: by class, its slabs, and the free pages in them.

    Args:
        class_elems: elements of a page, by class.
        slab_elems: elements of a slab; a multiple of no page size in particular, the rest of a slab stays unused.
        reserved_slabs: slabs that each class can always claim, by class; together at most ``num_slabs``.

    Raises:
        ValueError: a page does not fit a slab, or the reservations do not fit the pool.
    """

    def __init__(
        self,
        class_elems: Sequence[int] = (),
        slab_elems: int = 1,
        num_slabs: int = 0,
        reserved_slabs: Sequence[int] = (),
    ) -> None:
        if any(not 0 < elems <= slab_elems for elems in class_elems):
            raise ValueError(f"pages of {list(class_elems)} elements in slabs of {slab_elems}")
        if len(reserved_slabs) != len(class_elems) or sum(reserved_slabs) > num_slabs:
            raise ValueError(
                f"{list(reserved_slabs)} slabs reserved for {len(class_elems)} classes, out of {num_slabs}"
            )
        self._class_elems = tuple(class_elems)
        self._slab_elems = slab_elems
        self.per_slab = tuple(slab_elems // elems for elems in class_elems)
        self.reserved = tuple(reserved_slabs)
        self.owner = [_NOBODY] * num_slabs
        self.free_slabs = list(range(num_slabs - 1, -1, -1))
        self.free_pages: dict[int, int] = {}
        # By class, number of free pages -> slabs that have so many; full slabs are not listed.
        self._partial: list[list[dict[int, None]]] = [
            [{} for _ in range(per_slab)] for per_slab in self.per_slab
        ]
        self.num_held = [0] * len(class_elems)
        self.num_loose = [0] * len(class_elems)

    def guaranteed_pages(self, page_class: int) -> int:
        """Pages of a class that fit whatever the other classes hold."""
        return self.reserved[page_class] * self.per_slab[page_class]

    def trial(self) -> Trial:
        """What would be free if more pages were, as long as nothing is allocated or freed here."""
        return Trial(self)

    def spread(self, offsets: Iterable[int]) -> Spread:
        """How many of these pages lie in which slab."""
        return Counter(offset // self._slab_elems for offset in offsets)

    def alloc(self, classes: Sequence[int]) -> list[int] | None:
        """One page of each class listed, all or nothing.

        Returns:
            element offsets in the order of ``classes``, or None.
        """
        needs = Counter(classes)
        if not self.trial().fits(needs):
            return None
        pages = {page_class: self._take(page_class, count) for page_class, count in needs.items()}
        # Reversed, so that pop() hands them out in the order they were taken.
        for offsets in pages.values():
            offsets.reverse()
        return [pages[page_class].pop() for page_class in classes]

    def free(self, offsets: Iterable[int]) -> None:
        """Give pages back, all or none.

        Raises:
            ValueError: an offset is not that of a page in use.
        """
        freed: dict[int, int] = {}
        for offset in offsets:
            slab, inside = divmod(offset, self._slab_elems)
            owner = self.owner[slab] if 0 <= slab < len(self.owner) else _NOBODY
            if owner == _NOBODY or inside % self._class_elems[owner]:
                raise ValueError(f"there is no page at {offset}")
            page = inside // self._class_elems[owner]
            pages = freed.get(slab, 0)
            if page >= self.per_slab[owner] or (self.free_pages[slab] | pages) >> page & 1:
                raise ValueError(f"the page at {offset} is not in use")
            freed[slab] = pages | 1 << page
        for slab, pages in freed.items():
            self._put_back(slab, pages)

    def check_integrity(self, in_use: Iterable[int]) -> None:
        """Check that the pages in use are exactly those that are held.

        Raises:
            AssertionError: a page is leaked, shared, or a slab is on the wrong list.
        """
        used: dict[int, set[int]] = {}
        for offset in in_use:
            slab, inside = divmod(offset, self._slab_elems)
            if inside in used.setdefault(slab, set()):
                raise AssertionError(f"two holders of the page at {offset}")
            used[slab].add(inside)
        for slab, owner in enumerate(self.owner):
            if (owner == _NOBODY) != (slab not in used):
                raise AssertionError(f"slab {slab}: class {owner}, pages {used.get(slab)} in use")
            if owner == _NOBODY:
                continue
            elems = self._class_elems[owner]
            pages = range(self.per_slab[owner])
            free = {page * elems for page in pages if self.free_pages[slab] >> page & 1}
            every = {page * elems for page in pages}
            if free & used[slab] or free | used[slab] != every:
                raise AssertionError(f"slab {slab}: pages {every}, free {free}, used {used[slab]}")
        self._check_counts()
        if set(self.free_slabs) != {s for s, owner in enumerate(self.owner) if owner == _NOBODY}:
            raise AssertionError("the list of free slabs is wrong")

    def _check_counts(self) -> None:
        """Recount the slabs and free pages of each class."""
        held, loose = [0] * len(self._class_elems), [0] * len(self._class_elems)
        for slab, pages in self.free_pages.items():
            owner, count = self.owner[slab], pages.bit_count()
            held[owner] += 1
            loose[owner] += count
            if count and slab not in self._partial[owner][count]:
                raise AssertionError(f"slab {slab} is not listed under {count} free pages")
        if (held, loose) != (self.num_held, self.num_loose):
            raise AssertionError(
                f"{self.num_held} slabs and {self.num_loose} free pages counted, {held} and {loose} found"
            )
        num_listed = sum(len(slabs) for lists in self._partial for slabs in lists)
        if num_listed != sum(pages != 0 for pages in self.free_pages.values()):
            raise AssertionError("a slab is listed twice or without a free page")

    def _take(self, page_class: int, count: int) -> list[int]:
        """``count`` pages, from the fullest slabs first: the emptiest ones are the likeliest to come back whole."""
        taken: list[int] = []
        for num_free, slabs in enumerate(self._partial[page_class]):
            while slabs and len(taken) < count:
                slab, _ = slabs.popitem()
                self._take_from(slab, page_class, min(num_free, count - len(taken)), taken)
        while len(taken) < count:
            slab = self.free_slabs.pop()
            per_slab = self.per_slab[page_class]
            self.owner[slab] = page_class
            self.num_held[page_class] += 1
            self.num_loose[page_class] += per_slab
            self.free_pages[slab] = (1 << per_slab) - 1
            self._take_from(slab, page_class, min(per_slab, count - len(taken)), taken)
        return taken

    def _take_from(self, slab: int, page_class: int, count: int, taken: list[int]) -> None:
        """The first ``count`` free pages of a slab that is on no list; it is put on the right one."""
        pages = self.free_pages[slab]
        start, elems = slab * self._slab_elems, self._class_elems[page_class]
        for _ in range(count):
            taken.append(start + ((pages & -pages).bit_length() - 1) * elems)
            pages &= pages - 1
        self.free_pages[slab] = pages
        self.num_loose[page_class] -= count
        if pages:
            self._partial[page_class][pages.bit_count()][slab] = None

    def _put_back(self, slab: int, pages: int) -> None:
        """Pages of a slab, by their bits, are free; the slab is, too, if they were its last."""
        owner, before = self.owner[slab], self.free_pages[slab]
        if before:
            del self._partial[owner][before.bit_count()][slab]
        after = before | pages
        if after.bit_count() < self.per_slab[owner]:
            self.free_pages[slab] = after
            self._partial[owner][after.bit_count()][slab] = None
            self.num_loose[owner] += pages.bit_count()
            return
        del self.free_pages[slab]
        self.num_held[owner] -= 1
        self.num_loose[owner] -= before.bit_count()
        self.owner[slab] = _NOBODY
        self.free_slabs.append(slab)


class Trial:
    """What would be free if more pages were. Changes nothing; valid until the allocator does.

    ``free`` and ``keep`` cost as much as the holder of the pages has slabs, ``fits`` as much as there are classes.
    """

    def __init__(self, pages: RankPageAllocator) -> None:
        self._pages = pages
        self._num_free = len(pages.free_slabs)
        self._num_held = pages.num_held.copy()
        self._num_loose = pages.num_loose.copy()
        # slab -> pages that are free only here.
        self._freed: dict[int, int] = {}

    def free(self, spread: Spread) -> None:
        """Count these pages as free."""
        for slab, count in spread.items():
            self._change(slab, count)

    def keep(self, spread: Spread) -> None:
        """Undo ``free``: they stay in use."""
        for slab, count in spread.items():
            self._change(slab, -count)

    def fits(self, needs: Mapping[int, int]) -> bool:
        """True if there were room for so many pages of each class."""
        num_free, num_held = self._num_free, self._num_held.copy()
        for page_class, count in needs.items():
            short = max(0, count - self._num_loose[page_class])
            num_claimed = -(-short // self._pages.per_slab[page_class])
            num_free -= num_claimed
            num_held[page_class] += num_claimed
        # Claims within the reservations come first and always keep this inequality; if it holds at the end, it
        # held after each claim beyond them.
        return num_free >= sum(
            max(0, reserved - held)
            for reserved, held in zip(self._pages.reserved, num_held, strict=True)
        )

    def _change(self, slab: int, count: int) -> None:
        owner = self._pages.owner[slab]
        per_slab, before = self._pages.per_slab[owner], self._freed.get(slab, 0)
        num_before = self._pages.free_pages[slab].bit_count() + before
        num_after = num_before + count
        self._freed[slab] = before + count
        self._num_loose[owner] += count
        # A slab whose last page is free belongs to nobody.
        for num, sign in ((num_before, -1), (num_after, 1)):
            if num == per_slab:
                self._num_free += sign
                self._num_held[owner] -= sign
                self._num_loose[owner] -= sign * per_slab
