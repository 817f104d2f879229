"""Where adapters may change a model, which part of each place this rank holds, and how its memory for them is laid out.

The base layer's own :class:`ShardRule` decides about the part. A column layer (and the LM head) keeps all of A and
divides B's rows; a row layer and the embedding divide A's columns and keep all of B, and the partial deltas are summed
together with the base's partial outputs.

Shape legend: R rank, K input features, O output features of one module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from lorikeet.adapters.layout import PoolLayout
from lorikeet.adapters.limits import LoRALimits
from lorikeet.core.sites import LoRASite, SiteSlice
from lorikeet.layers.linear import ShardRule


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


def site_rules(model: nn.Module, sites: Sequence[LoRASite]) -> tuple[ShardRule, ...]:
    """Rule of each site's layer. The model must not have its LoRA layers yet."""
    return tuple(cast("ShardRule", model.get_submodule(site.path).rule) for site in sites)


def shard_site(site: LoRASite, rule: ShardRule) -> LoRASite:
    """The site as one rank holds it: its own feature counts and offsets."""
    parts: list[SiteSlice] = []
    offset = 0
    for index, part in enumerate(site.slices):
        start, stop = rule.output_range(index)
        parts.append(replace(part, offset=offset, out_features=stop - start))
        offset += stop - start
    start, stop = rule.input_range(site.in_features)
    return replace(site, in_features=stop - start, slices=tuple(parts))


def shard_pair(
    A_RK: torch.Tensor, B_OR: torch.Tensor, rule: ShardRule, part: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of one module's A and B; ``part`` is its index in the site."""
    return (
        A_RK[:, slice(*rule.input_range(A_RK.shape[1]))],
        B_OR[slice(*rule.output_range(part))],
    )
