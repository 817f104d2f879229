"""The LoRA part of an engine's start: limits from flags or adapters, the pool, the first adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorikeet.adapters.layout import PoolLayout
from lorikeet.adapters.rank_pages import RankPageAllocator
from lorikeet.adapters.registry import AdapterRegistry
from lorikeet.adapters.residency import Residency
from lorikeet.adapters.sources.resolver import Resolver
from lorikeet.adapters.sources.source import SourceOptions, open_source, public_path, resolve_source
from lorikeet.adapters.sources.transfer import Transfer
from lorikeet.adapters.spec import read_adapter_config
from lorikeet.adapters.targets import resolve_targets
from lorikeet.config import LoRAPath, LoRASettings, Settings
from lorikeet.core.sites import LoRASite
from lorikeet.engine.adapter_reader import AdapterReader, Trust
from lorikeet.engine.adapter_templates import read_templates
from lorikeet.engine.adapters import LoadedAdapters
from lorikeet.errors import AdapterError, ConfigError
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.attach import attach_lora
from lorikeet.lora.base_weights import checkpoint_weight
from lorikeet.lora.device_pool import DevicePool
from lorikeet.lora.host_cache import HostCache
from lorikeet.lora.loader import load_adapter
from lorikeet.lora.report import adapter_report
from lorikeet.models.decoder import Decoder
from lorikeet.ops.lora.select import BackendName, make_backend
from lorikeet.worker.memory import size_text

ALL_TARGETS = "all"


@dataclass(frozen=True, slots=True)
class LoRALimits:
    """What an adapter may be: from the flags, or from the adapters named at start."""

    max_rank: int
    targets: frozenset[str]


@dataclass(frozen=True, slots=True)
class LoRAParts:
    """The parts of an engine that exist only with LoRA.

    Attributes:
        backend: the kernels, from ``--lora-backend``.
    """

    limits: LoRALimits
    backend: BackendName
    pool: DevicePool
    host: HostCache
    residency: Residency
    store: LoadedAdapters


def resolve_limits(config: LoRASettings, sites: tuple[LoRASite, ...]) -> LoRALimits:
    """Largest rank and allowed modules: as given, else what the adapters of ``--lora-paths`` need.

    Raises:
        ConfigError: a target module that the model does not have.
        AdapterError: an adapter's configuration cannot be served.
    """
    known = {part.name for site in sites for part in site.slices}
    wanted = config.lora_target_modules
    if wanted == (ALL_TARGETS,):
        targets = frozenset(known)
    elif wanted is not None:
        targets = frozenset(wanted)
        if unknown := sorted(targets - known):
            raise ConfigError(
                f"--lora-target-modules: the model has no module named {', '.join(unknown)}; "
                f"known: {', '.join(sorted(known))}, or {ALL_TARGETS} alone"
            )
    else:
        targets = frozenset()
    max_rank = config.max_lora_rank or 0
    if wanted is None or config.max_lora_rank is None:
        sources = SourceOptions.from_config(config).trusted()
        ranks, names = _needs(config.lora_paths, sites, sources)
        max_rank = config.max_lora_rank or max(ranks)
        targets = targets if wanted is not None else names
    return LoRALimits(max_rank, targets)


def _needs(
    paths: tuple[LoRAPath, ...], sites: tuple[LoRASite, ...], sources: SourceOptions
) -> tuple[list[int], frozenset[str]]:
    """Largest rank of each adapter, and the modules that any of them changes."""
    ranks: list[int] = []
    names: set[str] = set()
    for source in paths:
        with naming(source):
            directory = resolve_source(source.path, sources)
            modules = resolve_targets(read_adapter_config(directory), sites)
        ranks.append(max(module.rank for module in modules.values()))
        names.update(sites[site].slices[part].name for site, part in modules)
    return ranks, frozenset(names)


@contextmanager
def naming(source: LoRAPath) -> Iterator[None]:
    """Errors inside say which of several adapters they are about."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(
            f"adapter {source.name!r} ({public_path(source.path)}): {error}"
        ) from error


