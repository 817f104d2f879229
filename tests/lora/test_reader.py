"""Where a version is read from again after it has left host memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from lorikeet.adapters.sources.transfer import (
    NeedsNetworkError,
    Reach,
    Transfer,
    TransferEndedError,
)
from lorikeet.core.adapters import Origin, ReadOrder
from lorikeet.errors import AdapterError
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.reader import NUM_DOWNLOADS_PER_HOST, AdapterReader
from tests.support.adapter_rig import PATIENCE_S, Disk


def first(name: str, path: str) -> ReadOrder:
    return ReadOrder(name=name, origins=(Origin(path),))


def again(name: str, origin: Origin, digest: str) -> ReadOrder:
    return ReadOrder(name=name, origins=(origin,), digest=digest)


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
    read = reader.read(first("sql", "owner/name")).result(timeout=20)
    hub.contents["owner/name"] = "new"  # the branch moves on
    second = reader.read(again("sql", read.origin, read.adapter.digest)).result(timeout=20)
    assert second.adapter.digest == read.adapter.digest
    assert hub.asked == ["owner/name", f"owner/name@{COMMIT}"]
    assert read.origin.path == "owner/name"  # what lists show
    reader.close()


def test_changed_bytes_are_refused() -> None:
    disk = Disk()
    disk.contents = {"/adapters/sql": "old"}
    reader = AdapterReader(disk.load)
    read = reader.read(first("sql", "/adapters/sql")).result(timeout=20)
    disk.contents["/adapters/sql"] = "new"
    with pytest.raises(AdapterError, match="have changed"):
        reader.read(again("sql", read.origin, read.adapter.digest)).result(timeout=20)
    reader.close()


class Sources(Disk):
    """Local paths as on a disk, URLs as behind a network: what is in ``cached`` needs none.

    Attributes:
        silent: a URL that contains one of these has no answer until its transfer is ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cached: set[str] = set()
        self.silent: set[str] = set()
        self.num_asked = 0
        self.began = threading.Semaphore(0)
        self.num_ended = 0

    def load(
        self, name: str, path: str, *, trust: str, is_first: bool, transfer: Transfer
    ) -> HostAdapter:
        if path.startswith("http"):
            if transfer.reach < Reach.CACHE or (
                transfer.reach < Reach.NETWORK and path not in self.cached
            ):
                raise NeedsNetworkError("it has to be downloaded", urlsplit(path).netloc)
            if transfer.reach is Reach.NETWORK:
                self.num_asked += 1
                self.began.release()
                if any(part in path for part in self.silent):
                    try:
                        transfer.sleep(PATIENCE_S)
                    except TransferEndedError:
                        self.num_ended += 1
                        raise
        return super().load(name, path, trust=trust, is_first=is_first, transfer=transfer)


@pytest.fixture
def sources() -> Sources:
    return Sources()


@pytest.fixture
def reader(sources: Sources) -> Iterator[AdapterReader]:
    reader = AdapterReader(sources.load, download_seconds=PATIENCE_S)
    yield reader
    reader.close()


def test_a_reload_asks_no_source_whose_bytes_are_in_the_cache(
    sources: Sources, reader: AdapterReader
) -> None:
    url = "http://host/sql"
    sources.contents[url] = "x"
    read = reader.read(first("sql", url)).result(PATIENCE_S)
    assert sources.num_asked == 1
    sources.cached.add(url)
    sources.silent.add("host")
    assert reader.read(again("sql", read.origin, read.adapter.digest)).result(PATIENCE_S)
    assert sources.num_asked == 1


def test_a_reload_goes_to_the_source_when_the_cache_has_lost_it(
    sources: Sources, reader: AdapterReader
) -> None:
    url = "http://host/sql"
    sources.contents[url] = "x"
    read = reader.read(first("sql", url)).result(PATIENCE_S)
    assert reader.read(again("sql", read.origin, read.adapter.digest)).result(PATIENCE_S)
    assert sources.num_asked == 2


def test_a_silent_host_holds_up_nobody_else(sources: Sources, reader: AdapterReader) -> None:
    sources.silent.add("silent")
    sources.contents |= {"/local": "l", "http://other/a": "o"}
    stuck = [reader.read(first(f"s{n}", f"http://silent/{n}")) for n in range(40)]
    stuck_reloads = [
        reader.read(again(f"s{n}", Origin(f"http://silent/{n}"), "digest")) for n in range(40)
    ]
    for _ in range(NUM_DOWNLOADS_PER_HOST):
        assert sources.began.acquire(timeout=PATIENCE_S)
    local = reader.read(first("l", "/local")).result(PATIENCE_S)
    assert reader.read(again("l", local.origin, local.adapter.digest)).result(PATIENCE_S)
    assert reader.read(first("o", "http://other/a")).result(PATIENCE_S)
    assert not any(read.done() for read in (*stuck, *stuck_reloads))


def test_what_nobody_wants_any_more_is_ended(sources: Sources, reader: AdapterReader) -> None:
    sources.silent.add("silent")
    sources.contents["http://silent/fine"] = "f"
    for number in range(3 * NUM_DOWNLOADS_PER_HOST):
        order = first(f"s{number}", f"http://silent/{number}")
        read = reader.read(order)
        assert sources.began.acquire(timeout=PATIENCE_S)
        reader.cancel(read, order)
        assert read.cancelled()
    sources.silent.clear()
    assert reader.read(first("f", "http://silent/fine")).result(PATIENCE_S)
    assert sources.num_ended >= 2 * NUM_DOWNLOADS_PER_HOST


def test_a_download_has_its_time(sources: Sources) -> None:
    sources.silent.add("silent")
    reader = AdapterReader(sources.load, download_seconds=0.05)
    with pytest.raises(AdapterError, match="--lora-download-timeout"):
        reader.read(first("s", "http://silent/a")).result(PATIENCE_S)
    reader.close()


def test_closing_ends_downloads(sources: Sources, reader: AdapterReader) -> None:
    sources.silent.add("silent")
    read = reader.read(first("s", "http://silent/a"))
    assert sources.began.acquire(timeout=PATIENCE_S)
    reader.close()
    with pytest.raises(AdapterError, match="cancelled"):
        read.result(PATIENCE_S)
