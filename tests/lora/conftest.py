"""One tiny model for the tests of adapters, and a pool layout that allows everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorikeet.adapters.layout import PoolLayout
from lorikeet.core.sites import LoRASite
from lorikeet.models.spec import read_model_spec
from tests.support.tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def sites(llama) -> tuple[LoRASite, ...]:
    return read_model_spec(llama).lora_sites


@pytest.fixture(scope="session")
def layout(sites) -> PoolLayout:
    names = frozenset(part.name for site in sites for part in site.slices)
    return PoolLayout.make(sites, names, max_rank=64, max_loras_per_batch=4, element_size=4)
