"""Where adapters may change a model, and how this rank's memory for them is laid out; before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorikeet.adapters.layout import PoolLayout
from lorikeet.adapters.limits import LoRALimits
from lorikeet.core.sites import LoRASite
from lorikeet.layers.linear import ShardRule
from lorikeet.lora.shard import shard_site, site_rules


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """Where adapters may change a model, and how the memory for them is laid out on this rank.

    Attributes:
        sites: of the whole model.
        rules: of the sites: which part of each this rank holds.
        own_sites: these parts.
        layout: of the pool, made from ``own_sites``.
        dtype: of the pool, the model's own.
    """

    limits: LoRALimits
    sites: Sequence[LoRASite]
    rules: Sequence[ShardRule]
    own_sites: Sequence[LoRASite]
    layout: PoolLayout
    dtype: torch.dtype


def plan_pool(
    model: nn.Module,
    sites: Sequence[LoRASite],
    limits: LoRALimits,
    *,
    max_loras_per_batch: int,
    dtype: torch.dtype,
) -> PoolPlan:
    """Lay out the pool of a model that has no LoRA layers yet. Nothing is allocated."""
    rules = site_rules(model, sites)
    own_sites = [shard_site(site, rule) for site, rule in zip(sites, rules, strict=True)]
    layout = PoolLayout.make(
        own_sites,
        limits.targets,
        max_rank=limits.max_rank,
        max_loras_per_batch=max_loras_per_batch,
        element_size=dtype.itemsize,
    )
    return PoolPlan(limits, sites, rules, own_sites, layout, dtype)
