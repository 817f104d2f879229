from __future__ import annotations

import random

import pytest

from lorikeet.kv.pages import PageAllocator


def test_alloc_is_all_or_nothing() -> None:
    pages = PageAllocator(3)
    assert pages.alloc(4) is None
    assert pages.num_free == 3
    assert pages.alloc(2) == [0, 1]
    assert pages.alloc(2) is None
    assert pages.alloc(0) == []
    assert pages.num_free == 1


def test_a_page_is_free_when_its_last_holder_lets_go() -> None:
    pages = PageAllocator(2)
    held = pages.alloc(1)
    assert held is not None
    pages.share(held)
    pages.release(held)
    assert pages.num_free == 1
    pages.check_integrity({held[0]: 1})
    pages.release(held)
    assert pages.num_free == 2


def test_double_free_and_sharing_of_free_pages_are_refused() -> None:
    pages = PageAllocator(2)
    with pytest.raises(ValueError, match="page 1 is free already"):
        pages.release([1])
    with pytest.raises(ValueError, match="page 0 is free"):
        pages.share([0])
    with pytest.raises(ValueError, match="num_pages is 0"):
        PageAllocator(0)


def test_random_use_keeps_the_counts() -> None:
    rng = random.Random(1)
    pages = PageAllocator(20)
    held: list[int] = []
    for _ in range(2000):
        if held and rng.random() < 0.5:
            page = held.pop(rng.randrange(len(held)))
            pages.release([page])
        elif held and rng.random() < 0.3:
            held.append(rng.choice(held))
            pages.share(held[-1:])
        else:
            held.extend(pages.alloc(rng.randint(0, 3)) or [])
        pages.check_integrity({page: held.count(page) for page in held})


def test_integrity_check_finds_a_leak() -> None:
    pages = PageAllocator(2)
    pages.alloc(1)
    with pytest.raises(AssertionError, match="page 0: counted 1, held 0"):
        pages.check_integrity({})
