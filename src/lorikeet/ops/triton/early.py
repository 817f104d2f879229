"""Kernels that begin while the one before them in their stream ends.

The device then launches a kernel, and lets it do what needs nothing of this step, before the last programs of its
predecessor are done: *programmatic dependent launch*, from Hopper on (CUDA C++ Programming Guide). At decode, where a
kernel takes a few microseconds, this saves about one of them. Three rules keep it right:

* only after :func:`follow` does a program read what other kernels of the step write, or write what they read;
* every program calls it, for a kernel that is done says that those before it are done, too;
* it tells the next kernel to begin when those before are done, so a kernel that begins early has one that still runs
  before it, not several.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

CACHE_LINE = 128
"""Bytes."""

_FIRST_CAPABILITY = (9, 0)


@triton.jit
def follow(EARLY):
    """Wait for the kernels before this one, and let the next one begin."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(ptr):
    """Bring the lines that hold these addresses into the L2 cache; does not wait for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [ptr.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@lru_cache
def early(device: torch.device) -> dict[str, bool]:
    """Constants of a launch: ``EARLY`` for the kernel, ``launch_pdl`` for Triton."""
    can = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY
    return {"EARLY": can, "launch_pdl": can}
