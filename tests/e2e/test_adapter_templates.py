"""Chat templates of adapters, through every kind of source: read when a name is loaded, and only then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorikeet import LLM, AdapterError
from tests.e2e.conftest import World
from tests.support.fake_hub import FakeHub, fake_hub

TEMPLATE = "{{ messages[0].content }}"
FILE = "chat_template.jinja"


@pytest.fixture
def web() -> Iterator[FakeHub]:
    with fake_hub() as server:
        yield server


@pytest.fixture
def adapter(world: World, tmp_path: Path) -> Path:
    directory = tmp_path / "own"
    shutil.copytree(world.adapters["qv"], directory)
    (directory / FILE).write_text(TEMPLATE)
    return directory


@pytest.fixture
def llm(world: World, tmp_path: Path) -> Iterator[LLM]:
    with LLM(
        str(world.model),
        enable_lora=True,
        max_lora_rank=8,
        lora_target_modules=["all"],
        max_loras_per_batch=1,
        max_loaded_loras=1,
        max_total_tokens=1024,
        lora_disk_cache_dir=str(tmp_path / "cache"),
        lora_allow_private_hosts=True,
    ) as made:
        yield made


def news(llm: LLM) -> dict[str, dict[str, str] | None]:
    return llm._core.adapters.take_templates()


def test_a_web_server_and_the_disk_cache(llm: LLM, web: FakeHub, adapter: Path) -> None:
    for path in adapter.iterdir():
        web.files[f"/a/{path.name}"] = path.read_bytes()
    url = f"{web.url}/a"
    for template in (TEMPLATE, "x" + TEMPLATE, TEMPLATE):
        web.files[f"/a/{FILE}"] = template.encode()
        llm.load_lora_adapter("a", url)
        assert news(llm) == {"a": {"default": template}}
        llm.unload_lora_adapter("a")
        assert news(llm) == {"a": None}
    web.files[f"/a/{FILE}"] = b"{% for"
    with pytest.raises(AdapterError, match=f"{url}/{FILE}: the chat template cannot be used"):
        llm.load_lora_adapter("a", url)
    assert news(llm) == {}


def test_an_adapter_that_is_read_again_keeps_its_template(
    llm: LLM, world: World, adapter: Path
) -> None:
    llm.load_lora_adapter("own", str(adapter))
    assert news(llm) == {"own": {"default": TEMPLATE}}
    # The only place in host memory goes to another one; the weights are there to come back, the template is not.
    llm.load_lora_adapter("one", str(world.adapters["one"]))
    assert news(llm) == {"one": {}}
    (adapter / FILE).write_text("{% for")
    llm.generate("Hello", {"max_new_tokens": 2}, lora_path="own")
    assert news(llm) == {}


def test_tensors_bring_none(llm: LLM, adapter: Path) -> None:
    tensors = (adapter / "adapter_model.safetensors").read_bytes()
    config = json.loads((adapter / "adapter_config.json").read_text())
    llm.load_lora_adapter_from_tensors("t", tensors, config)
    assert news(llm) == {"t": {}}
