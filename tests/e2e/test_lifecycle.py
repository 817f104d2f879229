"""Adapters that come and go in a real engine, compared with PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorikeet import LLM
from lorikeet.errors import AdapterError, AdapterNotFoundError, RequestError
from tests.e2e.conftest import World
from tests.support.peft_adapters import CONFIG, LINEAR, WEIGHTS, make_adapter, peft_generate

GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
PROMPT = [(7 * i) % 251 for i in range(20)]
RANKS = {"small": 4, "middle": 64, "large": 256}
OPTIONS: dict[str, Any] = {
    "enable_lora": True,
    "lora_target_modules": ("all",),
    "max_lora_rank": 256,
    "max_loras_per_batch": 2,
    "page_size": 4,
}


@pytest.fixture(scope="module")
def ranks(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ranks")
    return {
        name: make_adapter(world.model, root / name, r=rank, targets=LINEAR, seed=rank)
        for name, rank in RANKS.items()
    }


@pytest.fixture
def make_dynamic(make_llm: Callable[..., LLM]) -> Iterator[Callable[..., LLM]]:
    made: list[LLM] = []

    def make(**options: Any) -> LLM:
        made.append(make_llm(**OPTIONS | options))
        return made[-1]

    yield make
    for llm in made:
        llm._core.check_integrity()
        llm.shutdown()


def ask(llm: LLM, name: str | None, prompt: list[int] = PROMPT) -> dict[str, Any]:
    return llm.generate(input_ids=prompt, sampling_params=GREEDY, lora_path=name)


def oracle(world: World, adapter: Path | None, prompt: list[int] = PROMPT) -> list[int]:
    return peft_generate(world.model, adapter, prompt, max_new_tokens=6)[0]


def states(llm: LLM) -> dict[object, object]:
    return {view["name"]: view["state"] for view in llm.adapters()}


def test_ranks_4_64_and_256_come_and_go(
    world: World, ranks: dict[str, Path], make_dynamic: Callable[..., LLM]
) -> None:
    llm = make_dynamic()
    for name, path in ranks.items():
        llm.load_lora_adapter(name, str(path))
    names = [*ranks, None]
    replies = llm.generate(input_ids=[PROMPT] * 4, sampling_params=GREEDY, lora_path=names)
    for name, reply in zip(names, replies, strict=True):
        assert reply["output_ids"] == oracle(world, ranks[name] if name else None), name
    views = {view["name"]: view for view in llm.adapters()}
    assert {name: view["rank"] for name, view in views.items()} == RANKS
    assert all(view["report"] for view in views.values())
    llm.unload_lora_adapter("middle")
    with pytest.raises(RequestError, match="never been loaded"):
        ask(llm, "middle")
    with pytest.raises(AdapterNotFoundError, match="middle"):
        llm.unload_lora_adapter("middle")
    assert ask(llm, "large")["output_ids"] == oracle(world, ranks["large"])
    with pytest.raises(AdapterError, match="already loaded"):
        llm.load_lora_adapter("large", str(ranks["small"]))


def test_a_replaced_name_never_meets_the_old_cache_and_the_old_bytes_find_theirs_again(
    world: World, ranks: dict[str, Path], make_dynamic: Callable[..., LLM]
) -> None:
    llm = make_dynamic()
    first = llm.load_lora_adapter("a", str(ranks["small"]))
    assert ask(llm, "a")["output_ids"] == oracle(world, ranks["small"])
    assert ask(llm, "a")["meta_info"]["cached_tokens"] > 0
    assert llm.load_lora_adapter("a", str(ranks["middle"]), replace=True) != first
    reply = ask(llm, "a")
    assert reply["meta_info"]["cached_tokens"] == 0
    assert reply["output_ids"] == oracle(world, ranks["middle"])
    llm.unload_lora_adapter("a")
    assert llm.load_lora_adapter("a", str(ranks["small"])) == first
    reply = ask(llm, "a")
    assert reply["meta_info"]["cached_tokens"] > 0
    assert reply["output_ids"] == oracle(world, ranks["small"])


@pytest.mark.parametrize("as_bytes", [False, True])
def test_tensors_in_memory(
    world: World, ranks: dict[str, Path], make_dynamic: Callable[..., LLM], as_bytes: bool
) -> None:
    llm = make_dynamic(max_loaded_loras=2)
    path = ranks["middle"]
    weights = path / WEIGHTS
    tensors = weights.read_bytes() if as_bytes else load_file(weights)
    version = llm.load_lora_adapter_from_tensors(
        "t", tensors, json.loads((path / CONFIG).read_text())
    )
    assert ask(llm, "t")["output_ids"] == oracle(world, path)
    for name in ("small", "large"):  # out of host memory, and back
        llm.load_lora_adapter(name, str(ranks[name]))
    assert [v["tier"] for v in llm.adapters() if v["name"] == "t"] == ["disk"]
    assert ask(llm, "t")["output_ids"] == oracle(world, path)
    assert llm.load_lora_adapter("again", str(path)) == version

    def num_directories() -> int:
        return len([*llm._uploads.new().parent.parent.iterdir()])

    before = num_directories()
    with pytest.raises(AdapterError):
        llm.load_lora_adapter_from_tensors("bad", b"not safetensors", {"r": 4})
    with pytest.raises(RequestError, match="lora_name"):
        llm.load_lora_adapter_from_tensors("a\nb", b"", {"r": 4})
    assert num_directories() == before + 1, "the one made by looking"


def test_evicted_adapters_come_back_with_version_and_cache(
    world: World, make_dynamic: Callable[..., LLM]
) -> None:
    llm = make_dynamic(max_loaded_loras=2)
    names = ("qv", "one", "mlp", "gate", "rslora")
    versions = {n: llm.load_lora_adapter(n, str(world.adapters[n])) for n in names}
    for _ in range(2):
        for name in names:
            assert ask(llm, name)["output_ids"] == oracle(world, world.adapters[name]), name
    assert {view["name"]: view["version"] for view in llm.adapters()} == versions
    in_host = [view for view in llm.adapters() if view["tier"] != "disk"]
    assert len(in_host) == 2
    assert ask(llm, "qv")["meta_info"]["cached_tokens"] > 0
    replies = llm.generate(
        input_ids=[PROMPT] * 10, sampling_params=GREEDY, lora_path=[*names, *reversed(names)]
    )
    for name, reply in zip([*names, *reversed(names)], replies, strict=True):
        assert reply["output_ids"] == oracle(world, world.adapters[name]), name


@pytest.mark.parametrize("what", ["gone", "other", "truncated", "directory"])
def test_files_that_change_while_the_adapter_is_evicted(
    world: World, make_dynamic: Callable[..., LLM], tmp_path: Path, what: str
) -> None:
    llm = make_dynamic(max_loaded_loras=2)
    path = tmp_path / "a"
    shutil.copytree(world.adapters["qv"], path)
    llm.load_lora_adapter("a", str(path))
    for name in ("one", "mlp"):
        llm.load_lora_adapter(name, str(world.adapters[name]))
    weights = path / WEIGHTS
    if what == "gone":
        shutil.rmtree(path)
    elif what == "other":
        shutil.copyfile(world.adapters["attention"] / WEIGHTS, weights)
        shutil.copyfile(world.adapters["attention"] / CONFIG, path / CONFIG)
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:2000])
    else:
        weights.unlink()
        weights.mkdir()
    says = {"gone": "does not exist", "other": "have changed"}.get(what, WEIGHTS)
    with pytest.raises(RequestError, match=says) as caught:
        ask(llm, "a")
    assert str(tmp_path) not in str(caught.value)  # that is for the log
    assert ask(llm, "one")["output_ids"] == oracle(world, world.adapters["one"])
    assert states(llm) == {"a": "failed", "one": "loaded", "mlp": "loaded"}
    llm.load_lora_adapter("a", str(world.adapters["gate"]))
    assert ask(llm, "a")["output_ids"] == oracle(world, world.adapters["gate"])


def test_pinned_adapters_stay_and_one_slot_is_left_for_others(
    world: World, make_dynamic: Callable[..., LLM]
) -> None:
    llm = make_dynamic()
    llm.load_lora_adapter("qv", str(world.adapters["qv"]), pinned=True)
    with pytest.raises(AdapterError, match="starvation"):
        llm.load_lora_adapter("one", str(world.adapters["one"]), pinned=True)
    for name in ("one", "mlp", "gate"):
        llm.load_lora_adapter(name, str(world.adapters[name]))
        assert ask(llm, name)["output_ids"] == oracle(world, world.adapters[name])
    assert [v["tier"] for v in llm.adapters() if v["name"] == "qv"] == ["device"]


def test_a_resolver_directory(
    world: World, make_dynamic: Callable[..., LLM], tmp_path: Path
) -> None:
    shutil.copytree(world.adapters["qv"], tmp_path / "mine")
    llm = make_dynamic(lora_resolver_dir=str(tmp_path))
    assert ask(llm, "mine")["output_ids"] == oracle(world, world.adapters["qv"])
    assert states(llm) == {"mine": "loaded"}
    with pytest.raises(RequestError, match="never been loaded"):
        ask(llm, "yours")


def test_a_root_bounds_loads_but_not_the_start(
    world: World, ranks: dict[str, Path], make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    llm = make_llm("qv", **OPTIONS | {"lora_root": (str(tmp_path),), "max_loaded_loras": 2})
    with pytest.raises(AdapterError, match="lora-root"):
        llm.load_lora_adapter("small", str(ranks["small"]))
    for name in ("one", "mlp"):
        shutil.copytree(world.adapters[name], tmp_path / name)
        llm.load_lora_adapter(name, str(tmp_path / name))
    # Evicted by now; read again from where the operator said.
    assert ask(llm, "qv")["output_ids"] == oracle(world, world.adapters["qv"])
    llm.shutdown()


def test_without_lora_there_is_nothing_to_load(make_llm: Callable[..., LLM]) -> None:
    with pytest.raises(RequestError, match="--enable-lora"):
        make_llm().load_lora_adapter("a", "/nowhere")
