"""Which part of an adapter one tensor-parallel rank holds: the base layer's own :class:`ShardRule` decides.

A column layer (and the LM head) keeps all of A and divides B's rows; a row layer and the embedding divide A's columns
and keep all of B, and the partial deltas are summed together with the base's partial outputs.

Shape legend: R rank, K input features, O output features of one module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from lorikeet.core.sites import LoRASite, SiteSlice
from lorikeet.layers.linear import ShardRule


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
