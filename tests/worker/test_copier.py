"""Copies beside the computation: what is described when, and what a failing copy leaves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import cast

import pytest

from lorikeet.core.plan import PageCopy
from lorikeet.errors import EngineFault
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.copier import Copier
from lorikeet.lora.device_pool import DevicePool
from lorikeet.lora.host_memory import HostMemory

PATIENCE_S = 10.0


class Adapter:
    name, nbytes = "a", 1000


class Host:
    def get(self, version: int) -> HostAdapter:
        return cast(HostAdapter, Adapter())


class Pool:
    """A pool that notes what is asked of it; a write waits for ``gate`` and may raise ``error``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.gate = threading.Event()
        self.error: Exception | None = None

    def reserve(self, adapter: HostAdapter, copy: PageCopy) -> None:
        self.calls.append(("reserve", copy.slot))

    def write(self, adapter: HostAdapter, copy: PageCopy) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert self.gate.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error

    def describe(self, adapter: HostAdapter, copy: PageCopy) -> None:
        self.calls.append(("describe", copy.slot))

    def clear_slot(self, slot: int) -> None:
        self.calls.append(("clear", slot))


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def copier(pool: Pool) -> Iterator[Copier]:
    made = Copier(cast(DevicePool, pool), cast(HostMemory, Host()))
    yield made
    pool.gate.set()
    made.close()


def order(version: int, slot: int) -> PageCopy:
    return PageCopy(version=version, slot=slot, page_ids=[0])


def test_a_copy_is_described_when_it_is_collected(copier: Copier, pool: Pool) -> None:
    copier.start(order(7, 1))
    assert copier.collect() == ([], {})
    assert copier.is_busy
    pool.gate.set()
    copier.wait(PATIENCE_S)
    assert pool.calls == [("reserve", 1)]
    assert copier.collect() == ([7], {})
    assert pool.calls == [("reserve", 1), ("describe", 1)]
    assert not copier.is_busy
    assert copier.collect() == ([], {})


def test_waiting_has_an_end(copier: Copier) -> None:
    copier.start(order(7, 1))
    copier.wait(0.001)
    assert copier.collect() == ([], {})


def test_a_copy_that_fails_is_told_and_its_slot_cleared(copier: Copier, pool: Pool) -> None:
    pool.error = RuntimeError("out of memory")
    pool.gate.set()
    copier.start(order(7, 1))
    copier.wait(PATIENCE_S)
    assert copier.collect() == ([], {7: "out of memory"})
    assert pool.calls == [("reserve", 1), ("clear", 1)]


def test_a_bug_is_no_failed_copy(copier: Copier, pool: Pool) -> None:
    pool.error = ValueError("shapes")
    pool.gate.set()
    copier.start(order(7, 1))
    copier.wait(PATIENCE_S)
    with pytest.raises(EngineFault, match="version 7"):
        copier.collect()


def test_what_leaves_the_device_is_logged(
    copier: Copier, pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    pool.gate.set()
    copier.start(order(7, 1))
    copier.wait(PATIENCE_S)
    copier.collect()
    copier.free(1)
    copier.free(1)
    assert [line for line in caplog.messages if "left the device" in line] == [
        "Adapter a left the device: version 7, 0.00 MB"
    ]
