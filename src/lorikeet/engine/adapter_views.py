"""Adapters as ``GET /v1/adapters`` shows them."""

from __future__ import annotations

from lorikeet.engine.adapter_records import Known, Load, Unload
from lorikeet.lora.registry import AdapterInfo
from lorikeet.lora.residency import Residency


def loaded_view(info: AdapterInfo, known: Known, residency: Residency) -> dict[str, object]:
    """A name that means a version: ``loaded``, or ``failed`` if the version cannot be read again."""
    reason = residency.failure(info.version)
    return _view(info, known, residency) | {
        "state": "loaded" if reason is None else "failed",
        "reason": reason,
    }


def unloading_view(
    unload: Unload, info: AdapterInfo, known: Known, residency: Residency
) -> dict[str, object]:
    """A name that new requests do not find, while older ones run with its version."""
    return _view(info, known, residency) | {
        "name": unload.name,
        "path": unload.path,
        "pinned": False,
        "state": "unloading",
        "reason": residency.failure(unload.version),
    }


def loading_view(load: Load) -> dict[str, object]:
    """A name that is being read for the first time, or whose successor is."""
    return {
        "name": load.name,
        "path": load.path,
        "version": None,
        "state": "loading",
        "tier": None,
        "pinned": load.pinned,
        "rank": None,
        "targets": None,
        "bytes": None,
        "in_flight": 0,
        "last_use": None,
        "report": None,
        "reason": None,
    }


def _view(info: AdapterInfo, known: Known, residency: Residency) -> dict[str, object]:
    return {
        "name": info.name,
        "path": info.path,
        "version": info.version,
        "tier": residency.tier(info.version).value,
        "pinned": info.pinned,
        "rank": info.rank,
        "targets": list(info.targets),
        "bytes": info.nbytes,
        "in_flight": len(known.holders),
        "last_use": known.last_use,
        "report": known.report,
    }
