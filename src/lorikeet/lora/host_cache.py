"""The host tier: adapters by version, bounded by their number."""

from __future__ import annotations

from lorikeet.errors import AdapterError
from lorikeet.lora.adapter import HostAdapter


class HostCache:
    """Adapters in main memory.

    Args:
        max_adapters: how many may be held at a time; None means any number.
    """

    def __init__(self, max_adapters: int | None = None) -> None:
        if max_adapters is not None and max_adapters < 1:
            raise ValueError(f"max_adapters is {max_adapters}, must be at least 1")
        self._max_adapters = max_adapters
        self._adapters: dict[int, HostAdapter] = {}
        self._nbytes = 0

    def put(self, version: int, adapter: HostAdapter) -> None:
        """Hold an adapter under a version that is not held yet.

        Raises:
            AdapterError: the cache is full.
        """
        assert version not in self._adapters, f"version {version} is already in host memory"
        if self.is_full:
            raise AdapterError(
                f"cannot hold adapter {adapter.name!r}: host memory already holds {len(self)} adapters, "
                "the most that --max-loaded-loras allows"
            )
        self._adapters[version] = adapter
        self._nbytes += adapter.nbytes

    def get(self, version: int) -> HostAdapter:
        """The adapter of a version; KeyError if it is not held."""
        return self._adapters[version]

    def drop(self, version: int) -> None:
        """Forget a version; KeyError if it is not held."""
        self._nbytes -= self._adapters.pop(version).nbytes

    @property
    def is_full(self) -> bool:
        return self._max_adapters is not None and len(self._adapters) >= self._max_adapters

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters held."""
        return self._nbytes

    def __contains__(self, version: int) -> bool:
        return version in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def check_integrity(self) -> None:
        """Assert that the byte count is the sum over what is held."""
        held = sum(adapter.nbytes for adapter in self._adapters.values())
        assert held == self._nbytes, f"{self._nbytes} bytes on the books, {held} held"
        assert self._max_adapters is None or len(self._adapters) <= self._max_adapters
