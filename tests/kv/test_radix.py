from __future__ import annotations

import random

import pytest

from lorikeet.kv.radix import Node, Probe, RadixTree

A = list(range(100, 112))


def fill(tree: RadixTree, tokens: list[int], pages: list[int], version: int = 1) -> Node:
    """Insert and keep the lock."""
    node, cached = tree.acquire(version, tokens, len(tokens))
    end = len(tokens) - len(tokens) % 4
    node, _ = tree.insert(node, tokens, len(cached) * 4, end, pages)
    return node


def matched(tree: RadixTree, tokens: list[int], version: int = 1) -> list[int]:
    node, pages = tree.acquire(version, tokens, len(tokens))
    tree.unlock(node)
    return pages


def test_match_is_by_whole_pages() -> None:
    tree = RadixTree(4)
    tree.unlock(fill(tree, A, [0, 1, 2]))
    assert matched(tree, A) == [0, 1, 2]
    assert matched(tree, A[:11]) == [0, 1]
    assert matched(tree, [*A[:7], 0, 0]) == [0]
    assert matched(tree, A[:3]) == []
    assert matched(tree, [0, *A]) == []
    tree.check_integrity([])


def test_versions_share_nothing() -> None:
    tree = RadixTree(4)
    tree.unlock(fill(tree, A, [0, 1, 2], version=1))
    assert matched(tree, A, version=2) == []
    assert tree.probe(2, A, 12) == Probe(0, 0)
    assert tree.versions() == [1], "a root that stands for nothing is not kept"


def test_limit_cuts_the_match() -> None:
    tree = RadixTree(4)
    node = fill(tree, A, [0, 1, 2])
    assert [tree.probe(1, A, limit).num_pages for limit in (0, 3, 4, 11, 12)] == [0, 0, 1, 2, 3]
    assert tree.probe(1, A, 12).num_unlocked == 0
    tree.unlock(node)
    assert tree.probe(1, A, 11) == Probe(2, 2)


def test_probe_changes_nothing() -> None:
    tree = RadixTree(4)
    tree.unlock(fill(tree, A, [0, 1, 2]))
    tree.probe(1, A, 6)
    assert len(tree.nodes()) == 1


def test_an_edge_is_split_where_sequences_part() -> None:
    tree = RadixTree(4)
    first = fill(tree, A, [0, 1, 2])
    second = fill(tree, [*A[:4], *range(8)], [0, 3, 4])
    assert matched(tree, A) == [0, 1, 2]
    assert matched(tree, [*A[:4], *range(8)]) == [0, 3, 4]
    assert len(tree.nodes()) == 3
    tree.check_integrity([first, second])
    tree.unlock(first)
    tree.check_integrity([second])
    assert tree.num_evictable == 2


def test_insert_keeps_the_pages_that_are_there() -> None:
    tree = RadixTree(4)
    first, _ = tree.acquire(1, A, 12)
    second, _ = tree.acquire(1, A, 12)
    first, taken = tree.insert(first, A, 0, 8, [0, 1, 9])
    assert taken == [0, 1]
    second, taken = tree.insert(second, A, 0, 12, [5, 6, 7])
    assert taken == [7], "duplicates of the first two pages stay with the sequence"
    assert matched(tree, A) == [0, 1, 7]
    tree.check_integrity([first, second])


def test_eviction_takes_the_least_recently_used_from_its_end() -> None:
    tree = RadixTree(4)
    old, new = [1] * 8, [2] * 8
    tree.unlock(fill(tree, old, [0, 1]))
    tree.unlock(fill(tree, new, [2, 3]))
    matched(tree, old)
    assert tree.evict(1) == [3]
    assert matched(tree, new) == [2], "which makes it the most recently used"
    assert tree.evict(2) == [1, 0]
    assert tree.evict(5) == [2]
    assert (tree.num_pages, tree.versions()) == (0, [])
    tree.check_integrity([])


def test_locked_pages_and_their_ancestors_are_not_evicted() -> None:
    tree = RadixTree(4)
    tree.unlock(fill(tree, A, [0, 1, 2]))
    node, pages = tree.acquire(1, A, 8)
    assert (pages, tree.num_evictable) == ([0, 1], 1)
    assert tree.evict(3) == [2]
    tree.unlock(node)
    assert sorted(tree.evict(3)) == [0, 1]


def test_a_parent_becomes_evictable_after_its_last_child() -> None:
    tree = RadixTree(4)
    tree.unlock(fill(tree, A[:4], [0]))
    tree.unlock(fill(tree, A, [0, 1, 2]))
    assert len(tree.nodes()) == 2
    assert tree.evict(3) == [2, 1, 0]


def test_drop_forgets_locked_nodes_too() -> None:
    tree = RadixTree(4)
    tree.unlock(fill(tree, A, [0, 1, 2]))
    held, _ = tree.acquire(1, A, 4)
    other = fill(tree, A, [3, 4, 5], version=2)
    assert sorted(tree.drop(1)) == [0, 1, 2]
    assert held.detached
    assert matched(tree, A) == []
    tree.unlock(held)
    tree.check_integrity([other])
    assert tree.drop(7) == []


def test_unlock_without_lock_is_refused() -> None:
    tree = RadixTree(4)
    node = fill(tree, A, [0, 1, 2])
    tree.unlock(node)
    with pytest.raises(ValueError, match="not locked"):
        tree.unlock(node)


@pytest.mark.parametrize("seed", range(6))
def test_random_use_against_a_dictionary(seed: int) -> None:
    """The model: each cached prefix of whole pages maps to the page at its end."""
    rng = random.Random(seed)
    tree = RadixTree(2)
    model: dict[tuple[int, ...], int] = {}
    held: list[Node] = []
    next_page = 0
    for _ in range(400):
        version = rng.randint(1, 2)
        tokens = [rng.randint(0, 1) for _ in range(rng.randint(0, 14))]
        key = [(version, *tokens[: 2 * n]) for n in range(1, len(tokens) // 2 + 1)]
        node, pages = tree.acquire(version, tokens, len(tokens))
        length = next((n for n, prefix in enumerate(key) if prefix not in model), len(key))
        assert pages == [model[prefix] for prefix in key[:length]]
        table = [*pages, *range(next_page, next_page + len(key) - length)]
        next_page += len(key) - length
        node, taken = tree.insert(node, tokens, 2 * length, 2 * len(key), table)
        assert taken == table[length:]
        model.update(zip(key, table, strict=True))
        held.append(node)
        while held and rng.random() < 0.6:
            tree.unlock(held.pop(rng.randrange(len(held))))
        if rng.random() < 0.3:
            count = rng.randint(1, 6)
            expected = min(count, tree.num_evictable)
            gone = set(tree.evict(count))
            assert len(gone) == expected
            model = {prefix: page for prefix, page in model.items() if page not in gone}
        tree.check_integrity(held)
        assert tree.num_pages == len(model)
