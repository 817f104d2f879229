"""What adapters may be: as given, or as the first of them need it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorikeet.adapters.limits import LoRALimits, resolve_limits
from lorikeet.adapters.sources.source import SourceOptions
from lorikeet.config import LoRAPath
from lorikeet.core.sites import LoRASite, SiteSlice
from lorikeet.errors import AdapterError, ConfigError

SITES = (
    LoRASite(
        "layers.0.qkv",
        "column",
        0,
        8,
        (
            SiteSlice("q_proj", "layers.0.q_proj", 0, 8),
            SiteSlice("v_proj", "layers.0.v_proj", 8, 4),
        ),
    ),
    LoRASite("layers.0.o", "row", 0, 8, (SiteSlice("o_proj", "layers.0.o_proj", 0, 8),)),
)


def adapter(directory: Path, name: str, *, r: int, targets: list[str]) -> LoRAPath:
    """A configuration is all that is read."""
    path = directory / name
    path.mkdir()
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 1, "target_modules": targets}
    (path / "adapter_config.json").write_text(json.dumps(config))
    (path / "adapter_model.safetensors").touch()
    return LoRAPath(name, str(path))


def limits(
    *paths: LoRAPath, max_rank: int | None = None, targets: list[str] | None = None
) -> LoRALimits:
    sources = SourceOptions().trusted()
    return resolve_limits(SITES, max_rank=max_rank, targets=targets, paths=paths, sources=sources)


def test_what_is_given_counts(tmp_path: Path) -> None:
    small = adapter(tmp_path, "a", r=4, targets=["q_proj"])
    found = limits(small, max_rank=16, targets=["o_proj"])
    assert found == LoRALimits(16, frozenset({"o_proj"}))
    assert limits(max_rank=16, targets=["all"]).targets == {"q_proj", "v_proj", "o_proj"}


def test_what_is_not_given_is_what_the_adapters_need(tmp_path: Path) -> None:
    paths = [
        adapter(tmp_path, "a", r=4, targets=["q_proj"]),
        adapter(tmp_path, "b", r=6, targets=["v_proj"]),
    ]
    assert limits(*paths) == LoRALimits(6, frozenset({"q_proj", "v_proj"}))
    assert limits(*paths, max_rank=32) == LoRALimits(32, frozenset({"q_proj", "v_proj"}))
    assert limits(*paths, targets=["o_proj"]) == LoRALimits(6, frozenset({"o_proj"}))


def test_a_module_that_the_model_does_not_have() -> None:
    with pytest.raises(
        ConfigError, match=r"no module named up_proj; known: o_proj, q_proj, v_proj"
    ):
        limits(max_rank=8, targets=["q_proj", "up_proj"])


def test_an_adapter_that_cannot_be_served_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter 'a' \(.*/a\): "):
        limits(adapter(tmp_path, "a", r=4, targets=["up_proj"]))
