"""Which rank pages of the adapter pool are free. Element offsets only, no memory.

The pool is one flat buffer cut into slabs of equal size. A slab holds pages of one class (one page size) at a time and
returns to the common list when its last page is freed, so that memory moves between adapters that touch different
modules. ``lora/layout.py`` chooses the sizes, and shows why the reservations below keep the promise that any
``max_loras_per_batch`` adapters within the limits fit together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

_NOBODY = -1


class RankPageAllocator:
    """Pages of several sizes out of slabs of one size.

    A slab with pages in use belongs to exactly one class. A class may claim a free slab if it holds fewer than its
    reserved number, or if free slabs outnumber what the other classes may still claim.

    Args:
        class_elems: elements of a page, by class.
        slab_elems: elements of a slab; a multiple of no page size in particular, the rest of a slab stays unused.
        reserved_slabs: slabs that each class can always claim, by class; together at most ``num_slabs``.

    Raises:
        ValueError: a page does not fit a slab, or the reservations do not fit the pool.
    """

    def __init__(
        self,
        class_elems: Sequence[int],
        slab_elems: int,
        num_slabs: int,
        reserved_slabs: Sequence[int],
    ) -> None:
        if any(not 0 < elems <= slab_elems for elems in class_elems):
            raise ValueError(f"pages of {list(class_elems)} elements in slabs of {slab_elems}")
        if len(reserved_slabs) != len(class_elems) or sum(reserved_slabs) > num_slabs:
            raise ValueError(
                f"{list(reserved_slabs)} slabs reserved for {len(class_elems)} classes, out of {num_slabs}"
            )
        self._class_elems = tuple(class_elems)
        self._slab_elems = slab_elems
        self._per_slab = tuple(slab_elems // elems for elems in class_elems)
        self._reserved = tuple(reserved_slabs)
        self._owner = [_NOBODY] * num_slabs
        self._free_slabs = list(range(num_slabs - 1, -1, -1))
        # slab -> indexes of its free pages, for slabs that a class holds.
        self._free_pages: dict[int, list[int]] = {}
        self._slabs_of: list[set[int]] = [set() for _ in class_elems]

    @property
    def num_elems(self) -> int:
        return len(self._owner) * self._slab_elems

    @property
    def num_free_elems(self) -> int:
        """Elements that no page in use covers (the unusable rests of claimed slabs not counted)."""
        free = len(self._free_slabs) * self._slab_elems
        for slab, pages in self._free_pages.items():
            free += len(pages) * self._class_elems[self._owner[slab]]
        return free

    def guaranteed_pages(self, page_class: int) -> int:
        """Pages of a class that fit whatever the other classes hold."""
        return self._reserved[page_class] * self._per_slab[page_class]

    def fits(self, classes: Sequence[int], freed: Iterable[int] = ()) -> bool:
        """True if ``alloc(classes)`` would succeed once the pages at ``freed`` are free. Changes nothing."""
        freed_of = Counter(offset // self._slab_elems for offset in freed)
        num_free = len(self._free_slabs)
        loose = [0] * len(self._class_elems)
        held = [len(slabs) for slabs in self._slabs_of]
        for slab, pages in self._free_pages.items():
            owner = self._owner[slab]
            num_pages = len(pages) + freed_of[slab]
            if num_pages == self._per_slab[owner]:
                num_free += 1
                held[owner] -= 1
            else:
                loose[owner] += num_pages
        for page_class, count in Counter(classes).items():
            short = max(0, count - loose[page_class])
            num_claimed = -(-short // self._per_slab[page_class])
            num_free -= num_claimed
            held[page_class] += num_claimed
        # Claims within the reservations come first and always keep this inequality; if it holds at the end, it
        # held after each claim beyond them.
        return num_free >= sum(
            max(0, reserved - count) for reserved, count in zip(self._reserved, held, strict=True)
        )

    def alloc(self, classes: Sequence[int]) -> list[int] | None:
        """One page of each class listed, all or nothing.

        Returns:
            element offsets in the order of ``classes``, or None.
        """
        if not self.fits(classes):
            return None
        pages = {
            page_class: self._take(page_class, count)
            for page_class, count in Counter(classes).items()
        }
        # Reversed, so that pop() hands them out in the order they were taken.
        for offsets in pages.values():
            offsets.reverse()
        return [pages[page_class].pop() for page_class in classes]

    def free(self, offsets: Iterable[int]) -> None:
        """Give pages back.

        Raises:
            ValueError: an offset is not that of a page in use.
        """
        for offset in offsets:
            slab, inside = divmod(offset, self._slab_elems)
            owner = self._owner[slab] if 0 <= slab < len(self._owner) else _NOBODY
            if owner == _NOBODY or inside % self._class_elems[owner]:
                raise ValueError(f"there is no page at {offset}")
            page = inside // self._class_elems[owner]
            free_pages = self._free_pages[slab]
            if page >= self._per_slab[owner] or page in free_pages:
                raise ValueError(f"the page at {offset} is not in use")
            free_pages.append(page)
            if len(free_pages) == self._per_slab[owner]:
                del self._free_pages[slab]
                self._slabs_of[owner].discard(slab)
                self._owner[slab] = _NOBODY
                self._free_slabs.append(slab)

    def check_integrity(self, in_use: Iterable[int]) -> None:
        """Compare with the offsets that somebody holds.

        Raises:
            AssertionError: a page is leaked, shared, or a slab is on the wrong list.
        """
        used: dict[int, set[int]] = {}
        for offset in in_use:
            slab, inside = divmod(offset, self._slab_elems)
            if inside in used.setdefault(slab, set()):
                raise AssertionError(f"two holders of the page at {offset}")
            used[slab].add(inside)
        for slab, owner in enumerate(self._owner):
            if (owner == _NOBODY) != (slab not in used):
                raise AssertionError(f"slab {slab}: class {owner}, pages {used.get(slab)} in use")
            if owner == _NOBODY:
                continue
            elems = self._class_elems[owner]
            free = {page * elems for page in self._free_pages[slab]}
            every = {page * elems for page in range(self._per_slab[owner])}
            if free & used[slab] or free | used[slab] != every:
                raise AssertionError(f"slab {slab}: pages {every}, free {free}, used {used[slab]}")
            if slab not in self._slabs_of[owner]:
                raise AssertionError(f"slab {slab} is not listed under its class {owner}")
        if set(self._free_slabs) != {s for s, owner in enumerate(self._owner) if owner == _NOBODY}:
            raise AssertionError("the list of free slabs is wrong")

    def _take(self, page_class: int, count: int) -> list[int]:
        """``count`` pages, from the fullest slabs first: the emptiest ones are the likeliest to come back whole."""
        elems = self._class_elems[page_class]
        partial = sorted(
            (slab for slab in self._slabs_of[page_class] if self._free_pages[slab]),
            key=lambda slab: (-len(self._free_pages[slab]), -slab),
        )
        taken: list[int] = []
        while len(taken) < count:
            slab = partial.pop() if partial else self._claim(page_class)
            free_pages = self._free_pages[slab]
            while free_pages and len(taken) < count:
                taken.append(slab * self._slab_elems + free_pages.pop() * elems)
        return taken

    def _claim(self, page_class: int) -> int:
        slab = self._free_slabs.pop()
        self._owner[slab] = page_class
        self._slabs_of[page_class].add(slab)
        self._free_pages[slab] = list(range(self._per_slab[page_class] - 1, -1, -1))
        return slab
