"""One engine after the other in one process, on the same model: without LoRA, then with adapters."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from benchmarks.common import Row
from benchmarks.engine.fixtures import linear_sites
from lorikeet.config import LoRAPath, resolve
from lorikeet.config.parsing import config_from_values
from lorikeet.engine.build import build_engine
from lorikeet.engine.core import EngineCore
from lorikeet.models.spec import ModelSpec

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Adapters:
    """Adapters that an engine loads at its start.

    Attributes:
        paths: their directories; requests name them by the directory's name.
        rank: of each.
    """

    paths: tuple[Path, ...]
    rank: int

    @property
    def names(self) -> list[str]:
        return [path.name for path in self.paths]


def engine_values(
    options: dict[str, object], spec: ModelSpec, adapters: Adapters | None, concurrency: int
) -> dict[str, object]:
    """Options of an engine for the benchmark, by field name; ``options`` win.

    Args:
        adapters: None leaves LoRA off.
        concurrency: most requests at a time.
    """
    values: dict[str, object] = {"max_running_requests": max(256, concurrency), "random_seed": 0}
    if adapters is not None:
        targets = sorted({part.name for site in linear_sites(spec) for part in site.slices})
        values |= {
            "enable_lora": True,
            "lora_paths": tuple(LoRAPath(path.name, str(path)) for path in adapters.paths),
            "max_loras_per_batch": len(adapters.paths),
            "max_lora_rank": adapters.rank,
            "lora_target_modules": tuple(targets),
        }
    return values | options


def with_engine(values: dict[str, object], work: Callable[[EngineCore, float], Result]) -> Result:
    """Build an engine, do ``work`` with it and the seconds that it took to start, and give its memory back.

    Raises:
        LorikeetError: the options or files are wrong.
    """
    try:
        return _with_engine(values, work)
    finally:
        # The next engine sees as much memory as this one did.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _with_engine(values: dict[str, object], work: Callable[[EngineCore, float], Result]) -> Result:
    began = time.perf_counter()
    core = build_engine(resolve(config_from_values(values)), report=logger.info, progress=False)
    seconds = time.perf_counter() - began
    # As in a server's engine process: no collection walks over modules and weights while tokens are timed.
    gc.collect()
    gc.freeze()
    try:
        return work(core, seconds)
    finally:
        gc.unfreeze()
        core.close()


def describe_engine(core: EngineCore) -> Row:
    """What the engine decided at its start."""
    return msgspec.structs.asdict(core.info)
