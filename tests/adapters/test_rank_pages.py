from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikeet.adapters.rank_pages import RankPageAllocator
from tests.support.slow_placement import SlowPages


def test_pages_lie_in_slabs_of_their_class() -> None:
    pages = RankPageAllocator((10, 30), 100, 4, [1, 1])
    offsets = pages.alloc([0, 1, 0, 1])
    assert offsets is not None
    assert offsets == [0, 100, 10, 130]
    pages.check_integrity(offsets)
    assert (len(pages.free_slabs), pages.num_loose) == (2, [8, 1])


def test_alloc_is_all_or_nothing() -> None:
    pages = RankPageAllocator((30,), 100, 2, [2])
    assert pages.alloc([0] * 7) is None
    assert (len(pages.free_slabs), pages.num_loose) == (2, [0])
    offsets = pages.alloc([0] * 6)
    assert offsets is not None
    assert len(set(offsets)) == 6
    assert not pages.trial().fits(Counter([0]))
    assert pages.alloc([0]) is None
    assert pages.alloc([]) == []


def test_a_slab_returns_when_its_last_page_is_freed() -> None:
    pages = RankPageAllocator((50, 100), 100, 2, [0, 0])
    offsets = pages.alloc([0, 0, 0])
    assert offsets is not None
    assert pages.alloc([1]) is None
    pages.free(offsets[2:])
    assert pages.alloc([1]) == [100]


def test_reservation_is_kept_free_for_its_class() -> None:
    pages = RankPageAllocator((50, 100), 100, 3, [1, 1])
    assert pages.alloc([0] * 5) is None, "the third slab is promised to class 1"
    assert pages.alloc([0] * 4) is not None
    assert pages.alloc([1]) is not None
    assert pages.guaranteed_pages(0) == 2


def test_fits_with_pages_that_would_be_freed() -> None:
    pages = RankPageAllocator((50, 100), 100, 2, [0, 0])
    first, second = pages.alloc([0, 0]), pages.alloc([0, 0])
    assert first is not None
    assert second is not None
    trial = pages.trial()
    assert not trial.fits({1: 1})
    trial.free(pages.spread([first[0], second[0]]))
    assert (trial.fits({1: 1}), trial.fits({0: 2})) == (False, True)
    trial.free(pages.spread([first[1]]))
    assert trial.fits({1: 1})
    trial.keep(pages.spread([first[1]]))
    assert (trial.fits({1: 1}), trial.fits({0: 2})) == (False, True)
    assert not pages.trial().fits(Counter([1])), "asking changes nothing"


@pytest.mark.parametrize("offset", [-100, 0, 5, 90, 1000])
def test_freeing_what_is_not_in_use(offset: int) -> None:
    pages = RankPageAllocator((30,), 100, 3, [3])
    taken = pages.alloc([0, 0, 0, 0])
    assert taken is not None
    pages.free(taken[:1])
    with pytest.raises(ValueError, match=r"the page|no page"):
        pages.free([offset])


def test_freeing_is_all_or_nothing() -> None:
    pages = RankPageAllocator((30,), 100, 3, [3])
    taken = pages.alloc([0, 0, 0, 0])
    assert taken is not None
    for wrong in ([*taken, taken[0]], [taken[3], 5], [taken[1], 900]):
        with pytest.raises(ValueError, match=r"the page|no page"):
            pages.free(wrong)
        pages.check_integrity(taken)


@given(st.data())
def test_counters_agree_with_looking_at_everything(data: st.DataObject) -> None:
    """Adapters come and go; before each comes, any of those that are there are thought away in any order."""
    slab = data.draw(st.integers(4, 30))
    elems = data.draw(st.lists(st.integers(1, slab), min_size=1, max_size=4, unique=True))
    reserved = [data.draw(st.integers(0, 3)) for _ in elems]
    num_slabs = sum(reserved) + data.draw(st.integers(0, 4))
    sizes = (elems, slab, num_slabs, reserved)
    pages, slow = RankPageAllocator(*sizes), SlowPages(*sizes)
    a_class = st.integers(0, len(elems) - 1)
    held: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        classes = data.draw(st.lists(a_class, max_size=12))
        trial, gone = pages.trial(), set[int]()
        for index in data.draw(st.lists(st.integers(0, max(0, len(held) - 1)), max_size=8)):
            if index < len(held):
                spread = pages.spread(held[index])
                (trial.keep if index in gone else trial.free)(spread)
                gone ^= {index}
            freed = [page for index in gone for page in held[index]]
            assert trial.fits(Counter(classes)) == slow.fits(classes, freed)
        assert pages.trial().fits(Counter(classes)) == slow.fits(classes)
        offsets = pages.alloc(classes)
        assert (offsets is not None) == slow.fits(classes)
        if offsets is not None:
            slow.alloc(classes, offsets)
            held.append(offsets)
        while held and data.draw(st.booleans()):
            offsets = held.pop(data.draw(st.integers(0, len(held) - 1)))
            pages.free(offsets)
            slow.free(offsets)
        pages.check_integrity(slow.used)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="in slabs of 100"):
        RankPageAllocator((101,), 100, 2, [0])
    with pytest.raises(ValueError, match="reserved"):
        RankPageAllocator((10, 20), 100, 2, [2, 1])
    with pytest.raises(ValueError, match="1 classes"):
        RankPageAllocator((10,), 100, 2, [1, 1])


@pytest.mark.parametrize("seed", range(8))
def test_random_use_keeps_the_promise(seed: int) -> None:
    """Whatever is in use, ``max`` adapters of the largest size fit if no others are."""
    rng = random.Random(seed)
    elems, slab, full, most = (7, 24, 40), 120, (5, 9, 2), 3
    reserved = [-(-most * count // (slab // size)) for count, size in zip(full, elems, strict=True)]
    pages = RankPageAllocator(elems, slab, sum(reserved), reserved)
    held: list[list[int]] = []
    kept: list[list[int]] = []
    for _ in range(150):
        classes = [c for c, count in enumerate(full) for _ in range(rng.randint(0, count))]
        rng.shuffle(classes)
        promised = pages.trial().fits(Counter(classes))
        offsets = pages.alloc(classes)
        assert promised == (offsets is not None)
        if offsets is not None:
            assert [o % slab % elems[c] for o, c in zip(offsets, classes, strict=True)] == [
                0
            ] * len(classes)
            held.append(offsets)
        elif len(kept) < most:
            # An admission: everything that is not in use may be evicted.
            everything = [offset for offsets in held for offset in offsets]
            trial = pages.trial()
            trial.free(pages.spread(everything))
            assert trial.fits(Counter(classes))
            pages.free(everything)
            held = []
            offsets = pages.alloc(classes)
            assert offsets is not None
            kept.append(offsets)
        for group in (held, kept):
            while group and rng.random() < 0.3:
                pages.free(group.pop(rng.randrange(len(group))))
        pages.check_integrity(o for offsets in (*held, *kept) for o in offsets)
