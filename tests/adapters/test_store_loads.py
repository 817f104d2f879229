"""Adapters in the engine's loop: tensors that are sent, names that are looked up, news, and other tries."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorikeet.adapters import moves
from lorikeet.adapters.records import FIRST_RETRY_S, LAST_RETRY_S
from lorikeet.client.uploads import Uploads
from lorikeet.core.adapters import TENSORS_PATH
from lorikeet.core.commands import (
    FindAdapter,
    ListAdapters,
    LoadAdapter,
    LoadAdapterFromTensors,
    LoadOutcome,
    UnloadAdapter,
)
from lorikeet.errors import AdapterError, AdapterNotFoundError, RequestError
from lorikeet.lora.reader import NUM_LOADS
from tests.adapters.conftest import MakeRig
from tests.support.adapter_rig import AdapterRig, expected_tokens
from tests.support.count_operations import count_operations

PROMPT = list(range(10))


class Spools:
    """Stands for ``accept_tensors``: what is sent lies on the rig's disk, in a directory that is really there."""

    def __init__(self, rig: AdapterRig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rig = rig
        self.made: list[Path] = []
        self.sent: list[Path] = []
        self.gate = threading.Event()
        self.gate.set()
        self.uploads = Uploads()
        monkeypatch.setattr("lorikeet.lora.reader.accept_tensors", self.accept)

    def accept(self, config: object, weights: Path) -> None:
        self.rig.write(str(weights.parent), weights.read_text())
        self.made.append(weights.parent)
        assert self.gate.wait(20)

    def start(self, name: str, content: bytes, *, pinned: bool = False) -> Future[LoadOutcome]:
        weights = self.uploads.new()
        weights.write_bytes(content)
        self.sent.append(weights.parent)
        return self.rig.command(
            LoadAdapterFromTensors(name=name, config={}, weights=str(weights), pinned=pinned)
        )


def test_tensors_are_kept_for_a_reload_and_removed_with_the_name(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(max_host=2)
    spools = Spools(rig, monkeypatch)
    outcome = rig.wait(spools.start("t", b"content"))
    assert rig.copy.paths() == {"t": TENSORS_PATH}
    for name in "ab":
        rig.load(name, name)
    assert rig.view("t")["tier"] == "disk"
    assert rig.ask("t") == expected_tokens(outcome.version, PROMPT, 4)
    assert spools.made[0].exists()
    assert spools.made[0].parent.stat().st_mode & 0o077 == 0
    rig.unload("t")
    rig.until(lambda: not spools.made[0].exists())
    assert rig.wait(spools.start("t", b"content")).version == outcome.version
    rig.finish()
    spools.uploads.close()
    assert not spools.made[1].parent.exists()
    assert str(spools.made[0]) not in rig.disk.untrusted


def test_tensors_that_nobody_needs_are_removed(
    rig: AdapterRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled, refused when they are placed, or brought by somebody else while they were unloaded."""
    spools = Spools(rig, monkeypatch)
    spools.gate.clear()
    cancelled = spools.start("t", b"content")
    rig.until(lambda: len(spools.made) == 1)
    assert cancelled.cancel()
    rig.step()
    spools.gate.set()
    rig.until(lambda: not spools.made[0].exists())
    rig.load("p", "p", pinned=True)
    refused = spools.start("t", b"content", pinned=True)
    rig.until(refused.done)
    with pytest.raises(AdapterError, match="starvation"):
        refused.result()
    rig.until(lambda: not spools.made[1].exists())
    rig.wait(spools.start("t", b"content"))
    running = rig.submit("t", count=150)
    rig.until(lambda: len(rig.outputs[running]) > 1)
    rig.command(UnloadAdapter(name="t"))
    rig.load("a", "content")
    rig.until(lambda: not spools.made[2].exists())
    with pytest.raises(AdapterError, match="already loaded"):
        spools.start("a", b"content")
    rig.until(lambda: not spools.sent[3].exists())
    rig.finish()


def test_tensors_whose_load_is_cancelled_before_its_turn_are_removed(
    rig: AdapterRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    spools = Spools(rig, monkeypatch)
    gate = rig.block("/slow")
    others = [rig.command(LoadAdapter(name=f"s{i}", path="/slow")) for i in range(NUM_LOADS)]
    waiting = spools.start("t", b"content")
    rig.step()
    assert waiting.cancel()
    rig.step()
    rig.until(lambda: not spools.sent[0].exists())
    assert spools.made == []
    gate.set()
    for other in others:
        rig.until(other.done)
        assert isinstance(other.exception(), AdapterError)
    rig.finish()


def test_tensors_that_are_refused_leave_no_files(rig: AdapterRig) -> None:
    uploads = Uploads()
    weights = uploads.new()
    weights.write_bytes(b"nonsense")
    load = rig.command(LoadAdapterFromTensors(name="t", config={}, weights=str(weights)))
    rig.until(load.done)
    with pytest.raises(AdapterError):
        load.result()
    assert not weights.parent.exists()
    uploads.close()


def test_the_resolver_is_asked_on_first_use(make_rig: MakeRig) -> None:
    rig = make_rig(resolver=True)
    rig.write("/found/a", "found")
    gate = rig.block("/found/a")
    first, second = rig.submit("a"), rig.submit("a")
    assert rig.ask(None) == expected_tokens(0, PROMPT, 4)
    rig.core.check_integrity()
    gate.set()
    rig.finish()
    version = rig.view("a")["version"]
    for rid in (first, second):
        assert rig.tokens(rid) == expected_tokens(version, PROMPT, 4)
    assert rig.disk.num_reads == 1
    assert rig.disk.untrusted == []
    assert "never been loaded" in rig.refusal(rig.submit("nobody"))
    rig.unload("a")
    assert "never been loaded" in rig.refusal(rig.submit("a"))  # an unload is not undone
    rig.load("a", "by hand")
    assert rig.ask("a")
    rig.finish()


def test_requests_whose_name_is_looked_up_can_be_aborted_or_refused(make_rig: MakeRig) -> None:
    rig = make_rig(resolver=True)
    rig.write("/found/a", "found")
    gate = rig.block("/found/a")
    rid = rig.submit("a")
    rig.step()
    rig.core.abort(rid, "enough")
    rig.until(lambda: rig.is_over(rid))
    rig.disk.contents["/found/a"] = "crash"
    waiting = rig.submit("a")
    gate.set()
    rig.until(lambda: rig.is_over(waiting))
    finish = rig.outputs[waiting][-1].finish
    assert finish is not None
    assert finish.status_code == 500
    rig.finish()
    assert rig.names() == {}


def test_what_has_to_leave_may_still_be_there(make_rig: MakeRig) -> None:
    """A step that wants an adapter makes room for it at once; the bytes of who leaves go with the next step."""
    rig = make_rig(max_host=2)
    for name in "abc":
        rig.load(name, name)
    gate = rig.block("/a")
    rid = rig.submit("a")
    for _ in range(4):
        rig.step()
        rig.core.check_integrity()
    gate.set()
    rig.until(lambda: rig.is_over(rid))
    rig.finish()
    rig.core.check_integrity()


class Churn:
    """Random commands about a few names, and what the last one that succeeded left of each."""

    def __init__(self, rig: AdapterRig, names: list[str]) -> None:
        self.rig = rig
        self.names = names
        self.chance = random.Random(5)
        self.futures: list[Future[LoadOutcome]] = []
        self.requests: list[str] = []
        # Version of the newest successful load, or None after an unload.
        self.meaning: dict[str, int | None] = dict.fromkeys(names)
        for name in names:
            rig.write(f"/{name}", f"{name} 0")

    def load(self, name: str, number: int) -> None:
        replace = self.chance.random() < 0.3
        if replace:
            self.rig.write(f"/{name}", f"{name} {number % 7}")
        try:
            future = self.rig.start_load(name, replace=replace)
        except AdapterError:
            return
        future.add_done_callback(lambda future: self._loaded(name, future))
        self.futures.append(future)

    def unload(self, name: str) -> None:
        try:
            # Hidden when the command returns, whenever its answer comes.
            self.futures.append(self.rig.command(UnloadAdapter(name=name)))
        except AdapterNotFoundError:
            assert self.meaning[name] is None
        else:
            self.meaning[name] = None

    def act(self, number: int) -> None:
        name = self.chance.choice(self.names)
        if self.chance.random() < 0.5:
            self.load(name, number)
        else:
            self.unload(name)
        if number % 5 == 0 and self.futures:
            self.chance.choice(self.futures).cancel()
            self.requests.append(self.rig.submit(name, count=self.chance.randint(1, 6)))
        for _ in range(self.chance.randint(0, 2)):
            self.rig.step()
        if number % 100 == 0:
            self.rig.core.check_integrity()

    def _loaded(self, name: str, future: Future[LoadOutcome]) -> None:
        if not future.cancelled() and future.exception() is None:
            self.meaning[name] = future.result().version


def test_a_thousand_loads_and_unloads_of_the_same_names(make_rig: MakeRig) -> None:
    rig = make_rig(max_loras=3, max_host=4)
    churn = Churn(rig, [f"n{i}" for i in range(6)])
    for number in range(1000):
        churn.act(number)
    rig.until(lambda: all(future.done() for future in churn.futures))
    rig.finish()
    assert all(rig.is_over(rid) for rid in churn.requests)
    versions = {view.name: view.version for view in rig.store.describe()}
    assert versions == {name: v for name, v in churn.meaning.items() if v is not None}
    for name in list(versions):
        rig.unload(str(name))
    rig.finish()
    assert len(rig.host) == 0
    assert list(rig.residency.device.placed) == []
    assert rig.store.describe() == []
    assert not rig.store.is_waiting


def test_numbers_and_labels(make_rig: MakeRig) -> None:
    rig = make_rig(max_host=3)
    for name in "abcd":
        rig.load(name, name)
    running = rig.submit("d", count=30)
    rig.until(lambda: len(rig.outputs[running]) > 1)
    gate = rig.block("/a")
    rig.submit("a")
    rig.until(lambda: rig.view("a")["tier"] == "reading")
    stats, labels = rig.core.stats(), rig.core.labels()
    assert labels == {"running_lora_adapters": ["d"], "waiting_lora_adapters": ["a"]}
    tiers = {tier: stats[f"num_adapters_{tier}"] for tier in ("reading", "host", "device", "disk")}
    assert tiers == {"reading": 1, "host": 1, "device": 1, "disk": 1}
    assert (stats["num_adapters"], stats["total_adapter_loads"]) == (4, 4)
    assert rig.core.adapters.paths() == {name: f"/{name}" for name in "abcd"}
    gate.set()
    rig.finish()
    samples = rig.core.adapters.take_samples()
    assert len(samples["adapter_load_seconds"]) == 4
    assert len(samples["adapter_reload_seconds"]) == 1
    assert len(samples["adapter_cold_start_seconds"]) == 2
    assert rig.core.adapters.take_samples() == {}
    rig.unload("a")
    assert rig.core.stats()["total_adapter_unloads"] == 1


def test_what_is_logged(rig: AdapterRig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rig.load("a", "first")
    rig.unload("a")
    load, unload = (line for line in caplog.messages if line.startswith("Adapter a "))
    assert load.startswith("Adapter a loaded: version 1, 0.00 MB, ")
    assert unload.startswith("Adapter a unloaded: version 1, 0.00 MB, ")


def test_the_copy_follows_what_happens(make_rig: MakeRig) -> None:
    """Tiers, requests, a successor, an unload that waits, a version that cannot be read again."""
    rig = make_rig(max_host=2)
    rig.load("a", "first")
    running = rig.submit("a", count=180)
    rig.until(lambda: len(rig.outputs[running]) > 1)
    view = rig.copy.find("a")
    assert (view.tier, view.in_flight, view.version) == ("device", 1, 1)
    gate = rig.block("/a")
    load = rig.start_load("a", "second", replace=True)
    rig.step()
    states = [view.state for view in rig.copy.views()]
    assert states == ["loaded", "loading"]
    gate.set()
    wait([rig.read_of("a")], 20)  # without a step of the request
    rig.wait(load)
    assert [view.state for view in rig.copy.views()] == ["loaded", "unloading"]
    assert rig.copy.find("a").version == 2
    rig.check_copy()
    rig.until(lambda: rig.is_over(running))
    for name in "bc":
        rig.load(name, name)
    rig.finish()
    assert rig.copy.find("a").tier == "disk"
    rig.disk.contents["/a"] = "changed"
    rig.refusal(rig.submit("a"))
    rig.step()
    view = rig.copy.find("a")
    assert view.state == "failed"
    assert "have changed" in str(view.reason)
    assert rig.copy.path("a") == "/a", "it keeps its name"
    rig.finish()
    rig.unload("a")
    with pytest.raises(AdapterNotFoundError, match=r"'a' has never been loaded.*: b, c$"):
        rig.copy.find("a")
    assert set(rig.copy._reports) == {3, 4}, "reports go with their versions"


def test_news_cost_what_changes(make_rig: MakeRig) -> None:
    """Not what exists: with a hundred times as many names a load, a request and an unload take as many operations."""
    counts: list[list[int]] = []
    for num_adapters in (3, 300):
        rig = make_rig()
        for index in range(num_adapters):
            rig.load(f"n{index:04}", "the same for all")
        rig.finish()
        found: list[int] = []
        acts: list[Callable[[], object]] = [
            lambda rig=rig: rig.store.lease("n0001", "rid"),
            lambda rig=rig: rig.store.release(1, "rid"),
            lambda rig=rig: rig.store.start_unload("n0001"),
            lambda rig=rig: (rig.store.stats(), rig.core.labels()),
        ]
        found.extend(
            count_operations(lambda act=act, rig=rig: (act(), rig.tell()))[0] for act in acts
        )
        with pytest.raises(AdapterNotFoundError):
            rig.store.lease("unknown", "rid")
        gate = rig.block("/new")
        rig.start_load("new", "the same for all")
        read = rig.read_of("new")
        gate.set()
        wait([read], 20)
        found.append(count_operations(rig.store.poll)[0])
        assert rig.store.paths()["new"] == "/new"
        counts.append(found)
    few, many = counts
    assert [more <= 1.1 * less + 20 for less, more in zip(few, many, strict=True)] == [True] * 5, (
        counts
    )


def test_commands_without_lora() -> None:
    from tests.engine.test_core import make_core

    core = make_core()
    for command in (
        LoadAdapter("a", "/a"),
        UnloadAdapter("a"),
        LoadAdapterFromTensors("a", config={}, weights="/a"),
    ):
        with pytest.raises(RequestError, match="--enable-lora"):
            core.command(command)
    assert core.command(ListAdapters()) == []


def test_closing_does_not_wait_for_a_download(make_rig: MakeRig) -> None:
    rig = make_rig()
    gate = rig.block("/a")
    rig.start_load("a", "first")
    closing = threading.Thread(target=rig.core.close)
    closing.start()
    closing.join(5)
    assert not closing.is_alive()
    gate.set()


# ---- requests that wait for a load ----


def test_a_load_whose_client_leaves_goes_on_for_the_requests_that_wait(make_rig: MakeRig) -> None:
    rig = make_rig(resolver=True)
    gate = rig.block("/a")
    load = rig.start_load("a", "a")
    waiting = [rig.submit("a"), rig.submit("a")]
    looked_up = rig.command(FindAdapter(name="a"))
    rig.step()
    assert load.cancel()  # the client of the load has gone, as a command's cancel does it
    for _ in range(3):
        rig.step()
    assert rig.names() == {"a": "loading"}
    gate.set()
    rig.until(lambda: all(rig.is_over(rid) for rid in waiting))
    assert rig.tokens(waiting[0]) == rig.tokens(waiting[1])
    assert looked_up.result() is None
    assert rig.names() == {"a": "loaded"}
    rig.finish()


def test_a_load_that_nobody_waits_for_any_more_is_dropped(make_rig: MakeRig) -> None:
    rig = make_rig(resolver=True)
    gate = rig.block("/a")
    load = rig.start_load("a", "a")
    waiting = rig.submit("a")
    looked_up = rig.command(FindAdapter(name="a"))
    assert load.cancel()
    assert looked_up.cancel()
    rig.core.abort(waiting, "the client left")
    rig.step()
    assert rig.names() == {}
    gate.set()
    rig.finish()
    assert rig.names() == {}


def test_requests_hear_why_a_load_failed_without_the_places_of_files(
    make_rig: MakeRig, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make_rig(resolver=True)
    gate = rig.block("/secret/place")
    load = rig.command(LoadAdapter(name="a", path="/secret/place"))
    waiting = rig.submit("a")
    rig.step()
    gate.set()
    assert rig.refusal(waiting) == "adapter path place does not exist"
    with pytest.raises(AdapterError, match="/secret/place"):
        load.result()
    assert "/secret/place" in caplog.text
    rig.finish()


@pytest.mark.parametrize("name", ["a" * 300, "a." * 100_000, "x\ny", "../x", "\x1b[31m"])
def test_a_name_that_no_directory_has_is_not_looked_up(make_rig: MakeRig, name: str) -> None:
    rig = make_rig(resolver=True)
    message = rig.refusal(rig.submit(name))
    assert "has never been loaded" in message
    assert message.isprintable()
    assert len(message) < 400
    assert rig.names() == {}


# ---- another try ----


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the store sees pass, besides the real ones."""
    added, real = [0.0], time.monotonic
    monkeypatch.setattr(
        "lorikeet.adapters.moves.time",
        SimpleNamespace(monotonic=lambda: real() + added[0]),
    )
    return added


def test_an_adapter_that_could_not_be_read_is_read_again_after_a_while(
    make_rig: MakeRig, clock: list[float]
) -> None:
    rig = make_rig(max_host=2)
    versions = {name: rig.load(name, name) for name in "abc"}
    del rig.disk.contents["/a"]
    rig.refusal(rig.submit("a"))
    rig.write("/a", "a")
    num_reads = rig.disk.num_reads
    assert "does not exist" in rig.refusal(rig.submit("a"))  # the reason, meanwhile
    assert rig.disk.num_reads == num_reads
    clock[0] += FIRST_RETRY_S
    assert rig.ask("a") == expected_tokens(versions["a"], PROMPT, 4)
    rig.finish()


def test_each_try_waits_longer_than_the_one_before(make_rig: MakeRig, clock: list[float]) -> None:
    rig = make_rig(max_host=2)
    for name in "abc":
        rig.load(name, name)
    del rig.disk.contents["/a"]
    waits: list[float] = []
    for _ in range(9):
        num_reads = rig.disk.num_reads
        waits.append(0.0)
        while rig.disk.num_reads == num_reads:
            rig.refusal(rig.submit("a"))
            clock[0] += FIRST_RETRY_S
            waits[-1] += FIRST_RETRY_S
    first, last = FIRST_RETRY_S, LAST_RETRY_S
    assert waits[1:6] == [first, 2 * first, 4 * first, 8 * first, 16 * first]
    assert waits[-1] == last
    rig.finish()


def test_a_pin_whose_copy_failed_is_placed_again(make_rig: MakeRig, clock: list[float]) -> None:
    rig = make_rig()
    version = 1
    rig.failing_copies.add(version)
    assert rig.load("a", "a", pinned=True) == version
    rig.finish()
    assert rig.view("a")["tier"] == "host"
    rig.failing_copies.clear()
    rig.finish()
    assert rig.view("a")["tier"] == "host"
    clock[0] += moves.PINS_S
    rig.until(lambda: rig.view("a")["tier"] == "device")
    rig.finish()
