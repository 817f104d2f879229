"""The parts of an engine's start that need no model: the context, the first adapters, a store without LoRA."""

from __future__ import annotations

import pytest

from lorikeet.adapters.residency import Residency
from lorikeet.adapters.store import AdapterStore
from lorikeet.config import LoRAPath, ServerConfig
from lorikeet.engine.build import load_first
from lorikeet.errors import AdapterError, ConfigError, LoRADisabledError
from lorikeet.lora.host_memory import HostMemory
from lorikeet.lora.reader import AdapterReader
from lorikeet.models.spec import read_model_spec
from lorikeet.worker.spec import resolve_context_length
from tests.support.adapter_rig import Disk
from tests.support.residency_rig import make
from tests.support.tiny_models import make_tiny_model


def test_the_context_is_the_models_unless_less_is_asked_for(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    spec = read_model_spec(make_tiny_model(tmp_path_factory.mktemp("model"), "llama"))
    most = spec.max_context_length
    assert resolve_context_length(ServerConfig(model_path="m"), spec) == most
    assert resolve_context_length(ServerConfig(model_path="m", context_length=7), spec) == 7
    with pytest.raises(ConfigError, match=f"{most + 1} is more than the model's {most} positions"):
        resolve_context_length(ServerConfig(model_path="m", context_length=most + 1), spec)


def test_the_first_adapters_are_in_memory_when_the_start_goes_on() -> None:
    disk = Disk()
    disk.contents = {"/a": "x", "/b": "y"}
    host = HostMemory(AdapterReader(disk.load))
    store = AdapterStore(make(), host)
    phases: list[str] = []
    load_first((LoRAPath("a", "/a"), LoRAPath("b", "/b")), store, phases.append)
    assert phases == ["loading adapter a (1 of 2)", "loading adapter b (2 of 2)"]
    assert store.paths() == {"a": "/a", "b": "/b"}
    assert len(host) == 2
    store.check_integrity({})
    with pytest.raises(AdapterError, match=r"^adapter 'c' \(/c\): .*does not exist"):
        load_first((LoRAPath("c", "/c"),), store, phases.append)
    host.close()


def test_without_lora_the_base_is_all_there_is() -> None:
    store = AdapterStore(Residency.of_pool(None), None)
    assert store.lease(None, 1) == 0
    store.release(0, 1)
    with pytest.raises(LoRADisabledError, match="'a' cannot be used"):
        store.lease("a", 2)
    assert store.find("a") is None
    store.poll()
    assert (store.pending(), store.is_waiting, store.stats()) == ([], False, {})
    assert (store.describe(), store.names([0]), store.take_changes()) == ([], [], None)
    store.check_integrity({1: 0})
