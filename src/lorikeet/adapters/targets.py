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

from lorikeet.adapters.patterns import match_patterns
from lorikeet.adapters.spec import ALL_LINEAR, LoRASpec
from lorikeet.core.sites import LoRASite
from lorikeet.errors import AdapterError
from lorikeet.masking import shortened

# From this many names on, PEFT shortens target_modules before it matches, which changes what a full path means when
# layers_to_transform is set (MIN_TARGET_MODULES_FOR_OPTIMIZATION).
_PEFT_SHORTENS_FROM = 20

_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")

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
        AdapterError: none matches, PEFT itself would be ambiguous about it, or a pattern cannot be used.
    """
    _check_ambiguity(spec, sites)
    parts = [
        ((site_index, slice_index), site.kind, part.hf_path)
        for site_index, site in enumerate(sites)
        for slice_index, part in enumerate(site.slices)
    ]
    paths = [path for _, _, path in parts]
    matches = _Matches(spec, paths)
    ranks, alphas = list(spec.rank_pattern.values()), list(spec.alpha_pattern.values())
    modules: dict[ModuleKey, ModuleLoRA] = {}
    for at, (key, kind, path) in enumerate(parts):
        if matches.is_target(at, path, kind):
            rank_at, alpha_at = matches.ranks[at], matches.alphas[at]
            rank = spec.r if rank_at < 0 else ranks[rank_at]
            alpha = spec.lora_alpha if alpha_at < 0 else alphas[alpha_at]
            modules[key] = ModuleLoRA(rank, spec.scale(rank, alpha))
    if not modules:
        known = sorted({part.name for site in sites for part in site.slices})
        raise AdapterError(
            f"target_modules {_show(spec.target_modules)} matches no module of the base model, so the adapter would "
            f"change nothing; the model has {', '.join(known)}"
        )
    return modules


class _Matches:
    """What the patterns of a configuration say of each path; -1 where none matches.

    Attributes:
        ranks, alphas: for each path, the place of its entry in ``rank_pattern`` and ``alpha_pattern``.
    """

    def __init__(self, spec: LoRASpec, paths: Sequence[str]) -> None:
        self._targets = spec.target_modules
        self._is_all = isinstance(self._targets, str) and self._targets.lower() == ALL_LINEAR
        self._names = _names(self._targets)
        self._excluded_names = _names(spec.exclude_modules)
        self._layers = None if spec.layers_to_transform is None else {*spec.layers_to_transform}
        self._has_layers_pattern = bool(spec.layers_pattern)
        target = () if self._is_all else _expressions(self._targets)
        self._hits, self._excluded, self._numbers, self.ranks, self.alphas = match_patterns(
            (
                ("target_modules", "whole", target),
                ("exclude_modules", "whole", _expressions(spec.exclude_modules)),
                ("layers_pattern", "layer", spec.layers_pattern),
                ("rank_pattern", "end", tuple(spec.rank_pattern)),
                ("alpha_pattern", "end", tuple(spec.alpha_pattern)),
            ),
            paths,
        )

    def is_target(self, at: int, path: str, kind: str) -> bool:
        """Whether the adapter changes the module of ``path``, the one at place ``at``."""
        if self._excluded[at] >= 0 or _ends_with(path, self._excluded_names):
            return False
        if self._is_all:
            # PEFT takes every nn.Linear but the output layer; the embedding is not one.
            return kind in ("column", "row")
        if isinstance(self._targets, str):
            return self._hits[at] >= 0
        if path in self._names:
            return True
        return _ends_with(path, self._names) and self._is_in_layers(at, path)

    def _is_in_layers(self, at: int, path: str) -> bool:
        if self._layers is None:
            return True
        if self._has_layers_pattern:
            return self._numbers[at] >= 0 and self._numbers[at] in self._layers
        # Without a pattern the first number in the path is the layer.
        match = _FIRST_NUMBER.match(path)
        return match is not None and int(match[1]) in self._layers


def _names(modules: tuple[str, ...] | str) -> frozenset[str]:
    return frozenset() if isinstance(modules, str) else frozenset(modules)


def _expressions(modules: tuple[str, ...] | str) -> tuple[str, ...]:
    return (modules,) if isinstance(modules, str) else ()


def _ends_with(path: str, names: frozenset[str]) -> bool:
    """Whether ``path`` is one of the names, or ends with one of them after a dot. Costs the same for any number of names."""
    if path in names:
        return True
    dots = (at for at, char in enumerate(path) if char == ".")
    return any(path[at + 1 :] in names for at in dots)


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
    return shortened(repr(targets) if isinstance(targets, str) else repr(sorted(targets)))
