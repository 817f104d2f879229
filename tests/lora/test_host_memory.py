"""One rank's host memory: what is read, told, kept, dropped, and given up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import msgspec
import pytest

from lorikeet.core.adapters import AdapterFacts, Origin, ReadOrder, SentTensors
from lorikeet.errors import AdapterError, AdapterNotFoundError
from lorikeet.lora.host_memory import HostMemory
from lorikeet.lora.reader import AdapterReader
from tests.support.adapter_rig import PATIENCE_S, Disk


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def host(disk: Disk) -> Iterator[HostMemory]:
    made = HostMemory(
        AdapterReader(disk.load, resolver=disk, report=lambda adapter: {"rank": adapter.rank})
    )
    yield made
    for gate in disk.gates.values():
        gate.set()
    made.close()


def order(path: str, digest: str | None = None) -> ReadOrder:
    return ReadOrder(name=path.strip("/"), origins=(Origin(path),), digest=digest)


def ended(host: HostMemory) -> dict[int, AdapterFacts | BaseException]:
    """What has been read when all reads are at their end."""
    wait(host.pending(), PATIENCE_S)
    return dict(host.reads_done())


def facts(host: HostMemory, ticket: int) -> AdapterFacts:
    found = ended(host)[ticket]
    assert isinstance(found, AdapterFacts)
    return found


def test_what_is_read_is_told_once_and_held_when_it_is_kept(host: HostMemory, disk: Disk) -> None:
    disk.contents["/a"], disk.templates["/a"] = "first", {"default": "x"}
    host.read(7, order("/a"))
    found = facts(host, 7)
    assert (found.digest, found.page_classes, found.nbytes) == ("digest of first", (0, 0), 80)
    assert (found.rank, found.targets, found.origin.path) == (1, ("q_proj",), "/a")
    assert (found.report, found.chat_templates) == ({"rank": 1}, {"default": "x"})
    assert host.reads_done() == []
    assert host.pending() == []
    assert len(host) == 0
    host.check_integrity(set(), {7})
    host.keep(7, 3)
    assert (host.get(3).digest, len(host), host.nbytes) == (found.digest, 1, 80)
    host.check_integrity({3}, set())
    host.drop(3)
    assert (len(host), host.nbytes) == (0, 0)
    with pytest.raises(KeyError):
        host.get(3)
    with pytest.raises(KeyError):
        host.drop(3)


def test_orders_and_facts_can_be_sent(host: HostMemory, disk: Disk) -> None:
    disk.contents["/a"] = "first"
    sent = ReadOrder(
        name="a",
        origins=(Origin("/a", "operator", spool="/s", pinned="/p"),),
        sent=SentTensors({"r": 8}, "/s/file"),
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=ReadOrder) == sent
    host.read(1, order("/a"))
    found = facts(host, 1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=AdapterFacts) == found


def test_bytes_that_are_there_already_stay(host: HostMemory, disk: Disk) -> None:
    disk.contents |= {"/a": "same", "/b": "same"}
    for ticket, path in enumerate(("/a", "/b")):
        host.read(ticket, order(path))
        assert facts(host, ticket).digest == "digest of same"
    host.keep(0, 5)
    first = host.get(5)
    host.keep(1, 5)
    assert host.get(5) is first
    assert len(host) == 1


@pytest.mark.parametrize(("content", "error"), [(None, AdapterError), ("crash", ZeroDivisionError)])
def test_a_read_that_fails_tells_why_and_leaves_nothing(
    host: HostMemory, disk: Disk, content: str | None, error: type[Exception]
) -> None:
    if content is not None:
        disk.contents["/a"] = content
    host.read(1, order("/a"))
    assert type(ended(host)[1]) is error
    host.check_integrity(set(), set())


def test_other_bytes_than_those_that_were_loaded_are_refused(host: HostMemory, disk: Disk) -> None:
    disk.contents["/a"] = "first"
    host.read(1, order("/a", "digest of first"))
    again = facts(host, 1)
    assert (again.report, again.chat_templates) == ({}, {})  # the name keeps those of its load
    disk.contents["/a"] = "second"
    host.read(2, order("/a", "digest of first"))
    assert "have changed since it was loaded" in str(ended(host)[2])
    host.check_integrity(set(), {1})


def test_the_resolver_is_asked_for_a_name_without_an_origin(host: HostMemory, disk: Disk) -> None:
    disk.contents["/found/a"] = "x"
    for ticket, name in enumerate(("a", "b")):
        host.read(ticket, ReadOrder(name=name))
    found = ended(host)
    assert isinstance(found[0], AdapterFacts)
    assert found[0].origin == Origin("/found/a", "resolver", pinned="/found/a")
    assert isinstance(found[1], AdapterNotFoundError)


def test_a_cancelled_read_is_never_told(host: HostMemory, disk: Disk) -> None:
    disk.contents |= {"/a": "x", "/b": "y"}
    gate = disk.gates["/a"] = threading.Event()
    host.read(1, order("/a"))
    host.read(2, order("/b"))
    host.cancel(1)
    assert list(ended(host)) == [2]
    gate.set()
    host.cancel(2)  # read, and refused then
    host.check_integrity(set(), set())
    assert host.reads_done() == []


@pytest.mark.parametrize("is_read", [False, True])
def test_what_was_sent_goes_with_its_read(
    host: HostMemory, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_read: bool
) -> None:
    monkeypatch.setattr("lorikeet.lora.reader.accept_tensors", lambda config, weights: None)
    spool = tmp_path / "spool"
    spool.mkdir()
    disk.contents[str(spool)] = "x"
    origin = Origin("__tensor__", "operator", spool=str(spool))
    sent = SentTensors({}, str(spool / "weights"))
    host.read(1, ReadOrder(name="t", origins=(origin,), sent=sent))
    if is_read:
        assert facts(host, 1).origin == origin
    host.cancel(1)
    until_gone(host, disk, spool)


def test_what_was_sent_goes_with_its_origin_and_not_before(
    host: HostMemory, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorikeet.lora.reader.accept_tensors", lambda config, weights: None)
    spool = tmp_path / "spool"
    spool.mkdir()
    disk.contents[str(spool)] = "x"
    origin = Origin("__tensor__", "operator", spool=str(spool))
    sent = SentTensors({}, str(spool / "weights"))
    host.read(1, ReadOrder(name="t", origins=(origin,), sent=sent))
    digest = facts(host, 1).digest
    host.keep(1, 4)
    host.drop(4)
    host.read(2, ReadOrder(name="t", origins=(origin,), digest=digest))
    facts(host, 2)
    host.cancel(2)
    host.read(3, ReadOrder(name="t", origins=(origin,), digest=digest))
    facts(host, 3)
    assert spool.exists()
    host.forget(origin)
    until_gone(host, disk, spool)


def until_gone(host: HostMemory, disk: Disk, path: Path) -> None:
    """Reads again and again, behind which the directory is removed."""
    disk.contents["/other"] = "other"
    for ticket in range(100, 1100):
        if not path.exists():
            return
        host.read(ticket, order("/other", "digest of other"))
        facts(host, ticket)
    raise AssertionError(f"{path} is still there")
