"""The pool's division, and the promise that its default budget always suffices."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lorikeet.adapters.layout import PoolLayout
from lorikeet.adapters.rank_pages import RankPageAllocator
from lorikeet.core.sites import LoRASite, SiteSlice

LINEAR = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
ALL = LINEAR | {"embed_tokens", "lm_head"}


def _sites(layers: int, hidden: int, kv: int, inner: int, vocab: int) -> tuple[LoRASite, ...]:
    def site(path, kind, layer, inputs, *parts):
        slices, offset = [], 0
        for name, size in parts:
            slices.append(SiteSlice(name, f"{path}.{name}", offset, size))
            offset += size
        return LoRASite(path, kind, layer, inputs, tuple(slices))

    found = [site("embed_tokens", "embedding", None, vocab, ("embed_tokens", hidden))]
    for n in range(layers):
        found += [
            site(
                f"{n}.qkv", "column", n, hidden, ("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)
            ),
            site(f"{n}.o", "row", n, hidden, ("o_proj", hidden)),
            site(f"{n}.gu", "column", n, hidden, ("gate_proj", inner), ("up_proj", inner)),
            site(f"{n}.down", "row", n, inner, ("down_proj", hidden)),
        ]
    return (*found, site("lm_head", "lm_head", None, hidden, ("lm_head", vocab)))


TINY = _sites(2, 64, 32, 96, 320)
LLAMA_8B = _sites(32, 4096, 1024, 14336, 128256)


def _layout(sites, targets, max_rank, num_adapters, **fields) -> PoolLayout:
    return PoolLayout.make(
        sites,
        targets,
        max_rank=max_rank,
        max_loras_per_batch=num_adapters,
        element_size=2,
        **({"page_ranks": 16} | fields),
    )


def _allocator(layout: PoolLayout) -> RankPageAllocator:
    return RankPageAllocator(
        layout.class_elems, layout.slab_elems, layout.num_slabs, layout.reserved_slabs
    )


def _full_elems(sites, targets, max_rank) -> int:
    """Elements of an adapter of the largest rank on every enabled module, rounded up to pages."""
    ranks = -(-max_rank // 16) * 16
    return sum(
        ranks * (site.in_features + part.out_features)
        for site in sites
        for part in site.slices
        if part.name in targets
    )


def test_page_classes_are_the_distinct_sizes():
    layout = _layout(TINY, LINEAR, 16, 2)
    assert layout.class_elems == (16 * 96, 16 * 128, 16 * 160)
    assert layout.classes[1, 0] == 1  # q_proj 64 + 64
    assert layout.classes[1, 1] == 0  # k_proj 64 + 32
    assert layout.classes[3, 0] == layout.classes[4, 0] == 2
    assert (0, 0) not in layout.classes
    with pytest.raises(KeyError):
        layout.classes[0, 0]


@pytest.mark.parametrize(("rank", "pages"), [(1, 1), (16, 1), (17, 2), (32, 2), (256, 16)])
def test_pages_by_rank(rank, pages):
    layout = _layout(TINY, LINEAR, rank, 1)
    assert layout.num_pages(rank) == layout.max_pages_per_slice == pages


@pytest.mark.parametrize("targets", [LINEAR, ATTENTION, ALL, frozenset({"v_proj"})])
@pytest.mark.parametrize("max_rank", [8, 64, 256])
@pytest.mark.parametrize("num_adapters", [1, 4, 32])
def test_the_pool_is_hardly_larger_than_its_adapters(targets, max_rank, num_adapters):
    layout = _layout(LLAMA_8B, targets, max_rank, num_adapters)
    ideal = num_adapters * _full_elems(LLAMA_8B, targets, max_rank)
    assert ideal <= layout.num_elems <= 1.1 * ideal
    assert layout.nbytes == 2 * layout.num_elems


@pytest.mark.parametrize(
    "fields",
    [
        {"max_rank": 0},
        {"num_adapters": 0},
        {"targets": frozenset()},
        {"targets": frozenset({"q_proj", "query"})},
        {"page_ranks": 0},
    ],
)
def test_impossible_pools_are_refused(fields):
    with pytest.raises(ValueError, match="must be"):
        _layout(**{"sites": TINY, "targets": LINEAR, "max_rank": 8, "num_adapters": 1, **fields})


def test_slots_hold_more_small_adapters_than_full_ones():
    layout = _layout(LLAMA_8B, LINEAR, 256, 4)
    assert layout.num_slots == 1 + 1024
    assert _layout(TINY, frozenset({"o_proj"}), 16, 3).num_slots == 1 + 3 * 2


def _page_classes(layout: PoolLayout, rng: random.Random, *, full: bool) -> list[int]:
    """Pages of a random adapter within the limits; ``full`` is the largest one."""
    keys = sorted(layout.classes)
    if not full:
        keys = rng.sample(keys, rng.randint(1, len(keys)))
    pages = []
    for key in keys:
        rank = layout.max_rank if full else rng.randint(1, layout.max_rank)
        pages += [layout.classes[key]] * layout.num_pages(rank)
    return pages


@pytest.mark.parametrize("targets", [ALL, LINEAR, ATTENTION])
@pytest.mark.parametrize(("max_rank", "num_adapters"), [(8, 2), (64, 3), (100, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_the_last_adapter_always_fits(targets, max_rank, num_adapters, seed):
    """Fill the pool with random adapters, keep any few in use, evict the rest: full ones must still fit."""
    rng = random.Random(seed)
    layout = _layout(TINY, targets, max_rank, num_adapters)
    allocator, resident = _allocator(layout), []
    for _ in range(60):
        for _ in range(rng.randint(1, 40)):
            pages = allocator.alloc(_page_classes(layout, rng, full=rng.random() < 0.1))
            if pages is None:
                break
            resident.append(pages)
        rng.shuffle(resident)
        in_use = resident[: rng.randint(0, num_adapters - 1)]
        for pages in resident[len(in_use) :]:
            allocator.free(pages)
        resident = in_use
        while len(resident) < num_adapters:
            pages = allocator.alloc(_page_classes(layout, rng, full=True))
            assert pages is not None, f"{len(resident)} adapters in use and no room for another"
            resident.append(pages)
        allocator.check_integrity(page for pages in resident for page in pages)


def test_the_worst_scatter_still_leaves_room():
    """Adversary: single pages of one class, in as many slabs as they can hold, all of them in use."""
    layout = _layout(TINY, LINEAR, 64, 4)
    allocator = _allocator(layout)
    for page_class in range(len(layout.class_elems)):
        singles = []
        while (page := allocator.alloc([page_class])) is not None:
            singles += page
        by_slab = {page // layout.slab_elems: page for page in singles}
        per_adapter = Counter(layout.classes.values())[page_class] * layout.max_pages_per_slice
        kept = list(by_slab.values())[: (layout.max_loras_per_batch - 1) * per_adapter]
        allocator.free(set(singles) - set(kept))
        assert allocator.alloc(_page_classes(layout, random.Random(0), full=True)) is not None
        allocator = _allocator(layout)


def test_small_adapters_of_few_modules_use_the_room_of_the_others():
    """Attention-only adapters may take more than attention's share of the pool."""
    layout = _layout(LLAMA_8B, LINEAR, 64, 8)
    allocator, count = _allocator(layout), 0
    q_and_v = [layout.classes[site, part] for site in range(1, 129, 4) for part in (0, 2)]
    while allocator.alloc(q_and_v) is not None:
        count += 1
    share = (
        8 * 4 * 2
    )  # adapters x pages per slice, and o_proj's pages fit q_proj, k_proj's fit v_proj
    assert count >= share


def test_64_adapters_of_rank_8_take_their_own_bytes_in_a_pool_for_rank_256():
    """Within a fifth, slabs that are not full included; the pool was made for adapters 32 times as large."""
    layout = PoolLayout.make(LLAMA_8B, LINEAR, max_rank=256, max_loras_per_batch=4, element_size=2)
    allocator = _allocator(layout)
    classes = [page_class for key, page_class in layout.classes.items()]
    own = 0
    for _ in range(64):
        pages = allocator.alloc([c for c in classes for _ in range(layout.num_pages(8))])
        assert pages is not None
        own += sum(8 * layout.class_elems[c] // layout.page_ranks for c in classes)
    held = sum(not is_free for is_free in _free_slabs(allocator, layout)) * layout.slab_elems
    assert own <= held <= 1.2 * own
    assert layout.num_slots > 64


def _free_slabs(allocator: RankPageAllocator, layout: PoolLayout) -> list[bool]:
    free = set(allocator.free_slabs)
    return [slab in free for slab in range(layout.num_slabs)]
