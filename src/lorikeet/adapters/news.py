"""Collects what has changed about the adapters, for the copy that the HTTP process keeps (``adapters/views.py``).

A message is as large as the change: a name that came or went is described again, and of a version whose tier or use has
changed only those few values are sent.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from lorikeet.adapters.records import Load, StoreState, Unload
from lorikeet.adapters.registry import AdapterInfo
from lorikeet.core.messages import AdaptersChanged
from lorikeet.core.views import AdapterDetail, AdapterUse, AdapterView


class AdapterNews:
    """Notes changes, and describes what they are about when it is asked."""

    def __init__(self, state: StoreState) -> None:
        self._registry = state.registry
        self._residency = state.residency
        self._records = state.records
        self._loads = state.loads
        self._unloads = state.unloads
        self._names: dict[str, None] = {}
        self._versions: set[int] = set()

    def name(self, name: str) -> None:
        """``name`` has come or gone, or means something else, or is about to."""
        self._names[name] = None

    def version(self, version: int) -> None:
        """A request has begun or ended to use a version, or it is gone."""
        self._versions.add(version)

    def take(self) -> AdaptersChanged | None:
        """What has changed since the last call; None if nothing has."""
        versions = self._versions.union(self._residency.ledger.take_moved())
        names, self._names, self._versions = self._names, {}, set()
        if not names and not versions:
            return None
        views = self._described(names)
        reports = {
            view.version: msgspec.json.encode(self._records[view.version].facts.report)
            for group in views.values()
            for view in group
            if view.version is not None
        }
        return AdaptersChanged(
            views, {version: self._use(version) for version in versions}, reports
        )

    def details(self, name: str | None = None) -> list[AdapterDetail]:
        """All adapters, or those called ``name``: what is loaded, unloading and loading, in this order."""
        if name is not None:
            views = self._described([name])[name]
        else:
            views = [self._of_version(info) for info in self._registry.loaded().values()]
            views.extend(self._of_version(unload) for unload in self._unloads)
            views.extend(_loading(load) for load in self._loads.values())
        return [self._detail(view) for view in views]

    def _detail(self, view: AdapterView) -> AdapterDetail:
        version = view.version or 0
        record = self._records.get(version)
        return AdapterDetail.of(view.used(self._use(version)), record and record.facts.report)

    def _use(self, version: int) -> AdapterUse | None:
        """Where a version is, and who uses it; None if it is gone."""
        record = self._records.get(version)
        if record is None:
            return None
        return AdapterUse(
            tier=self._residency.tier(version).value,
            in_flight=len(record.holders),
            last_use=record.last_use,
            reason=self._residency.failure(version),
        )

    def _described(self, names: Iterable[str]) -> dict[str, list[AdapterView]]:
        found: dict[str, list[AdapterView]] = {name: [] for name in names}
        for name, views in found.items():
            info = self._registry.get(name)
            if info is not None:
                views.append(self._of_version(info))
        for unload in self._unloads:
            if unload.name in found:
                found[unload.name].append(self._of_version(unload))
        for name, views in found.items():
            load = self._loads.get(name)
            if load is not None:
                views.append(_loading(load))
        return found

    def _of_version(self, named: AdapterInfo | Unload) -> AdapterView:
        """What a name means or has meant."""
        info = self._registry.info(named.version)
        is_loaded = isinstance(named, AdapterInfo)
        return AdapterView(
            name=named.name,
            path=named.path,
            state="loaded" if is_loaded else "unloading",
            pinned=is_loaded and named.pinned,
            version=named.version,
            rank=info.rank,
            targets=list(info.targets),
            nbytes=info.nbytes,
        )


def _loading(load: Load) -> AdapterView:
    return AdapterView(name=load.name, path=load.path, state="loading", pinned=load.pinned)
