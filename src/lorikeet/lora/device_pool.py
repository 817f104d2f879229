"""The device tier: one flat buffer of rank pages, and the page tables that say what lies where.

The pool performs copies and decides none: which pages an adapter gets is written in the plan (``core/plan.py``).

Shape legend: E elements of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorikeet.adapters.layout import PoolLayout
from lorikeet.adapters.targets import ModuleKey
from lorikeet.core.plan import PageCopy
from lorikeet.core.sites import LoRASite
from lorikeet.errors import EngineFault
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.page_upload import PageUpload
from lorikeet.ops.lora.metadata import RankPageTable, SiteTable, SliceTable


class DevicePool:
    """Device memory for adapters.

    Args:
        sites: as this rank holds them.
        layout: made from the same sites.
        dtype: of the weights, the model's own.
        rank: this rank of ``tp_size``; decides which token ids its part of a divided embedding begins with.
    """

    def __init__(
        self,
        sites: Sequence[LoRASite],
        layout: PoolLayout,
        dtype: torch.dtype,
        device: torch.device,
        *,
        rank: int = 0,
    ) -> None:
        self.layout = layout
        self._pool_E = torch.empty(layout.num_elems, dtype=dtype, device=device)
        self.page_table = RankPageTable(
            num_slots=layout.num_slots,
            num_slices=len(layout.classes),
            max_pages=layout.max_pages_per_slice,
            device=device,
        )
        self._upload: PageUpload | None = None
        if device.type == "cuda":
            self._upload = PageUpload(self._pool_E, max(layout.class_elems))
        self._slices: dict[ModuleKey, SliceTable] = {}
        self._tables: dict[int, SiteTable] = {}
        for index, site in enumerate(sites):
            tables = self._make_tables(index, site)
            if tables:
                in_start = rank * site.in_features if site.kind == "embedding" else 0
                self._tables[index] = SiteTable(tables, in_start)
        # Pages that a slot describes, by slot, and all of them: the only record of what must not be overwritten.
        self._pages: dict[int, tuple[int, ...]] = {}
        self._in_use: set[int] = set()

    @property
    def dtype(self) -> torch.dtype:
        return self._pool_E.dtype

    @property
    def device(self) -> torch.device:
        return self._pool_E.device

    @property
    def nbytes(self) -> int:
        return self._pool_E.numel() * self._pool_E.element_size()

    @property
    def num_slots(self) -> int:
        return self.layout.num_slots

    def table(self, site: int) -> SiteTable | None:
        """Page tables of a site; None if adapters may change nothing there."""
        return self._tables.get(site)

    def copy_in(self, adapter: HostAdapter, copy: PageCopy) -> None:
        """``reserve``, ``write`` and ``describe`` at once.

        Raises:
            EngineFault: as ``reserve``.
        """
        self.reserve(adapter, copy)
        self.write(adapter, copy)
        self.describe(adapter, copy)

    def reserve(self, adapter: HostAdapter, copy: PageCopy) -> None:
        """Note that a slot and pages are an adapter's. The slot is rank 0 until it is described.

        Raises:
            EngineFault: the plan names pages or a slot that something else still uses, or that do not fit.
        """
        self._check_copy(adapter, copy)
        self._pages[copy.slot] = tuple(copy.page_ids)
        self._in_use.update(copy.page_ids)

    def write(self, adapter: HostAdapter, copy: PageCopy) -> None:
        """Fill reserved pages. Touches nothing else, so that it may run on another thread than everything else here."""
        if self._upload is not None:
            self._upload.write(adapter, copy.page_ids)
            return
        for page, start, size in zip(adapter.pages, copy.page_ids, adapter.page_sizes, strict=True):
            self._pool_E[start : start + size].copy_(page)

    def describe(self, adapter: HostAdapter, copy: PageCopy) -> None:
        """Let a slot mean the adapter whose pages are written."""
        records: dict[int, tuple[Sequence[int], int, float]] = {}
        for module in adapter.modules:
            table = self._slices[module.site, module.part]
            pages = copy.page_ids[module.first_page : module.first_page + module.num_pages]
            table.remember(copy.slot, pages, module.rank, module.scale)
            records[table.index] = (pages, module.rank, module.scale)
        self.page_table.put(copy.slot, records)

    def clear_slot(self, slot: int) -> None:
        """Make a slot rank 0 everywhere; its pages may be overwritten from now on, once queued steps are done."""
        pages = self._pages.pop(slot, None)
        if pages is None:
            return
        self._in_use.difference_update(pages)
        for table in self._slices.values():
            table.forget(slot)
        self.page_table.clear(slot)
        if self._upload is not None:
            self._upload.freed()

    def check_integrity(self) -> None:
        """Assert that no two slots share memory."""
        starts = sorted(page for pages in self._pages.values() for page in pages)
        assert len(set(starts)) == len(starts), "two adapters share a page"
        assert self._in_use == set(starts), "a page is noted as in use and belongs to no slot"

    def _make_tables(self, index: int, site: LoRASite) -> tuple[SliceTable, ...]:
        tables: list[SliceTable] = []
        for part_index, part in enumerate(site.slices):
            if self.layout.is_enabled(index, part_index):
                table = SliceTable(
                    self._pool_E,
                    in_features=site.in_features,
                    out_features=part.out_features,
                    offset=part.offset,
                    page_ranks=self.layout.page_ranks,
                    table=self.page_table,
                    index=len(self._slices),
                )
                self._slices[index, part_index] = table
                tables.append(table)
        return tuple(tables)

    def _check_copy(self, adapter: HostAdapter, copy: PageCopy) -> None:
        """The one place that asserts that pages in use are never overwritten."""
        if not 0 < copy.slot < self.layout.num_slots or copy.slot in self._pages:
            raise EngineFault(f"slot {copy.slot} for version {copy.version} is not free")
        if len(copy.page_ids) != len(adapter.page_sizes):
            raise EngineFault(
                f"version {copy.version} has {len(adapter.page_sizes)} pages, the plan {len(copy.page_ids)}"
            )
        if not self._in_use.isdisjoint(copy.page_ids) or len(set(copy.page_ids)) != len(
            copy.page_ids
        ):
            raise EngineFault(f"a page for version {copy.version} is in use")
        slab = self.layout.slab_elems
        for start, size in zip(copy.page_ids, adapter.page_sizes, strict=True):
            if start < 0 or start % slab + size > slab or start + size > self.layout.num_elems:
                raise EngineFault(
                    f"page [{start}, {start + size}) does not lie in a slab of {slab}"
                )
