"""An adapter in host memory: checked, packed into rank pages, ready to be copied to the device.

Shape legend: C = K + O, the input and output features of one module as this rank holds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lorikeet.adapters.spec import LoRASpec


@dataclass(frozen=True, slots=True)
class PackedModule:
    """One module of an adapter and the pages that hold it.

    Attributes:
        site, part: the module's place in the model's table of sites.
        scale: factor of B A x.
        first_page, num_pages: its half-open range of ``HostAdapter.pages``.
    """

    site: int
    part: int
    rank: int
    scale: float
    first_page: int
    num_pages: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostAdapter:
    """Everything that serving an adapter needs.

    Attributes:
        digest: sha256 (hex) of what it computes: modules, scales and weights as stored. Equal digests, equal answers.
        data: one flat buffer of the pool's type, the pages one after the other.
        page_classes: class of each page in the pool's layout, in the order of the pages.
        modules: in the order of their pages.
        rank: the largest of any module.
        targets: names of the modules that it changes, sorted.
        chat_templates: that its directory brings, name -> Jinja source; no part of the digest.
    """

    name: str
    path: str
    digest: str
    spec: LoRASpec
    data: torch.Tensor
    page_sizes: tuple[int, ...]
    page_classes: tuple[int, ...]
    modules: tuple[PackedModule, ...]
    rank: int
    targets: tuple[str, ...]
    chat_templates: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def nbytes(self) -> int:
        """Bytes of host memory, and of device memory when it is resident."""
        return self.data.numel() * self.data.element_size()

    @property
    def pages(self) -> list[torch.Tensor]:
        """Flat views of ``data``, one per page; each reads as [page_ranks, C] with zeros beyond the rank."""
        return list(self.data.split(self.page_sizes))
