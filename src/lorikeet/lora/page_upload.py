"""An adapter's way to the device: a few large copies on a stream of their own, then every page to its place.

Only two small buffers on the way are pinned. To pin an adapter's own memory takes tens of milliseconds, in which no other
thread can launch a kernel; to copy it into pinned memory takes less, and disturbs nobody (docs/log.md has the figures).

Shape legend: E elements of the pool, B elements of a buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lorikeet.lora.adapter import HostAdapter

# Large enough for the bus and for several threads to fill, small beside any pool.
_BUFFER_BYTES = 2**24


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
    """Copies adapters into a pool on a GPU.

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
            for first, last, data in self._pieces(adapter):
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

    def _pieces(self, adapter: HostAdapter) -> Iterator[tuple[int, int, torch.Tensor]]:
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
