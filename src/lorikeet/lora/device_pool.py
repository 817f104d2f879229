"""The device tier: one flat buffer of rank pages, and the page tables that say what lies where.

The pool performs copies and decides none: which pages an adapter gets is written in the plan (``core/plan.py``).

Shape legend: E elements of the pool, B elements of a buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lorikeet.adapters.layout import PoolLayout
from lorikeet.adapters.targets import ModuleKey
from lorikeet.core.plan import PageCopy
from lorikeet.core.sites import LoRASite
from lorikeet.errors import EngineFault
from lorikeet.lora.adapter import HostAdapter
from lorikeet.ops.lora.metadata import RankPageTable, SiteTable, SliceTable

# Large enough for the bus and for several threads to fill, small beside any pool.
_BUFFER_BYTES = 2**24


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
            if (index, part_index) in self.layout.classes:
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


@dataclass(slots=True)
class _Buffer:
    """A piece on its way: in pinned memory, then on the device.

    Attributes:
        sent: the pinned half may be written again.
    """

    host_B: torch.Tensor
    device_B: torch.Tensor
    sent: torch.cuda.Event


class PageUpload:
    """Copies adapters into a pool on a GPU: a few large copies on a stream of their own, then every page to its place.

    Only two small buffers on the way are pinned. To pin an adapter's own memory takes tens of milliseconds, in which no
    other thread can launch a kernel; to copy it into pinned memory takes less, and disturbs nobody (docs/log.md has the
    figures).

    ``write`` may run on another thread than everything else; it returns when the pages are there, and keeps no stream
    but its own waiting.

    Args:
        pool_E: the pool.
        largest_page: elements of the largest page.
    """

    def __init__(self, pool_E: torch.Tensor, largest_page: int) -> None:
        self._pool_E = pool_E
        self._stream = torch.cuda.Stream(pool_E.device)
        self._freed = torch.cuda.Event()
        self._done = torch.cuda.Event()
        self._capacity = max(largest_page, _BUFFER_BYTES // pool_E.element_size())
        # Two: one is filled while the other is sent.
        self._buffers = [self._make_buffer() for _ in range(2)]

    def freed(self) -> None:
        """Pages may be written again once everything is done that is queued on the current stream now."""
        self._freed.record()

    @torch.inference_mode()
    def write(self, adapter: HostAdapter, page_ids: Sequence[int]) -> None:
        """Bring an adapter's pages to the given places."""
        with torch.cuda.device(self._pool_E.device), torch.cuda.stream(self._stream):
            self._stream.wait_event(self._freed)
            for first, last, data in self._runs(adapter):
                self._buffers.reverse()
                staged = self._send(self._buffers[0], data)
                sizes = adapter.page_sizes[first:last]
                places = [
                    self._pool_E[start : start + size]
                    for start, size in zip(page_ids[first:last], sizes, strict=True)
                ]
                # One launch for many pages.
                torch._foreach_copy_(places, list(staged.split(sizes)))  # pyright: ignore[reportPrivateImportUsage]
            self._done.record()
        self._done.synchronize()

    def _send(self, buffer: _Buffer, data: torch.Tensor) -> torch.Tensor:
        """Begin to bring a piece to the device; its device half is free, since the stream runs in order."""
        size = data.numel()
        buffer.sent.synchronize()
        buffer.host_B[:size].copy_(data)
        staged = buffer.device_B[:size].copy_(buffer.host_B[:size], non_blocking=True)
        buffer.sent.record()
        return staged

    def _runs(self, adapter: HostAdapter) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Runs of pages that fit a buffer: first page, end, and their data."""
        first = begin = end = 0
        for page, size in enumerate(adapter.page_sizes):
            if end - begin + size > self._capacity:
                yield first, page, adapter.data[begin:end]
                first, begin = page, end
            end += size
        yield first, len(adapter.page_sizes), adapter.data[begin:end]

    def _make_buffer(self) -> _Buffer:
        host_B = torch.empty(self._capacity, dtype=self._pool_E.dtype, pin_memory=True)
        return _Buffer(host_B, self._pool_E.new_empty(self._capacity), torch.cuda.Event())
