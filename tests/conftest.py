"""What every test gets: one thread, no network, fixed examples, and poisoned memory where tensors are made."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

# Before torch is imported, and inherited by the servers that tests start: test processes share the cores, and a sum
# in one thread has one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton's interpreter runs the kernels on the CPU. Triton reads this once, when it is imported. scripts/gpu_check.sh
# sets the other variable, for kernels that are compiled.
if os.environ.get("LORIKEET_TEST_GPU") != "1":
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell lets its jobs in the background ignore Ctrl-C, and nohup lets them ignore the end of the terminal. Tests send
# both, and the servers that they start inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest
from hypothesis import settings

settings.register_profile("lorikeet", derandomize=True, deadline=None, database=None)
settings.load_profile("lorikeet")

POISONED = {"ops", "lora", "worker"}
KEPT_GPU_BYTES = 2**30


@contextmanager
def poison() -> Iterator[None]:
    """Memory that torch hands out uninitialised is NaN, or the largest integer."""
    import torch
    from torch.utils import deterministic

    assert deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(mode=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=False)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """A row that a kernel forgot to write shows, instead of passing on the zeros of fresh memory."""
    if POISONED.isdisjoint(request.node.path.relative_to(request.config.rootpath).parts):
        yield
        return
    with poison():
        yield


@pytest.fixture(autouse=True)
def returned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Test processes share a GPU: what a test leaves in torch's cache, no other process gets."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        if torch.cuda.memory_reserved() > KEPT_GPU_BYTES:
            gc.collect()
            torch.cuda.empty_cache()
