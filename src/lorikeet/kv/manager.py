"""Page tables of the running sequences, and how they share pages with the prefix cache.

Pages of a running sequence, as half-open ranges of token positions::

    [0, num_shared)             full pages that other sequences can find. Held by this table, and by the tree. Where
                                the tree had a page for the same tokens before ours was full, ours is a duplicate that
                                this table alone holds.
    [num_shared, len * size)    held by this table alone: full pages not offered yet, the page that is being filled,
                                and pages reserved for tokens of the prompt that are still to be computed

``release`` drops the table's reference to all of them: a duplicate and everything in the second range is free at once;
a page that the tree holds stays until the tree evicts it (``_alloc``) or drops it (``drop_version``, ``flush``). Nobody
else frees pages.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorikeet.kv.pages import PageAllocator
from lorikeet.kv.radix import Node, RadixTree


@dataclass(slots=True)
class PageTable:
    """Pages of one running sequence.

    Attributes:
        pages: in order of position.
        node: deepest node of the tree that this table locks; it stands for the first ``num_shared`` tokens.
    """

    version: int
    pages: list[int]
    node: Node
    num_shared: int


@dataclass(frozen=True, slots=True)
class Admitted:
    """What ``KVManager.admit`` reserved.

    Attributes:
        cached_pages: hold valid K/V of the first ``num_cached`` tokens.
        new_pages: follow them; enough for all known tokens.
    """

    num_cached: int
    cached_pages: list[int]
    new_pages: list[int]


class KVManager:
    """Decides which K/V pages a sequence uses.

    Args:
        radix: False turns the prefix cache off: nothing is shared, nothing outlives its sequence.
    """

    def __init__(self, page_size: int, num_pages: int, *, radix: bool) -> None:
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}; at least 1 is needed")
        self.page_size = page_size
        self._radix = radix
        self._allocator = PageAllocator(num_pages)
        self._tree = RadixTree(page_size)
        self._tables: dict[int, PageTable] = {}
        self._num_changes = 0

    @property
    def num_pages(self) -> int:
        return self._allocator.num_pages

    @property
    def capacity(self) -> int:
        """Tokens that the whole pool holds."""
        return self.num_pages * self.page_size

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return self._allocator.num_free

    @property
    def num_cached(self) -> int:
        """Pages that only the prefix cache holds; they are given up when they are needed."""
        return self._tree.num_evictable

    @property
    def num_available(self) -> int:
        """Pages that sequences can still get."""
        return self._allocator.num_free + self._tree.num_evictable

    @property
    def num_changes(self) -> int:
        """Grows when something becomes findable or pages are let go; until then ``fits`` repeats what it refused."""
        return self._num_changes

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def match(self, version: int, tokens: list[int], limit: int) -> int:
        """Cached tokens among the first ``limit``. Changes nothing."""
        if not self._radix:
            return 0
        return self._tree.probe(version, tokens, limit).num_pages * self.page_size

    def fits(self, version: int, tokens: list[int], limit: int, *, reserve: int) -> bool:
        """True if ``admit`` with the same arguments succeeds and leaves ``reserve`` pages. Changes nothing."""
        num_needed = self.pages_for(len(tokens)) + reserve
        num_available = self.num_available
        if self._radix:
            probe = self._tree.probe(version, tokens, limit)
            num_needed -= probe.num_pages
            # A match that nobody locks is counted as available now, and will not be once it is locked.
            num_available -= probe.num_unlocked
        return num_needed <= num_available

    def admit(self, seq_id: int, version: int, tokens: list[int], limit: int) -> Admitted:
        """Open a page table with pages for all of ``tokens``.

        Args:
            limit: at most this many tokens may come from the cache.

        Raises:
            ValueError: the sequence has a table, or the pages are not there (ask ``fits`` first).
        """
        if seq_id in self._tables:
            raise ValueError(f"sequence {seq_id} has a page table already")
        node, cached = self._tree.acquire(version, tokens, limit if self._radix else 0)
        new = self._alloc(self.pages_for(len(tokens)) - len(cached))
        if new is None:
            self._tree.unlock(node)
            raise ValueError(f"sequence {seq_id} does not fit")
        self._allocator.share(cached)
        num_cached = len(cached) * self.page_size
        self._tables[seq_id] = PageTable(version, [*cached, *new], node, num_cached)
        return Admitted(num_cached, cached, new)

    def extend(self, seq_id: int, num_tokens: int) -> list[int] | None:
        """Make room for ``num_tokens`` tokens in all.

        Returns:
            the pages that were added to the table (none if there is room already), or None if they are not there.
        """
        table = self._tables[seq_id]
        pages = self._alloc(self.pages_for(num_tokens) - len(table.pages))
        if pages:
            table.pages.extend(pages)
        return pages

    def commit(self, seq_id: int, tokens: list[int], num_valid: int) -> None:
        """Let other sequences find the full pages of ``tokens[:num_valid]``.

        It suffices that their computation is planned, since whoever finds them is planned later. Takes time in
        proportion to the tokens since the last call.
        """
        table = self._tables[seq_id]
        end = num_valid - num_valid % self.page_size
        if not self._radix or end <= table.num_shared or table.node.detached:
            return
        table.node, taken = self._tree.insert(
            table.node, tokens, table.num_shared, end, table.pages
        )
        self._allocator.share(taken)
        table.num_shared = end
        self._num_changes += 1

    def release(self, seq_id: int, tokens: list[int], num_valid: int) -> None:
        """Close a page table; full pages of ``tokens[:num_valid]`` stay findable until they are evicted."""
        self.commit(seq_id, tokens, num_valid)
        table = self._tables.pop(seq_id)
        self._tree.unlock(table.node)
        self._allocator.release(table.pages)
        self._num_changes += 1

    def drop_version(self, version: int) -> None:
        """Forget what is cached for an adapter version. Running sequences keep their pages."""
        self._allocator.release(self._tree.drop(version))
        self._num_changes += 1

    def flush(self) -> bool:
        """Empty the prefix cache. Refused (False, nothing changes) while a sequence has a page table."""
        if self._tables:
            return False
        self.drop_all()
        return True

    def drop_all(self) -> None:
        """Forget everything that is cached. Running sequences keep their pages."""
        for version in self._tree.versions():
            self.drop_version(version)

    def page_table(self, seq_id: int) -> list[int]:
        """Pages of a running sequence, for checks; the list must not be changed."""
        return self._tables[seq_id].pages

    def sequences(self) -> set[int]:
        """Sequences that have a page table."""
        return set(self._tables)

    def check_integrity(self) -> None:
        """Recount every page from its holders.

        Raises:
            AssertionError: a page is leaked, freed while held, or a lock is missing.
        """
        held: dict[int, int] = {}
        holders = [table.pages for table in self._tables.values()]
        for pages in [*holders, *(node.pages for node in self._tree.nodes())]:
            for page in pages:
                held[page] = held.get(page, 0) + 1
        self._allocator.check_integrity(held)
        self._tree.check_integrity([table.node for table in self._tables.values()])
        for node in self._tree.nodes():
            if node.num_locks == 0 and any(held[page] != 1 for page in node.pages):
                raise AssertionError("a page counts as evictable, but a sequence holds it")

    def _alloc(self, count: int) -> list[int] | None:
        if count <= 0:
            return []
        short = count - self._allocator.num_free
        if short > self._tree.num_evictable:
            return None
        if short > 0:
            self._allocator.release(self._tree.evict(short))
        return self._allocator.alloc(count)
