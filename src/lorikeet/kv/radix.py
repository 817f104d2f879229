"""The prefix cache: a radix tree over pages, one root per adapter version.

K/V depends on the adapter, so the key of an entry is (version, tokens). Edges hold whole pages only: a prefix that
ends inside a page is not shared. The tree counts locks, not pages: which page is free is the allocator's business
(``kv/pages.py``), and ``kv/manager.py`` tells it what the tree took and what it gave back.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Node:
    """An edge of the tree together with the node at its end.

    Attributes:
        key: tokens of the edge; ``len(key) == len(pages) * page_size``. Roots have none.
        edge: the first page of ``key``, under which the parent knows this node.
        num_locks: page tables whose prefix runs through this node. A locked node's ancestors are locked, too.
        last_access: clock of the newest lock or unlock.
        detached: no longer in the tree (evicted or dropped). Holders may still unlock it; nothing else counts.
    """

    version: int
    key: list[int]
    pages: list[int]
    parent: Node | None
    edge: tuple[int, ...]
    children: dict[tuple[int, ...], Node] = field(default_factory=dict[tuple[int, ...], "Node"])
    num_locks: int = 0
    last_access: int = 0
    detached: bool = False


@dataclass(frozen=True, slots=True)
class Probe:
    """How much of a prompt is cached: ``num_pages``, of which ``num_unlocked`` are counted as evictable now."""

    num_pages: int
    num_unlocked: int


class RadixTree:
    """Match, insert and evict, at page granularity.

    ``probe`` does not change anything. ``acquire`` and ``insert`` may split edges; a node that somebody has locked
    keeps its identity and its depth for as long as it is locked.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._roots: dict[int, Node] = {}
        self._clock = 0
        # Leaves that nobody locks as (last access, tie-break, node). Entries go stale and are skipped when popped.
        self._evictable: list[tuple[int, int, Node]] = []
        self._num_pushes = 0
        self._num_nodes = 0
        self.num_pages = 0
        self.num_evictable = 0

    def probe(self, version: int, tokens: list[int], limit: int) -> Probe:
        """Length of the cached prefix of ``tokens[:limit]``. Changes nothing."""
        root = self._roots.get(version)
        if root is None:
            return Probe(0, 0)
        node, _, child, num_partial = self._descend(root, tokens, 0, self._floor(limit))
        num_pages, num_unlocked = num_partial, 0
        if child is not None and child.num_locks == 0:
            num_unlocked = num_partial
        while node.parent is not None:
            num_pages += len(node.pages)
            num_unlocked += len(node.pages) if node.num_locks == 0 else 0
            node = node.parent
        return Probe(num_pages, num_unlocked)

    def acquire(self, version: int, tokens: list[int], limit: int) -> tuple[Node, list[int]]:
        """Lock the longest cached prefix of ``tokens[:limit]``; the lock is the caller's to undo.

        Returns:
            the deepest node of the prefix (the version's root if nothing is cached), and the prefix's pages.
        """
        root = self._roots.get(version)
        if root is None:
            root = Node(version=version, key=[], pages=[], parent=None, edge=())
            self._roots[version] = root
        node, _, child, num_partial = self._descend(root, tokens, 0, self._floor(limit))
        if child is not None:
            node = self._split(child, num_partial)
        self.lock(node)
        path: list[list[int]] = []
        step: Node | None = node
        while step is not None:
            path.append(step.pages)
            step = step.parent
        return node, [page for pages in reversed(path) for page in pages]

    def insert(
        self, node: Node, tokens: list[int], start: int, end: int, pages: list[int]
    ) -> tuple[Node, list[int]]:
        """Make ``tokens[:end]`` findable.

        Args:
            node: a node that stands for ``tokens[:start]`` and that the caller has locked; the lock moves on to the
                returned node.
            end: a multiple of the page size.
            pages: the page table of the sequence, from position 0 on.

        Returns:
            the node that stands for ``tokens[:end]``, and those of ``pages`` that the tree now holds. Where the tree has
            pages of its own for the same tokens it keeps them, and the sequence goes on with its duplicates.
        """
        held = node
        node, depth, child, num_partial = self._descend(node, tokens, start, end)
        if child is not None:
            node = self._split(child, num_partial)
            depth += num_partial * self._page_size
        taken: list[int] = []
        if depth < end:
            taken = pages[depth // self._page_size : end // self._page_size]
            key = tokens[depth:end]
            edge = tuple(key[: self._page_size])
            leaf = Node(version=node.version, key=key, pages=list(taken), parent=node, edge=edge)
            node.children[edge] = leaf
            node = leaf
            self._num_nodes += 1
            self.num_pages += len(taken)
            self.num_evictable += len(taken)
        self.lock(node)
        self.unlock(held)
        return node, taken

    def lock(self, node: Node) -> None:
        """Keep ``node`` and the path to it from being evicted."""
        self._clock += 1
        step: Node | None = node
        while step is not None:
            if step.num_locks == 0:
                self.num_evictable -= len(step.pages)
            step.num_locks += 1
            step.last_access = self._clock
            step = step.parent

    def unlock(self, node: Node) -> None:
        """Undo one ``lock``."""
        self._clock += 1
        step: Node | None = node
        while step is not None:
            if step.num_locks == 0:
                raise ValueError("unlock of a node that is not locked")
            step.num_locks -= 1
            step.last_access = self._clock
            parent = step.parent
            if step.num_locks == 0:
                self.num_evictable += len(step.pages)
                self._offer(step)
            step = parent

    def evict(self, count: int) -> list[int]:
        """Give up ``count`` pages (fewer if not enough are evictable), least recently used leaves first.

        A leaf gives pages from its end, so that the part of a prefix which is likelier to be shared stays.

        Returns:
            pages that the tree no longer holds.
        """
        given: list[int] = []
        while len(given) < count and self._evictable:
            access, _, node = heapq.heappop(self._evictable)
            # Locking moves last_access, and only a locked node gets children: an entry whose clock still fits is that
            # of a leaf which nobody locks.
            if node.detached or node.last_access != access:
                continue
            num_taken = min(len(node.pages), count - len(given))
            given.extend(reversed(node.pages[-num_taken:]))
            del node.pages[-num_taken:]
            del node.key[-num_taken * self._page_size :]
            self.num_pages -= num_taken
            self.num_evictable -= num_taken
            if node.pages:
                self._offer(node)
            else:
                self._remove_leaf(node)
        return given

    def drop(self, version: int) -> list[int]:
        """Forget everything of a version, locked or not.

        Returns:
            the pages that the tree no longer holds. Sequences that lock nodes of this version keep their own
            references and unlock their nodes later as usual.
        """
        root = self._roots.pop(version, None)
        if root is None:
            return []
        given: list[int] = []
        stack = [root]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            given.extend(node.pages)
            self.num_pages -= len(node.pages)
            if node.num_locks == 0:
                self.num_evictable -= len(node.pages)
            if node is not root:
                self._num_nodes -= 1
            node.pages, node.key, node.detached = [], [], True
        return given

    def versions(self) -> list[int]:
        return list(self._roots)

    def nodes(self) -> list[Node]:
        """Every node but the roots, parents first."""
        found: list[Node] = []
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                found.append(node)
            stack.extend(node.children.values())
        return found

    def check_integrity(self, lock_holders: list[Node]) -> None:
        """Recount pages, locks and evictable pages.

        Args:
            lock_holders: the node of each lock that somebody holds, with repetitions.

        Raises:
            AssertionError: names what does not match.
        """
        locks: dict[int, int] = {}
        for holder in lock_holders:
            step: Node | None = holder
            while step is not None:
                locks[id(step)] = locks.get(id(step), 0) + 1
                step = step.parent
        nodes = self.nodes()
        for node in [*nodes, *self._roots.values()]:
            if node.num_locks != locks.get(id(node), 0):
                raise AssertionError(
                    f"{node.num_locks} locks counted, {locks.get(id(node), 0)} held"
                )
            if len(node.key) != len(node.pages) * self._page_size or node.detached:
                raise AssertionError(
                    "a node of the tree is detached or its key does not fit its pages"
                )
            for edge, child in node.children.items():
                if child.parent is not node or child.edge != edge or child.version != node.version:
                    raise AssertionError("a child does not know its parent")
                if tuple(child.key[: self._page_size]) != edge:
                    raise AssertionError("a child is filed under another key")
        self._check_counts(nodes)

    def _check_counts(self, nodes: list[Node]) -> None:
        num_evictable = sum(len(node.pages) for node in nodes if node.num_locks == 0)
        counts = (self.num_pages, self._num_nodes, self.num_evictable)
        expected = (sum(len(node.pages) for node in nodes), len(nodes), num_evictable)
        if counts != expected:
            raise AssertionError(f"(pages, nodes, evictable) counted {counts}, found {expected}")
        leaves = {id(node) for node in nodes if not node.children and node.num_locks == 0}
        offered = {id(n) for access, _, n in self._evictable if n.last_access == access}
        if not leaves <= offered:
            raise AssertionError("an evictable leaf is not on offer")

    def _floor(self, num_tokens: int) -> int:
        return num_tokens - num_tokens % self._page_size

    def _descend(
        self, node: Node, tokens: list[int], start: int, end: int
    ) -> tuple[Node, int, Node | None, int]:
        """Follow ``tokens[start:end]`` down from ``node``, which stands for ``tokens[:start]``.

        Returns:
            the deepest node whose whole edge matches and the position it stands for; then, if the walk ended inside
            an edge, the node of that edge and how many of its pages match (at least one), else None and 0.
        """
        size = self._page_size
        while start < end:
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            length = min(len(child.key), end - start)
            # Two slices compared in C; the page-by-page search below runs only where sequences part.
            if tokens[start : start + length] != child.key[:length]:
                matched = size
                while (
                    tokens[start + matched : start + matched + size]
                    == (child.key[matched : matched + size])
                ):
                    matched += size
                return node, start, child, matched // size
            if length < len(child.key):
                return node, start, child, length // size
            node, start = child, start + length
        return node, start, None, 0

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cut an edge after ``num_pages`` pages; ``node`` stays the lower part. Returns the new upper part."""
        parent = node.parent
        if parent is None:
            raise ValueError("a root has no edge to split")
        cut = num_pages * self._page_size
        upper = Node(
            version=node.version,
            key=node.key[:cut],
            pages=node.pages[:num_pages],
            parent=parent,
            edge=node.edge,
            num_locks=node.num_locks,
            last_access=node.last_access,
        )
        parent.children[upper.edge] = upper
        node.key = node.key[cut:]
        node.pages = node.pages[num_pages:]
        node.parent = upper
        node.edge = tuple(node.key[: self._page_size])
        upper.children[node.edge] = node
        self._num_nodes += 1
        return upper

    def _offer(self, node: Node) -> None:
        """Put a node on the list of evictable leaves if it is one; drop a root that stands for nothing."""
        if node.children or node.num_locks or node.detached:
            return
        if node.parent is None:
            del self._roots[node.version]
            node.detached = True
            return
        self._num_pushes += 1
        heapq.heappush(self._evictable, (node.last_access, self._num_pushes, node))
        if len(self._evictable) > 4 * self._num_nodes + 64:
            self._evictable = [
                entry
                for entry in self._evictable
                if not entry[2].detached and entry[2].last_access == entry[0]
            ]
            heapq.heapify(self._evictable)

    def _remove_leaf(self, node: Node) -> None:
        parent = node.parent
        if parent is None:
            raise ValueError("a root is not evicted")
        del parent.children[node.edge]
        node.detached = True
        self._num_nodes -= 1
        self._offer(parent)
