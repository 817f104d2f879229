"""The device tier: what a copy describes, and what it must never overwrite."""

from __future__ import annotations

import pytest
import torch

from lorikeet.adapters.layout import PoolLayout
from lorikeet.adapters.rank_pages import RankPageAllocator
from lorikeet.core.plan import PageCopy
from lorikeet.errors import EngineFault
from lorikeet.lora import device_pool
from lorikeet.lora.device_pool import DevicePool
from lorikeet.lora.loader import load_adapter
from lorikeet.ops.lora.reference import read_factors
from tests.support.lora_runner import AdapterPool, copy_in
from tests.support.peft_adapters import make_adapter, peft_model


@pytest.fixture(scope="module")
def directories(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    return {
        "wide": make_adapter(llama, path / "wide", r=40, alpha=10, targets="all-linear", seed=1),
        "narrow": make_adapter(llama, path / "narrow", r=3, targets=("v_proj",), seed=2),
    }


@pytest.fixture(scope="module")
def adapters(directories, sites, layout):
    return {
        name: load_adapter(name, directory, sites, layout, torch.float32)
        for name, directory in directories.items()
    }


@pytest.fixture
def resident(sites, layout) -> AdapterPool:
    return AdapterPool(sites, layout)


def test_a_copied_adapter_reads_back_as_peft_has_it(resident, adapters, directories, sites, llama):
    slots = {name: resident.add(name, adapter) for name, adapter in adapters.items()}
    for name, slot in slots.items():
        modules = dict(peft_model(llama, directories[name]).named_modules())
        changed = 0
        for index, site in enumerate(sites):
            for part, table in zip(site.slices, resident.pool.table(index).slices, strict=True):
                A_RK, B_OR = read_factors(table, slot)
                layer = modules[f"base_model.model.{part.hf_path}"]
                if not hasattr(layer, "lora_A"):
                    assert len(A_RK) == 0
                    continue
                changed += 1
                assert torch.equal(A_RK, layer.lora_A["default"].weight)
                assert torch.equal(B_OR, layer.lora_B["default"].weight)
                assert float(table.scales_S[slot]) == pytest.approx(layer.scaling["default"])
        assert changed == len(adapters[name].modules)


def test_a_cleared_slot_is_rank_zero_and_its_neighbours_are_not(resident, adapters, sites):
    wide, narrow = (
        resident.add("wide", adapters["wide"]),
        resident.add("narrow", adapters["narrow"]),
    )
    resident.evict("wide")
    for index in range(len(sites)):
        for table in resident.pool.table(index).slices:
            assert int(table.ranks_S[wide]) == 0
            assert table.factors_of(wide) == ()
    assert sum(int(t.ranks_S[narrow]) for t in resident.pool.table(1).slices) == 3
    resident.pool.check_integrity()


def test_clearing_an_empty_slot_does_nothing(resident):
    resident.pool.clear_slot(3)
    resident.pool.check_integrity()


def test_sites_without_an_enabled_module_have_no_table(sites):
    layout = PoolLayout.make(
        sites, frozenset({"v_proj"}), max_rank=8, max_loras_per_batch=1, element_size=4
    )
    pool = DevicePool(sites, layout, torch.float32, torch.device("cpu"))
    with_tables = [site.path for n, site in enumerate(sites) if pool.table(n) is not None]
    assert with_tables == ["layers.0.attention.qkv_proj", "layers.1.attention.qkv_proj"]
    qkv = pool.table(1)
    assert qkv is not None
    (table,) = qkv.slices
    assert (table.offset, table.out_features) == (96, 32)
    assert pool.nbytes == layout.nbytes


def _copy(adapter, slot: int, pages: list[int]) -> PageCopy:
    return PageCopy(version=1, slot=slot, page_ids=pages)


def test_pages_and_slots_in_use_are_never_overwritten(resident, adapters):
    slot = resident.add("narrow", adapters["narrow"])
    pages = list(resident._pages["narrow"])
    before = resident.pool._pool_E.nan_to_num().clone()
    other = resident.allocator.alloc(adapters["narrow"].page_classes)
    for copy in (
        _copy(adapters["narrow"], slot, other),  # the slot is taken
        _copy(adapters["narrow"], slot + 1, [other[0], pages[1]]),  # a page is taken
        _copy(adapters["narrow"], slot + 1, [other[0], other[0]]),  # one page for two
        _copy(adapters["narrow"], slot + 1, other[:1]),  # too few
        _copy(adapters["narrow"], 0, other),  # the base's slot
        _copy(adapters["narrow"], resident.pool.num_slots, other),
        _copy(adapters["narrow"], slot + 1, [other[0], resident.layout.num_elems]),
        _copy(adapters["narrow"], slot + 1, [other[0], resident.layout.slab_elems - 1]),
        _copy(adapters["narrow"], slot + 1, [other[0], -16]),
    ):
        with pytest.raises(EngineFault):
            copy_in(resident.pool, adapters["narrow"], copy)
    assert torch.equal(resident.pool._pool_E.nan_to_num(), before)
    copy_in(resident.pool, adapters["narrow"], _copy(adapters["narrow"], slot + 1, other))
    resident.pool.check_integrity()


def test_a_copy_that_fails_half_way_is_undone_by_clearing_the_slot(resident, adapters, monkeypatch):
    adapter = adapters["wide"]
    pages = resident.allocator.alloc(adapter.page_classes)
    failing = adapter.pages
    failing[-1] = torch.zeros(3)  # does not fit its page: the copy raises after most pages are in
    monkeypatch.setattr(type(adapter), "pages", property(lambda self: failing))
    with pytest.raises(RuntimeError):
        copy_in(resident.pool, adapter, _copy(adapter, 1, pages))
    monkeypatch.undo()
    resident.pool.clear_slot(1)
    copy_in(resident.pool, adapter, _copy(adapter, 1, pages))
    assert int(resident.pool.table(1).slices[0].ranks_S[1]) == 40


@pytest.mark.gpu
def test_pages_reach_a_gpu_in_pieces(sites, layout, adapters, monkeypatch):
    """Through a staging buffer that holds a few pages, behind what the current stream still does with the old ones."""
    monkeypatch.setattr(device_pool, "_BUFFER_BYTES", 4 * 5 * max(adapters["wide"].page_sizes))
    pool = DevicePool(sites, layout, torch.float32, torch.device("cuda"))
    allocator = RankPageAllocator(
        layout.class_elems, layout.slab_elems, layout.num_slabs, layout.reserved_slabs
    )
    for _ in range(2):
        pages = allocator.alloc(adapters["wide"].page_classes)
        copy = PageCopy(version=1, slot=1, page_ids=pages)
        copy_in(pool, adapters["wide"], copy)
        for page, start in zip(adapters["wide"].pages, pages, strict=True):
            assert torch.equal(pool._pool_E[start : start + len(page)].cpu(), page)
        on_cpu = AdapterPool(sites, layout)
        copy_in(on_cpu.pool, adapters["wide"], copy)
        words_LW = on_cpu.pool.page_table.words_SLW[1]
        assert torch.equal(pool.page_table.words_SLW[1].cpu(), words_LW)
        pool.clear_slot(1)
        assert not pool.page_table.ranks_SL[1].any()
        allocator.free(pages)
