"""A tiny base model and twelve adapters of different kinds, made once for all end-to-end tests of a worker process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lorikeet import LLM
from tests.support.peft_adapters import ATTENTION, LINEAR, MLP, make_adapter
from tests.support.tiny_models import make_tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "qv": {"r": 8, "targets": ["q_proj", "v_proj"]},
    "all": {"r": 16, "targets": LINEAR},
    "big": {"r": 64, "targets": LINEAR},
    "rslora": {"r": 8, "targets": ["q_proj", "v_proj"], "use_rslora": True},
    "one": {"r": 1, "targets": ["o_proj"]},
    "attention": {"r": 4, "targets": ATTENTION},
    "mlp": {"r": 24, "targets": MLP, "dtype": torch.bfloat16},
    "gate": {"r": 5, "targets": ["gate_proj"], "dtype": torch.float16},
    "patterns": {
        "r": 8,
        "targets": LINEAR,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 20},
        "alpha_pattern": {"v_proj": 3},
    },
    "layer": {"r": 8, "targets": ["k_proj", "up_proj"], "layers_to_transform": [1]},
    "regex": {"r": 12, "targets": r".*\.0\.(self_attn\.[qk]_proj|mlp\.up_proj)"},
    "head": {"r": 8, "targets": ["embed_tokens", "lm_head", "q_proj"]},
}


@dataclass(frozen=True)
class World:
    """A base model and adapters on disk."""

    model: Path
    adapters: dict[str, Path]

    def path(self, name: str | None) -> Path | None:
        return None if name is None else self.adapters[name]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    model = make_tiny_model(root, "llama")
    adapters = {
        name: make_adapter(model, root / name, seed=seed, **kind)
        for seed, (name, kind) in enumerate(KINDS.items(), 1)
    }
    return World(model, adapters)


@pytest.fixture
def make_llm(world: World) -> Callable[..., LLM]:
    """An offline engine on the tiny model with the named adapters."""

    def make(*names: str, **options: Any) -> LLM:
        paths = {name: str(world.adapters[name]) for name in names}
        return LLM(str(world.model), lora_paths=paths, **{"max_total_tokens": 4096} | options)

    return make