def build_lora(
    config: Settings, model_dir: Path, sites: tuple[LoRASite, ...], model: Decoder
) -> LoRAParts:
    """Make the pool, of the model's type and on its device, and put LoRA layers where the limits allow adapters."""
    weight = next(model.parameters())
    dtype, device = weight.dtype, weight.device
    limits = resolve_limits(config.lora, sites)
    layout = PoolLayout.make(
        sites,
        limits.targets,
        max_rank=limits.max_rank,
        max_loras_per_batch=config.lora.max_loras_per_batch,
        element_size=dtype.itemsize,
    )
    _check_pool(config.lora, layout, limits, device)
    pool = DevicePool(sites, layout, dtype, device)
    name = config.lora.lora_backend
    backend = make_backend(
        name,
        pool.page_table,
        page_ranks=layout.page_ranks,
        deterministic=config.lora.lora_deterministic,
    )
    attach_lora(model, sites, pool, backend)
    host = HostCache()
    residency = Residency(
        allocator=RankPageAllocator(
            layout.class_elems, layout.slab_elems, layout.num_slabs, layout.reserved_slabs
        ),
        num_slots=layout.num_slots,
        policy=config.lora.lora_eviction_policy,
        max_pinned=config.lora.max_loras_per_batch - 1,
        max_host=config.lora.max_loaded_loras,
    )
    store = LoadedAdapters(
        registry=AdapterRegistry(),
        residency=residency,
        host=host,
        reader=_reader(config, model_dir, sites, pool),
    )
    return LoRAParts(limits, name, pool, host, residency, store)


def _check_pool(
    config: LoRASettings, layout: PoolLayout, limits: LoRALimits, device: torch.device
) -> None:
    """Refuse a pool that a GPU has no room for.

    Raises:
        ConfigError: with both numbers and the flags to lower.
    """
    if device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0]
    if layout.nbytes > free:
        raise ConfigError(
            f"not enough device memory for adapters: {config.max_loras_per_batch} of rank {limits.max_rank} need "
            f"{size_text(layout.nbytes)}, {size_text(free)} is free beside the weights. Lower --max-loras-per-batch or "
            "--max-lora-rank, or name fewer --lora-target-modules"
        )


def _reader(
    config: Settings, model_dir: Path, sites: tuple[LoRASite, ...], pool: DevicePool
) -> AdapterReader:
    sources = SourceOptions.from_config(config.lora)
    base_weight = checkpoint_weight(model_dir) if config.load_format != "dummy" else None

    resolver, options = None, {"operator": sources.trusted(), "request": sources}
    if config.lora.lora_resolver_dir is not None:
        found_in = Path(config.lora.lora_resolver_dir)
        resolver = Resolver(found_in, roots=sources.roots)
        options["resolver"] = sources.within(found_in)

    def load(
        name: str, path: str, *, trust: Trust, is_first: bool, transfer: Transfer
    ) -> HostAdapter:
        with open_source(path, options[trust], transfer) as directory:
            adapter = load_adapter(
                name,
                directory,
                sites,
                pool.layout,
                pool.dtype,
                base_weight=base_weight,
            )
            # A reload is for the weights: the name keeps the template that it was loaded with.
            return (
                replace(adapter, chat_templates=read_templates(directory)) if is_first else adapter
            )

    return AdapterReader(
        load,
        report=lambda adapter: adapter_report(adapter, sites),
        resolver=resolver,
        download_seconds=config.lora.lora_download_timeout,
    )


def no_residency() -> Residency:
    """What the scheduler asks when LoRA is off: it knows the base model alone."""
    nothing = RankPageAllocator((), 1, 0, ())
    return Residency(allocator=nothing, num_slots=1, policy="lru", max_pinned=0)


def load_first(
    paths: tuple[LoRAPath, ...], store: LoadedAdapters, report: Callable[[str], None]
) -> None:
    """Load the adapters of ``--lora-paths``; one that fails is fatal and named."""
    for number, source in enumerate(paths, 1):
        report(f"loading adapter {source.name} ({number} of {len(paths)})")
        with naming(source):
            store.load(source)
