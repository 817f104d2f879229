"""Which GPUs this process can use, asked of the driver and of torch's files: the HTTP process must not import torch."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from pathlib import Path

_SUCCESS = 0


@functools.cache
def num_cuda_devices() -> int:
    """CUDA devices that are visible (``CUDA_VISIBLE_DEVICES`` counts); 0 without a driver, or with a torch for CPUs."""
    if not torch_has_cuda():
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != _SUCCESS or driver.cuDeviceGetCount(ctypes.byref(count)) != _SUCCESS:
        return 0
    return count.value


def torch_has_cuda() -> bool:
    """True unless the installed torch says that it was built without CUDA."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    try:
        text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return True
    return re.search(r"^cuda\b[^=\n]*=\s*None\b", text, re.MULTILINE) is None
