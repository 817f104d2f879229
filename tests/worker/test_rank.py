"""A rank that is built: a worker with its memory divided, or a refusal that says what finds no room."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorikeet.config import LoRAPath, ServerConfig, resolve
from lorikeet.core.adapters import AdapterFacts, Origin, ReadOrder
from lorikeet.errors import ConfigError
from lorikeet.models.spec import read_model_spec
from lorikeet.parallel.group import SingleRank
from lorikeet.worker import rank as building
from lorikeet.worker.rank import Rank, build_rank
from lorikeet.worker.spec import WorkerSpec
from tests.support.peft_adapters import make_adapter
from tests.support.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(model, tmp_path_factory.mktemp("adapter"), r=4, targets=("q_proj",))


def build(model: Path, phases: list[str], *adapters: Path) -> Rank:
    paths = tuple(LoRAPath(path.name, str(path)) for path in adapters)
    config = ServerConfig(
        model_path=str(model), device="cpu", lora_paths=paths, max_total_tokens=1024
    )
    spec = WorkerSpec.resolve(resolve(config), read_model_spec(model))
    return build_rank(spec, model, model, SingleRank(), report=phases.append, progress=False)


def test_without_lora_there_is_no_host_memory(model: Path) -> None:
    phases: list[str] = []
    rank = build(model, phases)
    assert (rank.lora, rank.worker.host) == (None, None)
    assert (rank.memory.num_tokens, rank.memory.pool_bytes) == (1024, 0)
    assert phases == [f"loading the weights of {model}", "preparing the device"]
    rank.close()


def test_with_lora_adapters_are_read_into_host_memory(model: Path, adapter: Path) -> None:
    rank = build(model, [], adapter)
    assert rank.lora is not None
    assert rank.worker.host is rank.lora.host
    assert rank.memory.pool_bytes == rank.lora.plan.layout.nbytes
    assert rank.lora.plan.limits.targets == {"q_proj"}
    host = rank.lora.host
    host.read(1, ReadOrder(name="a", origins=(Origin(str(adapter), "operator"),)))
    host.pending()[0].result(60)
    ((_, facts),) = host.reads_done()
    assert isinstance(facts, AdapterFacts)
    assert (facts.rank, facts.targets, facts.report["rank"]) == (4, ("q_proj",), 4)
    host.keep(1, 1)
    assert host.nbytes == facts.nbytes
    rank.close()


@pytest.mark.parametrize(
    ("free", "words"),
    [
        ([1000], "only 0.00 MB is left for weights. Use a smaller --dtype"),
        ([10**12, 1000], "only 0.00 MB is left for adapters. Lower --max-loras-per-batch"),
    ],
)
def test_what_finds_no_room_is_refused_before_it_is_made(
    model: Path,
    adapter: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: list[int],
    words: str,
) -> None:
    """The room that a GPU would have, at the start and beside the weights."""
    monkeypatch.setattr(building, "free_bytes", lambda device: free.pop(0))
    monkeypatch.setattr(building, "build_pool", lambda *args, **kwargs: pytest.fail("it is made"))
    with pytest.raises(ConfigError, match=f"^not enough memory: .*{words}"):
        build(model, [], adapter)
