"""What the engine asks of its adapters, and the answers of an engine that has none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from lorikeet.config import LoRAPath
from lorikeet.core.commands import LoadOutcome
from lorikeet.core.messages import AdaptersChanged
from lorikeet.core.views import AdapterDetail
from lorikeet.engine.adapter_templates import Templates
from lorikeet.errors import LoRADisabledError

BASE_VERSION = 0


class AdapterStore(Protocol):
    """What the engine asks of its adapters."""

    def lease(self, name: str | None, number: int) -> int:
        """Version that the completion ``number`` of ``name`` runs with; held until :meth:`release`. None is the base."""
        ...

    def release(self, version: int, number: int) -> None: ...

    def find(self, name: str | None) -> Future[None] | None:
        """Look for a name that is not loaded; None if there is nowhere to look. The future is the caller's own: it ends
        when the search does, with its error, and may be cancelled at any time."""
        ...

    def start_load(self, source: LoRAPath, *, replace: bool = False) -> Future[LoadOutcome]: ...

    def start_unload(self, name: str, *, timeout: float | None = None) -> Future[LoadOutcome]: ...

    def load_tensors(
        self, name: str, config: Mapping[str, object], weights: Path, *, pinned: bool = False
    ) -> Future[LoadOutcome]: ...

    def poll(self) -> None:
        """Take in what threads have finished, and give them what there is to do."""
        ...

    def note_copied(self, versions: Iterable[int]) -> None:
        """These versions have arrived on the device."""
        ...

    def pending(self) -> list[Future[Any]]:
        """What threads work on."""
        ...

    @property
    def is_waiting(self) -> bool:
        """True if ``poll`` may find something without any step in between."""
        ...

    def describe(self, name: str | None = None) -> list[AdapterDetail]: ...

    def paths(self) -> dict[str, str]:
        """Name -> path of what is loaded."""
        ...

    def names(self, versions: Iterable[int]) -> list[str]: ...

    def stats(self) -> dict[str, float]: ...

    def take_samples(self) -> dict[str, list[float]]: ...

    def take_changes(self) -> AdaptersChanged | None:
        """What has changed about the adapters since the last call; None if nothing has."""
        ...

    def take_templates(self) -> dict[str, Templates | None]:
        """Names that came since the last call, with their chat templates, and those that went, with None."""
        ...

    def close(self) -> None: ...

    def check_integrity(self, leases: Mapping[int, int]) -> None: ...


class NoAdapters:
    """The store of an engine that runs without LoRA."""

    def lease(self, name: str | None, number: int) -> int:
        if name is not None:
            raise LoRADisabledError(
                f"LoRA is not enabled, so adapter {name!r} cannot be used; start the server with --enable-lora",
                "lora_path",
            )
        return BASE_VERSION

    def release(self, version: int, number: int) -> None:
        assert version == BASE_VERSION

    def find(self, name: str | None) -> Future[None] | None:
        return None

    def start_load(self, source: LoRAPath, *, replace: bool = False) -> Future[LoadOutcome]:
        raise _disabled("loaded", source.name)

    def start_unload(self, name: str, *, timeout: float | None = None) -> Future[LoadOutcome]:
        raise _disabled("unloaded", name)

    def load_tensors(
        self, name: str, config: Mapping[str, object], weights: Path, *, pinned: bool = False
    ) -> Future[LoadOutcome]:
        raise _disabled("loaded", name)

    def poll(self) -> None:
        pass

    def note_copied(self, versions: Iterable[int]) -> None:
        assert not list(versions)

    def pending(self) -> list[Future[Any]]:
        return []

    @property
    def is_waiting(self) -> bool:
        return False

    def describe(self, name: str | None = None) -> list[AdapterDetail]:
        return []

    def paths(self) -> dict[str, str]:
        return {}

    def names(self, versions: Iterable[int]) -> list[str]:
        return []

    def stats(self) -> dict[str, float]:
        return {}

    def take_samples(self) -> dict[str, list[float]]:
        return {}

    def take_changes(self) -> AdaptersChanged | None:
        return None

    def take_templates(self) -> dict[str, Templates | None]:
        return {}

    def close(self) -> None:
        pass

    def check_integrity(self, leases: Mapping[int, int]) -> None:
        assert not any(leases.values())


def _disabled(verb: str, name: str) -> LoRADisabledError:
    return LoRADisabledError(
        f"LoRA is not enabled, so adapter {name!r} cannot be {verb}; start the server with --enable-lora",
        "lora_name",
    )
