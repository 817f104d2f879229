"""An adapter's way to the device: a few large copies on a stream of their own, then every page to its place.

Shape legend: E elements of the pool, B elements of the staging buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lorikeet.lora.adapter import HostAdapter

# Large enough for the bus, small beside any pool.
_STAGING_BYTES = 2**25


class PageUpload:
    """Copies adapters into a pool on a GPU.

    ``write`` may run on another thread than everything else; it returns when the pages are there, and keeps no stream
    but its own waiting.

    Args:
        pool_E: the pool.
    """

    def __init__(self, pool_E: torch.Tensor) -> None:
        self._pool_E = pool_E
        self._stream = torch.cuda.Stream(pool_E.device)
        self._freed = torch.cuda.Event()
        self._done = torch.cuda.Event()
        self._staging_B: torch.Tensor | None = None

    def freed(self) -> None:
        """Pages may be written again once everything is done that is queued on the current stream now."""
        self._freed.record()

    @torch.inference_mode()
    def write(self, adapter: HostAdapter, page_ids: Sequence[int]) -> None:
        """Bring an adapter's pages to the given places."""
        with torch.cuda.device(self._pool_E.device), torch.cuda.stream(self._stream):
            self._stream.wait_event(self._freed)
            for first, last, data in self._pieces(adapter):
                staged = self._staging(data.numel())
                staged.copy_(data, non_blocking=True)
                sizes = adapter.page_sizes[first:last]
                places = [
                    self._pool_E[start : start + size]
                    for start, size in zip(page_ids[first:last], sizes, strict=True)
                ]
                # One launch for many pages; the next piece waits for it, since it has the same staging buffer.
                torch._foreach_copy_(places, list(staged.split(sizes)))  # pyright: ignore[reportPrivateImportUsage]
            self._done.record()
        self._done.synchronize()

    def _pieces(self, adapter: HostAdapter) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Runs of pages that fit the staging buffer: first page, end, and their data."""
        most = self._capacity(max(adapter.page_sizes))
        first = begin = end = 0
        for page, size in enumerate(adapter.page_sizes):
            if end - begin + size > most:
                yield first, page, adapter.data[begin:end]
                first, begin = page, end
            end += size
        yield first, len(adapter.page_sizes), adapter.data[begin:end]

    def _capacity(self, largest_page: int) -> int:
        return max(largest_page, _STAGING_BYTES // self._pool_E.element_size())

    def _staging(self, size: int) -> torch.Tensor:
        if self._staging_B is None or len(self._staging_B) < size:
            self._staging_B = self._pool_E.new_empty(self._capacity(size))
        return self._staging_B[:size]
