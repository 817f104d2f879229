"""What adapters may be: the largest rank and the modules that they may change, from flags or from the first adapters."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lorikeet.adapters.sources.source import SourceOptions, public_path, resolve_source
from lorikeet.adapters.spec import read_adapter_config
from lorikeet.adapters.targets import resolve_targets
from lorikeet.config import LoRAPath
from lorikeet.core.sites import LoRASite
from lorikeet.errors import AdapterError, ConfigError

ALL_TARGETS = "all"


@dataclass(frozen=True, slots=True)
class LoRALimits:
    """Largest rank of an adapter, and the names of the modules that it may change."""

    max_rank: int
    targets: frozenset[str]


def resolve_limits(
    sites: Sequence[LoRASite],
    *,
    max_rank: int | None,
    targets: Sequence[str] | None,
    paths: Sequence[LoRAPath],
    sources: SourceOptions,
) -> LoRALimits:
    """Largest rank and allowed modules: as given, else what the adapters that are loaded at start need.

    Args:
        sites: of the model.
        max_rank, targets: ``--max-lora-rank`` and ``--lora-target-modules``; None if not given.
        paths: ``--lora-paths``.
        sources: where these may be read.

    Raises:
        ConfigError: a target module that the model does not have.
        AdapterError: an adapter's configuration cannot be served.
    """
    ranks: list[int] = []
    needed: set[str] = set()
    if targets is None or max_rank is None:
        for source in paths:
            with naming(source):
                directory = resolve_source(source.path, sources)
                modules = resolve_targets(read_adapter_config(directory), sites)
            ranks.append(max(module.rank for module in modules.values()))
            needed.update(sites[site].slices[part].name for site, part in modules)
    return LoRALimits(
        max_rank=max_rank or max(ranks),
        targets=frozenset(needed) if targets is None else _allowed(targets, sites),
    )


def _allowed(targets: Sequence[str], sites: Sequence[LoRASite]) -> frozenset[str]:
    known = frozenset(part.name for site in sites for part in site.slices)
    if list(targets) == [ALL_TARGETS]:
        return known
    if unknown := sorted(set(targets) - known):
        raise ConfigError(
            f"--lora-target-modules: the model has no module named {', '.join(unknown)}; "
            f"known: {', '.join(sorted(known))}, or {ALL_TARGETS} alone"
        )
    return frozenset(targets)


@contextmanager
def naming(source: LoRAPath) -> Generator[None]:
    """Errors inside say which of several adapters they are about."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(
            f"adapter {source.name!r} ({public_path(source.path)}): {error}"
        ) from error
