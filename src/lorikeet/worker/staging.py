"""Copies between host and device that nobody waits for: many small arrays at once, and results on their way back.

Both directions go through pinned memory of torch's caching host allocator, which hands a block out again only when the
copy that used it is done; so nothing here needs a ring of buffers or an event of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

# Every array begins at a multiple of this many bytes, whatever kernels read it with.
ALIGNMENT = 256
_TORCH_TYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
}


def int_type(device: torch.device) -> type[np.integer]:
    """The integer type of a step's arrays: kernels want int32, which is enough; torch's indexing on a CPU wants int64."""
    return np.int32 if device.type == "cuda" else np.int64


def upload_all(
    arrays: Sequence[np.ndarray], device: torch.device, into: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Several arrays on the device, in one copy: views of one tensor.

    Args:
        arrays: int32, int64 or float32, any shape.
        into: uint8 tensor on the device that receives them, each where :func:`offsets_of` says; None allocates one.
    """
    offsets, total = offsets_of(arrays)
    host = torch.empty(total, dtype=torch.uint8, pin_memory=device.type == "cuda")
    raw = host.numpy()
    for array, offset in zip(arrays, offsets, strict=True):
        raw[offset : offset + array.nbytes].view(array.dtype)[:] = array.reshape(-1)
    if into is None:
        into = host.to(device, non_blocking=True)
    else:
        into[:total].copy_(host, non_blocking=True)
    return [
        view_at(into, offset, array.shape, array.dtype)
        for array, offset in zip(arrays, offsets, strict=True)
    ]


def offsets_of(arrays: Sequence[np.ndarray]) -> tuple[list[int], int]:
    """Where each array begins in one buffer, in bytes, and the buffer's size."""
    offsets: list[int] = []
    total = 0
    for array in arrays:
        offsets.append(total)
        total += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, max(total, ALIGNMENT)


def view_at(
    data: torch.Tensor, offset: int, shape: tuple[int, ...], dtype: np.dtype
) -> torch.Tensor:
    """The array that begins at a byte of ``data``."""
    size = math.prod(shape) * dtype.itemsize
    return data[offset : offset + size].view(_TORCH_TYPES[dtype]).view(shape)


def padded(array: np.ndarray, size: int | None, value: int) -> np.ndarray:
    """A row of numbers, made ``size`` long; None leaves it as it is."""
    if size is None or size == len(array):
        return array
    longer = np.full(size, value, dtype=array.dtype)
    longer[: len(array)] = array
    return longer


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """One array on the device."""
    return upload_all([array], device)[0]


class Download:
    """Tensors on their way to the host, while the caller goes on.

    The copies are queued behind what the current stream does now, so the tensors may be overwritten by later work.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._host = tuple(_begin(tensor) for tensor in tensors)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = tensors

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The tensors on the host, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._host


def _begin(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
