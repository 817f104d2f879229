"""The bytes of the host tier: adapters by version. Which of them are held is ``adapters/residency.py``'s decision."""

from __future__ import annotations

from lorikeet.lora.adapter import HostAdapter


class HostCache:
    """Adapters in main memory."""

    def __init__(self) -> None:
        self._adapters: dict[int, HostAdapter] = {}
        self._nbytes = 0

    def put(self, version: int, adapter: HostAdapter) -> None:
        """Hold an adapter under a version that is not held yet."""
        assert version not in self._adapters, f"version {version} is already in host memory"
        self._adapters[version] = adapter
        self._nbytes += adapter.nbytes

    def get(self, version: int) -> HostAdapter:
        """The adapter of a version; KeyError if it is not held."""
        return self._adapters[version]

    def drop(self, version: int) -> None:
        """Forget a version; KeyError if it is not held."""
        self._nbytes -= self._adapters.pop(version).nbytes

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
