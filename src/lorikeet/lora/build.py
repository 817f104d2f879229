"""What a rank has only with LoRA: its pool on the device, the layers that add adapters, its host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from lorikeet.adapters.sources.resolver import Resolver
from lorikeet.adapters.sources.source import SourceOptions, open_source
from lorikeet.adapters.sources.transfer import Transfer
from lorikeet.adapters.templates import read_templates
from lorikeet.core.adapters import Trust
from lorikeet.core.sites import LoRASite
from lorikeet.layers.batch import ForwardBatch
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.base_weights import BaseWeight
from lorikeet.lora.device_pool import DevicePool
from lorikeet.lora.host_memory import HostMemory
from lorikeet.lora.layers import LoRAEmbedding, LoRALinear, LoRAStreams, SplitLayer
from lorikeet.lora.loader import load_adapter
from lorikeet.lora.pool_plan import PoolPlan
from lorikeet.lora.reader import AdapterReader
from lorikeet.lora.report import adapter_report
from lorikeet.ops.lora.api import LoRABackend
from lorikeet.ops.select import BackendName, make_backend


@dataclass(frozen=True, slots=True)
class LoRAParts:
    """The parts of a rank that exist only with LoRA.

    Attributes:
        backend: ``--lora-backend``, ``auto`` resolved.
    """

    plan: PoolPlan
    backend: BackendName
    pool: DevicePool
    host: HostMemory


class Model(Protocol):
    """What :class:`lorikeet.models.decoder.Decoder` is to this module."""

    def get_submodule(self, target: str, /) -> nn.Module: ...

    def on_begin(self, begin: Callable[[ForwardBatch], None], /) -> None: ...


def build_pool(
    model: Model,
    plan: PoolPlan,
    device: torch.device,
    *,
    backend: BackendName,
    deterministic: bool,
    rank: int,
) -> DevicePool:
    """Make the pool, and put LoRA layers where the plan allows adapters.

    Args:
        deterministic: see ``--lora-deterministic``.
        rank: this rank's number.
    """
    pool = DevicePool(plan.own_sites, plan.layout, plan.dtype, device, rank=rank)
    kernels = make_backend(
        backend,
        pool.page_table,
        page_ranks=plan.layout.page_ranks,
        deterministic=deterministic,
    )
    attach_lora(model, plan.sites, pool, kernels)
    return pool


def attach_lora(
    model: Model, sites: Sequence[LoRASite], pool: DevicePool, backend: LoRABackend[Any, Any]
) -> list[str]:
    """Replace the module of every site that adapters may change, and let the model begin the backend's steps.

    Returns:
        The paths of the replaced modules, in the order of the sites.

    Raises:
        AttributeError: the model has no module at a site's path, so it is not the model that declared the sites.
    """
    replaced: list[str] = []
    streams = LoRAStreams(pool.device) if pool.device.type == "cuda" else None
    for index, site in enumerate(sites):
        table = pool.table(index)
        if table is None:
            continue
        parent_path, _, name = site.path.rpartition(".")
        parent = model.get_submodule(parent_path)
        base = cast("SplitLayer", parent.get_submodule(name))
        if site.kind == "embedding":
            layer = LoRAEmbedding(base, table, backend)
        else:
            is_head = site.kind == "lm_head"
            layer = LoRALinear(base, table, backend, reads_logits_rows=is_head, streams=streams)
        setattr(parent, name, layer)
        replaced.append(site.path)

    def begin(batch: ForwardBatch) -> None:
        if batch.lora is not None:
            backend.begin(batch.lora)

    model.on_begin(begin)
    return replaced


def build_host_memory(
    plan: PoolPlan,
    sources: SourceOptions,
    *,
    base_weight: BaseWeight | None,
    resolver_dir: Path | None = None,
    download_seconds: float | None = None,
) -> HostMemory:
    """This rank's host memory, and how adapters come there.

    Args:
        sources: where requests may load from.
        base_weight: weights of the base model, to recognise copies of its embedding; None: there are none.
        resolver_dir: where names that are not loaded are looked for; None: nowhere.
        download_seconds: that one download may take; None: any time.
    """
    resolver, options = None, {"operator": sources.trusted(), "request": sources}
    if resolver_dir is not None:
        resolver = Resolver(resolver_dir, roots=sources.roots)
        options["resolver"] = sources.within(resolver_dir)

    def load(
        name: str, path: str, *, trust: Trust, is_first: bool, transfer: Transfer
    ) -> HostAdapter:
        with open_source(path, options[trust], transfer) as directory:
            adapter = load_adapter(
                name,
                directory,
                plan.sites,
                plan.layout,
                plan.dtype,
                base_weight=base_weight,
                rules=plan.rules,
            )
            # A reload is for the weights: the name keeps the template that it was loaded with.
            return (
                replace(adapter, chat_templates=read_templates(directory)) if is_first else adapter
            )

    reader = AdapterReader(
        load,
        report=lambda adapter: adapter_report(adapter, plan.own_sites),
        resolver=resolver,
        download_seconds=download_seconds,
    )
    return HostMemory(reader)
