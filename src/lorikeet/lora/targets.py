"""Which modules an adapter changes, by PEFT's own rules, and with which rank and scale.

The rules are those of ``check_target_module_exists`` and ``get_pattern_key`` in PEFT 0.21 (``tuners/tuners_utils.py``,
``utils/other.py``), applied to the paths of the Hugging Face modules that our sites stand for. A name in
``target_modules`` that no module has is without effect there and here; the loader then checks that the weights hold
exactly the modules found here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from lorikeet.core.sites import LoRASite
from lorikeet.errors import AdapterError
from lorikeet.lora.adapter_config import ALL_LINEAR, LoRASpec

# From this many names on, PEFT shortens target_modules before it matches, which changes what a full path means when
# layers_to_transform is set (MIN_TARGET_MODULES_FOR_OPTIMIZATION).
_PEFT_SHORTENS_FROM = 20

Value = TypeVar("Value", int, float)

# (index of the site, index of the slice inside it)
ModuleKey = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ModuleLoRA:
    """Rank of one module's A and B, and the factor of B A x."""

    rank: int
    scale: float


def resolve_targets(spec: LoRASpec, sites: Sequence[LoRASite]) -> dict[ModuleKey, ModuleLoRA]:
    """Modules that the adapter changes, in the order of the sites.

    Raises:
        AdapterError: none matches, or PEFT itself would be ambiguous about it.
    """
    _check_ambiguity(spec, sites)
    modules: dict[ModuleKey, ModuleLoRA] = {}
    for site_index, site in enumerate(sites):
        for slice_index, part in enumerate(site.slices):
            if _is_target(spec, part.hf_path, site.kind):
                rank = _by_pattern(spec.rank_pattern, part.hf_path, spec.r)
                alpha = _by_pattern(spec.alpha_pattern, part.hf_path, spec.lora_alpha)
                modules[site_index, slice_index] = ModuleLoRA(rank, spec.scale(rank, alpha))
    if not modules:
        known = sorted({part.name for site in sites for part in site.slices})
        raise AdapterError(
            f"target_modules {_show(spec.target_modules)} matches no module of the base model, so the adapter would "
            f"change nothing; the model has {', '.join(known)}"
        )
    return modules


def _is_target(spec: LoRASpec, path: str, kind: str) -> bool:
    if _is_excluded(spec.exclude_modules, path):
        return False
    targets = spec.target_modules
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            # PEFT takes every nn.Linear but the output layer; the embedding is not one.
            return kind in ("column", "row")
        return re.fullmatch(targets, path) is not None
    if path in targets:
        return True
    return _ends_with(path, targets) and _in_layers(spec, path)


def _is_excluded(exclude: tuple[str, ...] | str, path: str) -> bool:
    if isinstance(exclude, str):
        return re.fullmatch(exclude, path) is not None
    return path in exclude or _ends_with(path, exclude)


def _ends_with(path: str, names: tuple[str, ...]) -> bool:
    return any(path.endswith(f".{name}") for name in names)


def _in_layers(spec: LoRASpec, path: str) -> bool:
    if spec.layers_to_transform is None:
        return True
    patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in spec.layers_pattern]
    # Without a pattern the first number in the path is the layer.
    for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
        if match := re.match(pattern, path):
            return int(match.groups()[-1]) in spec.layers_to_transform
    return False


def _by_pattern(patterns: dict[str, Value], path: str, default: Value) -> Value:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _check_ambiguity(spec: LoRASpec, sites: Sequence[LoRASite]) -> None:
    targets = spec.target_modules
    if isinstance(targets, str) or spec.layers_to_transform is None:
        return
    if len(set(targets)) < _PEFT_SHORTENS_FROM:
        return
    paths = {part.hf_path for site in sites for part in site.slices}
    if full := sorted(paths.intersection(targets)):
        raise AdapterError(
            f"target_modules lists full paths ({full[0]}) together with layers_to_transform; PEFT is ambiguous about "
            "that, so name each module once and drop layers_to_transform"
        )


def _show(targets: tuple[str, ...] | str) -> str:
    return repr(targets) if isinstance(targets, str) else repr(sorted(targets))
