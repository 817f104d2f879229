"""What an adapter's name means now, who is using it, and whether it may go.

A *name* is what users say; a *version* is one content (weights and configuration, by digest). Requests lease the
version that their name means when they arrive and keep it to their end, whatever happens to the name. Versions are
never reused for another content, so they can key prefix caches and device memory.

Unloading has two phases: the name is hidden at once, and the version's memory may go when the last lease is released
(``pop_unleased``). One owner, the engine's loop, calls everything here: there are no locks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NotRequired, TypedDict, Unpack

from lorikeet.errors import ALREADY_LOADED, AdapterError, AdapterNotFoundError
from lorikeet.masking import shortened

# Digests of dropped versions that are remembered, so that a reload of the same bytes finds its prefix cache again.
MAX_REMEMBERED = 4096
# Names that an error about an unknown one quotes, and the characters of each.
MAX_LISTED = 8
_MAX_NAME = 64


def never_loaded(name: str, loaded: Mapping[str, object]) -> AdapterNotFoundError:
    """The error about a name that is not loaded: names it and the first that are, however many they are."""
    first = islice(loaded, MAX_LISTED)
    listed = ", ".join(shortened(other, _MAX_NAME) for other in first) or "none"
    if len(loaded) > MAX_LISTED:
        listed += f" and {len(loaded) - MAX_LISTED} more"
    return AdapterNotFoundError(
        f"adapter '{shortened(name)}' has never been loaded or was unloaded; loaded adapters: {listed}",
        "lora_path",
    )


class Content(TypedDict):
    """What a name comes to mean: the fields of :class:`AdapterInfo` that its loading decides."""

    path: str
    digest: str
    rank: int
    targets: tuple[str, ...]
    nbytes: int
    pinned: NotRequired[bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """One loaded name. ``rank`` is the largest of its modules; ``nbytes`` counts its packed weights."""

    name: str
    version: int
    path: str
    digest: str
    rank: int
    targets: tuple[str, ...]
    nbytes: int
    pinned: bool = False


@dataclass(slots=True)
class _Version:
    """A version that somebody can still use.

    Attributes:
        info: of the name that registered it last.
        names: names that mean this version; hidden if there are none.
    """

    info: AdapterInfo
    names: set[str] = field(default_factory=set[str])
    num_leases: int = 0


class AdapterRegistry:
    """Names, versions and leases. Version 0 is the base model: always there, never counted."""

    def __init__(self) -> None:
        self._names: dict[str, AdapterInfo] = {}
        self._versions: dict[int, _Version] = {}
        self._known: OrderedDict[str, int] = OrderedDict()
        self._next_version = 1
        # Versions to look at in pop_unleased; kept so that it costs nothing when nothing was unloaded.
        self._hidden: set[int] = set()

    def __len__(self) -> int:
        """Loaded names."""
        return len(self._names)

    def register(self, name: str, **content: Unpack[Content]) -> int:
        """Give a loaded adapter its name.

        Returns:
            its version: that of the same digest if it was ever loaded, else a new one.

        Raises:
            AdapterError: the name is loaded already.
        """
        if name in self._names:
            raise AdapterError(
                f"adapter {name!r} is already loaded from {self._names[name].path!r}; "
                "unload it first or choose another name",
                code=ALREADY_LOADED,
            )
        version = self.version_of(content["digest"])
        info = AdapterInfo(name=name, version=version, **content)
        self._names[name] = info
        record = self._versions.setdefault(version, _Version(info))
        record.info = info
        record.names.add(name)
        self._hidden.discard(version)
        return version

    def replace(self, name: str, **content: Unpack[Content]) -> int:
        """Let a loaded name mean another content from now on; leases of the old one go on.

        Returns:
            the version of the new content, which is the old version if the bytes are the same.

        Raises:
            AdapterNotFoundError: the name is not loaded.
        """
        self.unload(name)
        return self.register(name, **content)

    def unload(self, name: str) -> None:
        """Hide a name at once. Its version can be dropped when nobody leases it (``pop_unleased``).

        Raises:
            AdapterNotFoundError: the name is not loaded.
        """
        info = self.find(name)
        del self._names[name]
        record = self._versions[info.version]
        record.names.discard(name)
        if not record.names:
            self._hidden.add(info.version)

    def lease(self, name: str | None) -> int:
        """The version that ``name`` means now, held until ``release``. None is the base model, version 0.

        Raises:
            AdapterNotFoundError: names the adapter and the loaded ones.
        """
        if name is None:
            return 0
        version = self.find(name).version
        self._versions[version].num_leases += 1
        return version

    def release(self, version: int) -> None:
        """Undo one ``lease``.

        Raises:
            ValueError: the version is not leased.
        """
        if version == 0:
            return
        record = self._versions.get(version)
        if record is None or record.num_leases == 0:
            raise ValueError(f"version {version} is not leased")
        record.num_leases -= 1

    def pop_unleased(self) -> list[int]:
        """Versions that no name means and nobody leases. They are forgotten; the caller drops their memory."""
        gone = sorted(v for v in self._hidden if self._versions[v].num_leases == 0)
        for version in gone:
            self._hidden.discard(version)
            del self._versions[version]
        return gone

    def loaded(self) -> dict[str, AdapterInfo]:
        """Loaded adapters by name, in order of loading. A copy."""
        return dict(self._names)

    def get(self, name: str) -> AdapterInfo | None:
        """About a name; None if it is not loaded."""
        return self._names.get(name)

    def find(self, name: str) -> AdapterInfo:
        """About a loaded name.

        Raises:
            AdapterNotFoundError: names it and the loaded ones.
        """
        info = self._names.get(name)
        if info is None:
            raise never_loaded(name, self._names)
        return info

    def info(self, version: int) -> AdapterInfo:
        """About a version that is loaded or leased; KeyError otherwise."""
        return self._versions[version].info

    def names_of(self, version: int) -> list[str]:
        """Names that mean a version now, sorted; none if it is hidden or not known."""
        record = self._versions.get(version)
        return sorted(record.names) if record is not None else []

    def num_names(self, version: int) -> int:
        """Names that mean a version now."""
        record = self._versions.get(version)
        return len(record.names) if record is not None else 0

    def is_hidden(self, version: int) -> bool:
        """True if no name means the version and ``pop_unleased`` has not given it out yet."""
        return version in self._hidden

    def num_leases(self, version: int) -> int:
        """Requests in flight with this version; 0 if it is not known."""
        record = self._versions.get(version)
        return record.num_leases if record is not None else 0

    def is_pinned(self, version: int) -> bool:
        """True if one of the names that mean this version is pinned."""
        record = self._versions.get(version)
        return record is not None and any(self._names[name].pinned for name in record.names)

    def check_integrity(self) -> None:
        """Compare names, versions and the list of hidden versions.

        Raises:
            AssertionError: names what does not match.
        """
        for name, info in self._names.items():
            if name not in self._versions[info.version].names:
                raise AssertionError(f"version {info.version} does not know its name {name}")
        for version, record in self._versions.items():
            if any(self._names[name].version != version for name in record.names):
                raise AssertionError(f"version {version} is known under a name that means another")
            if (not record.names) != (version in self._hidden):
                raise AssertionError(f"version {version}: names {record.names}, hidden wrongly")
            if record.num_leases < 0:
                raise AssertionError(f"version {version} has {record.num_leases} leases")

    def version_of(self, digest: str) -> int:
        """The version of a content: that of the same digest if it was ever loaded, else the next one.

        Whoever has to place a content before its name can mean it asks here first; ``register`` gives the same answer.
        """
        version = self._known.get(digest)
        if version is None:
            version = self._next_version
            self._next_version += 1
            self._known[digest] = version
        self._known.move_to_end(digest)
        self._forget_old_digests()
        return version

    def _forget_old_digests(self) -> None:
        excess = len(self._known) - MAX_REMEMBERED
        if excess <= 0:
            return
        dead = (d for d, version in self._known.items() if version not in self._versions)
        # The newest digest has no record yet, but it is last in the order and stays.
        for digest in [digest for digest, _ in zip(dead, range(excess), strict=False)]:
            if digest != next(reversed(self._known)):
                del self._known[digest]
