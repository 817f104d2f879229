"""Adapters as the engine sees them: loaded by name, leased by requests, dropped when nobody holds them.

This is glue and owns no decision: names, versions and leases are the registry's, places on the device the
residency's, bytes the host cache's. What it adds is their order.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

from lorikeet.config import LoRAPath
from lorikeet.errors import AdapterError, LoRADisabledError
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.host_cache import HostCache
from lorikeet.lora.registry import AdapterRegistry
from lorikeet.lora.residency import Residency

logger = logging.getLogger(__name__)

BASE_VERSION = 0


class AdapterStore(Protocol):
    """What the engine asks of its adapters."""

    def lease(self, name: str | None) -> int:
        """Version that a request for ``name`` will run with; held until :meth:`release`. None is the base."""
        ...

    def release(self, version: int) -> None: ...

    def describe(self) -> list[dict[str, object]]: ...

    def check_integrity(self, leases: Mapping[str, int]) -> None: ...


class NoAdapters:
    """The store of an engine that runs without LoRA."""

    def lease(self, name: str | None) -> int:
        if name is not None:
            raise LoRADisabledError(
                f"LoRA is not enabled, so adapter {name!r} cannot be used; start the server with --enable-lora",
                "lora_path",
            )
        return BASE_VERSION

    def release(self, version: int) -> None:
        assert version == BASE_VERSION

    def describe(self) -> list[dict[str, object]]:
        return []

    def check_integrity(self, leases: Mapping[str, int]) -> None:
        assert not any(leases.values())


class LoadedAdapters:
    """The store of an engine with LoRA.

    Args:
        load: (name, path) -> packed adapter; raises AdapterError.
    """

    def __init__(
        self,
        *,
        registry: AdapterRegistry,
        residency: Residency,
        host: HostCache,
        load: Callable[[str, str], HostAdapter],
    ) -> None:
        self._registry = registry
        self._residency = residency
        self._host = host
        self._load = load

    def load(self, source: LoRAPath) -> int:
        """Read an adapter into host memory and give it a version.

        Raises:
            AdapterError: it cannot be served exactly, or the name is taken.
        """
        began = time.monotonic()
        adapter = self._load(source.name, source.path)
        version = self._registry.register(
            source.name,
            path=source.path,
            digest=adapter.digest,
            rank=adapter.rank,
            targets=adapter.targets,
            nbytes=adapter.nbytes,
            pinned=source.pinned,
        )
        try:
            self._place(version, adapter, pinned=source.pinned)
        except AdapterError:
            self._registry.unload(source.name)
            self._drop_unleased()
            raise
        logger.info(
            "Adapter %s loaded: version %d, rank %d, targets %s, %.2f MB, %.0f ms%s",
            source.name,
            version,
            adapter.rank,
            ",".join(adapter.targets),
            adapter.nbytes / 1e6,
            (time.monotonic() - began) * 1e3,
            ", pinned" if source.pinned else "",
        )
        return version

    def lease(self, name: str | None) -> int:
        return BASE_VERSION if name is None else self._registry.lease(name)

    def release(self, version: int) -> None:
        if version == BASE_VERSION:
            return
        self._registry.release(version)
        self._drop_unleased()

    def _place(self, version: int, adapter: HostAdapter, *, pinned: bool) -> None:
        """Hold a version in host memory and let it be admitted, unless another name has brought it already."""
        if version in self._host:
            if pinned:
                self._residency.set_pinned(version, pinned=True)
            return
        self._host.put(version, adapter)
        try:
            self._residency.add(version, adapter.page_classes, pinned=pinned)
        except AdapterError:
            self._host.drop(version)
            raise

    def _drop_unleased(self) -> None:
        for gone in self._registry.pop_unleased():
            if gone in self._host:
                self._residency.remove(gone)
                self._host.drop(gone)

    def describe(self) -> list[dict[str, object]]:
        return [
            {
                "name": name,
                "path": info.path,
                "version": info.version,
                "rank": info.rank,
                "targets": list(info.targets),
                "bytes": info.nbytes,
                "pinned": info.pinned,
                "tier": self._residency.tier(info.version).name.lower(),
            }
            for name, info in self._registry.loaded().items()
        ]

    def check_integrity(self, leases: Mapping[str, int]) -> None:
        self._residency.check_integrity()
        self._registry.check_integrity()
        held = Counter(leases.values())
        for info in self._registry.loaded().values():
            leased = self._registry.num_leases(info.version)
            assert leased == held[info.version], (
                f"{info.name}: {leased} leases, {held[info.version]} requests"
            )
