"""The one place that swaps modules of a model for their LoRA forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from torch import nn

from lorikeet.core.sites import LoRASite
from lorikeet.layers.batch import ForwardBatch
from lorikeet.lora.device_pool import DevicePool
from lorikeet.lora.layers import LoRAEmbedding, LoRALinear, LoRAStreams, SplitLayer
from lorikeet.ops.lora.api import LoRABackend


class Model(Protocol):
    """What :class:`lorikeet.models.decoder.Decoder` is to this module."""

    def get_submodule(self, target: str, /) -> nn.Module: ...

    def on_begin(self, begin: Callable[[ForwardBatch], None], /) -> None: ...


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
