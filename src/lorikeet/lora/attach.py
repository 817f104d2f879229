"""The one place that swaps modules of a model for their LoRA forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lorikeet.core.sites import LoRASite
from lorikeet.lora.device_pool import DevicePool
from lorikeet.lora.layers import LoRAEmbedding, LoRALinear, SplitLayer
from lorikeet.ops.lora.api import LoRABackend


def attach_lora(
    model: nn.Module, sites: Sequence[LoRASite], pool: DevicePool, backend: LoRABackend[Any]
) -> list[str]:
    """Replace the module of every site that adapters may change.

    Returns:
        The paths of the replaced modules, in the order of the sites.

    Raises:
        AttributeError: the model has no module at a site's path, so it is not the model that declared the sites.
    """
    replaced: list[str] = []
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
            layer = LoRALinear(base, table, backend, reads_logits_rows=site.kind == "lm_head")
        setattr(parent, name, layer)
        replaced.append(site.path)
    return replaced
