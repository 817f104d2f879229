"""Which K/V pages are free, and how many hold each of the others. Ints only."""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """A free list and a reference count per page.

    A page is free exactly when its count is 0. Holders are page tables of sequences and the prefix tree; nobody
    owns a page alone, so nobody has to know who else uses it when it lets go.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; at least 1 is needed")
        self._num_refs = [0] * num_pages
        # A stack: the page freed last is the likeliest to be in a cache of the device. Page 0 comes out first.
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_pages(self) -> int:
        return len(self._num_refs)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def alloc(self, count: int) -> list[int] | None:
        """Take ``count`` free pages, each with one reference, or none at all if there are fewer."""
        if count == 0:
            return []
        if count > len(self._free):
            return None
        pages = self._free[-count:]
        del self._free[-count:]
        pages.reverse()
        for page in pages:
            self._num_refs[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference for each page. The pages must be held by somebody already."""
        refs = self._num_refs
        for page in pages:
            if refs[page] == 0:
                raise ValueError(f"page {page} is free and cannot be shared")
            refs[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reference less for each page; those that nobody holds any more are free at once."""
        refs = self._num_refs
        for page in pages:
            if refs[page] == 0:
                raise ValueError(f"page {page} is free already")
            refs[page] -= 1
            if refs[page] == 0:
                self._free.append(page)

    def check_integrity(self, expected_refs: dict[int, int]) -> None:
        """Compare with a count made from the holders.

        Args:
            expected_refs: page -> number of holders, for every page that has any.

        Raises:
            AssertionError: a page is leaked, freed twice, or freed while in use.
        """
        free = set(self._free)
        if len(free) != len(self._free):
            raise AssertionError("a page is twice in the free list")
        for page, count in enumerate(self._num_refs):
            if count != expected_refs.get(page, 0):
                raise AssertionError(
                    f"page {page}: counted {count}, held {expected_refs.get(page, 0)} times"
                )
            if (count == 0) != (page in free):
                raise AssertionError(f"page {page}: {count} references, free is {page in free}")
