"""Where a version is read from again after it has left host memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorikeet.engine.adapter_reader import AdapterReader, Origin
from lorikeet.errors import AdapterError
from lorikeet.lora.adapter import HostAdapter
from tests.support.adapter_rig import Disk

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(Disk):
    """A hub whose branch gives one commit's snapshot; paths that were asked for are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def load(
        self, name: str, path: str, *, trust: str, is_first: bool, transfer: Transfer
    ) -> HostAdapter:
        self.asked.append(path)
        adapter = super().load(name, path, trust=trust, is_first=is_first, transfer=transfer)
        return replace(adapter, path=f"/cache/snapshots/{COMMIT}")


def test_a_hub_adapter_is_read_again_from_the_commit_it_was_loaded_from() -> None:
    hub = Hub()
    hub.contents = {"owner/name": "old", f"owner/name@{COMMIT}": "old"}
    reader = AdapterReader(hub.load)
    read = reader.load("sql", Origin("owner/name")).result(timeout=20)
    hub.contents["owner/name"] = "new"  # the branch moves on
    again = reader.reload("sql", [read.origin], read.adapter.digest).result(timeout=20)
    assert again.digest == read.adapter.digest
    assert hub.asked == ["owner/name", f"owner/name@{COMMIT}"]
    assert read.origin.path == "owner/name"  # what lists show
    reader.close()


def test_changed_bytes_are_refused() -> None:
    disk = Disk()
    disk.contents = {"/adapters/sql": "old"}
    reader = AdapterReader(disk.load)
    read = reader.load("sql", Origin("/adapters/sql")).result(timeout=20)
    disk.contents["/adapters/sql"] = "new"
    with pytest.raises(AdapterError, match="have changed"):
        reader.reload("sql", [read.origin], read.adapter.digest).result(timeout=20)
    reader.close()
