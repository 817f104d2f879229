"""Engines over a disk and a worker that are doubles, for tests of adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.adapter_rig import AdapterRig

MakeRig = Callable[..., AdapterRig]


@pytest.fixture
def make_rig() -> Iterator[MakeRig]:
    rigs: list[AdapterRig] = []

    def make(**options: object) -> AdapterRig:
        rigs.append(AdapterRig(**options))  # pyright: ignore[reportArgumentType]
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig: MakeRig) -> AdapterRig:
    return make_rig()
