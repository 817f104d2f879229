"""Which GPUs this process can use, asked of the driver itself: the HTTP process must not import torch."""

from __future__ import annotations

import ctypes
import functools

_SUCCESS = 0


@functools.cache
def num_cuda_devices() -> int:
    """CUDA devices that are visible (``CUDA_VISIBLE_DEVICES`` counts); 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != _SUCCESS or driver.cuDeviceGetCount(ctypes.byref(count)) != _SUCCESS:
        return 0
    return count.value
