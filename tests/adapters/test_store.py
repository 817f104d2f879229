"""Adapters in the engine's loop, with a disk and a worker that are doubles: what may happen in any order."""

from __future__ import annotations

from concurrent.futures import wait

import pytest

from lorikeet.adapters.tiers import Tier
from lorikeet.core.commands import ListAdapters, LoadAdapter, LoadAdapterFromTensors, UnloadAdapter
from lorikeet.errors import AdapterError, AdapterNotFoundError, EngineFault, RequestError
from tests.adapters.conftest import MakeRig
from tests.support.adapter_rig import AdapterRig, expected_tokens
from tests.support.engine_info import engine_info

PROMPT = list(range(10))


def test_load_ask_unload(rig: AdapterRig) -> None:
    outcome = rig.wait(rig.start_load("a", "first"))
    assert (outcome.name, outcome.path, rig.store.paths()) == ("a", "/a", {"a": "/a"})
    assert rig.ask("a") == expected_tokens(outcome.version, PROMPT, 4)
    view = rig.view("a")
    assert (view["state"], view["tier"], view["in_flight"]) == ("loaded", "device", 0)
    assert view["last_use"] is not None
    assert rig.wait(rig.command(UnloadAdapter(name="a"))).name == "a"
    assert rig.store.paths() == rig.copy.paths() == {}
    assert "never been loaded" in rig.refusal(rig.submit("a"))
    rig.finish()
    assert len(rig.host) == 0
    assert rig.host.nbytes == 0


def test_a_load_never_holds_up_others_nor_is_it_usable_before_its_end(rig: AdapterRig) -> None:
    version = rig.load("a", "first")
    gate = rig.block("/b")
    load = rig.start_load("b", "second")
    assert rig.ask("a") == expected_tokens(version, PROMPT, 4)
    assert rig.ask(None) == expected_tokens(0, PROMPT, 4)
    assert rig.view("b")["state"] == "loading"
    assert "never been loaded" in rig.refusal(rig.submit("b"))
    assert not load.done()
    gate.set()
    rig.wait(load)
    assert rig.store.paths() == rig.copy.paths() == {"a": "/a", "b": "/b"}
    rig.finish()


@pytest.mark.parametrize("is_loading", [False, True])
def test_a_name_that_is_taken(rig: AdapterRig, is_loading: bool) -> None:
    gate = rig.block("/a")
    load = rig.start_load("a", "first")
    if not is_loading:
        gate.set()
        rig.wait(load)
    with pytest.raises(AdapterError, match="already loaded"):
        rig.start_load("a", "second")
    gate.set()
    rig.wait(load)
    assert list(rig.names()) == ["a"]


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [(None, AdapterError, "/a does not exist"), ("crash", EngineFault, "ZeroDivisionError")],
)
def test_a_load_that_fails_changes_nothing(
    rig: AdapterRig, content: str | None, error: type[Exception], words: str
) -> None:
    load = rig.start_load("a", content)
    rig.until(load.done)
    with pytest.raises(error, match=words):
        load.result()
    assert rig.names() == {}
    rig.load("a", "good")
    rig.finish()
    assert rig.core.stats()["total_adapter_load_failures"] == 1


def test_unloading_has_two_phases(rig: AdapterRig) -> None:
    version = rig.load("a", "first")
    running = rig.submit("a", count=20)
    rig.until(lambda: len(rig.outputs[running]) > 2)
    unload = rig.command(UnloadAdapter(name="a"))
    rig.step()
    assert not unload.done()
    assert rig.view("a")["state"] == "unloading"
    assert rig.view("a")["in_flight"] == 1
    assert "never been loaded" in rig.refusal(rig.submit("a"))
    assert len(rig.host) == 1
    rig.wait(unload)
    assert rig.tokens(running) == expected_tokens(version, PROMPT, 20)
    assert len(rig.host) == 0
    rig.finish()


def test_an_unload_that_takes_too_long_says_how_many_run_and_is_completed_later(
    rig: AdapterRig,
) -> None:
    rig.load("a", "first")
    running = rig.submit("a", count=50)
    rig.until(lambda: len(rig.outputs[running]) > 0)
    unload = rig.command(UnloadAdapter(name="a", timeout=0.0))
    rig.step()
    with pytest.raises(AdapterError, match="1 still run with it"):
        unload.result(0)
    rig.finish()
    assert len(rig.tokens(running)) == 50
    assert len(rig.host) == 0


@pytest.mark.parametrize("name", ["base", "base:x", "a\nb", "n" * 257, ""])
def test_names_that_mean_something_else_are_refused(rig: AdapterRig, name: str) -> None:
    rig.core.info = engine_info(served_model_name="base")
    rig.write("/a", "first")
    with pytest.raises(RequestError, match="lora_name"):
        rig.command(LoadAdapter(name=name, path="/a"))
    with pytest.raises(RequestError, match="lora_name"):
        rig.command(LoadAdapterFromTensors(name=name, config={}, weights="/a"))
    with pytest.raises(RequestError, match=r"U\+001B"):
        rig.command(LoadAdapter(name="fine", path="/a\x1b"))
    assert rig.store.describe() == []


def test_unloading_what_is_not_there(rig: AdapterRig) -> None:
    with pytest.raises(AdapterNotFoundError, match="never been loaded"):
        rig.command(UnloadAdapter(name="a"))
    with pytest.raises(AdapterNotFoundError, match="never been loaded"):
        rig.core.command(ListAdapters("a"))


def test_equal_bytes_keep_their_version_and_their_prefix_cache(rig: AdapterRig) -> None:
    version = rig.load("a", "first")
    rig.ask("a")
    rig.unload("a")
    rig.finish()
    assert rig.load("a", "first") == version
    rid = rig.submit("a")
    rig.finish()
    assert rig.outputs[rid][-1].cached_tokens == 8
    rig.unload("a")
    assert rig.load("a", "second") != version
    rid = rig.submit("a")
    rig.finish()
    assert rig.outputs[rid][-1].cached_tokens == 0


def test_replacing_under_traffic_fails_and_mixes_no_request(rig: AdapterRig) -> None:
    versions = [rig.load("a", "content 0")]
    rids: dict[str, int] = {}
    for number in range(1, 20):
        for _ in range(3):
            rids[rig.submit("a", count=9)] = versions[-1]
            rig.step()
        gate = rig.block("/a")
        load = rig.start_load("a", f"content {number}", replace=True)
        rids[rig.submit("a", count=9)] = versions[-1]
        rig.step()
        gate.set()
        versions.append(rig.wait(load).version)
    rig.finish()
    assert len(set(versions)) == 20
    for rid, version in rids.items():
        assert rig.tokens(rid) == expected_tokens(version, PROMPT, 9)
    assert rig.names() == {"a": "loaded"}
    assert len(rig.host) == 1


def test_a_replacement_that_is_refused_leaves_the_old_one(make_rig: MakeRig) -> None:
    rig = make_rig(max_loras=2)
    version = rig.load("a", "first", pinned=True)
    del rig.disk.contents["/a"]
    load = rig.start_load("a", replace=True)
    rig.until(load.done)
    assert load.exception() is not None
    assert rig.view("a")["pinned"]
    assert rig.view("a")["version"] == version
    assert rig.ask("a") == expected_tokens(version, PROMPT, 4)
    rig.load("b", "second")
    load = rig.start_load("b", "third", replace=True, pinned=True)
    rig.until(load.done)
    with pytest.raises(AdapterError, match="starvation"):
        load.result()
    assert rig.view("b")["version"] == 2
    assert not rig.view("b")["pinned"]
    rig.load("a", "fourth", replace=True, pinned=True)  # its own pin is given back first
    rig.finish()


def test_replacing_a_name_that_is_not_loaded_loads_it(rig: AdapterRig) -> None:
    rig.load("a", "first", replace=True)
    assert rig.names() == {"a": "loaded"}


def test_a_cancelled_load_is_dropped_and_its_name_is_free(rig: AdapterRig) -> None:
    gate = rig.block("/a")
    load = rig.start_load("a", "first")
    rig.step()
    assert load.cancel()
    rig.step()
    assert rig.names() == {}
    del rig.disk.gates["/a"]
    version = rig.load("a", "second")
    gate.set()
    rig.finish()
    assert rig.ask("a") == expected_tokens(version, PROMPT, 4)
    assert len(rig.host) == 1


def test_pins_are_resident_and_counted(make_rig: MakeRig) -> None:
    rig = make_rig(max_loras=3)
    for name in "ab":
        rig.load(name, name, pinned=True)
    rig.finish()
    assert [rig.view(name)["tier"] for name in "ab"] == ["device", "device"]
    load = rig.start_load("c", "c", pinned=True)
    rig.until(load.done)
    with pytest.raises(AdapterError, match="starvation"):
        load.result()
    assert set(rig.names()) == {"a", "b"}
    for name in "cdef":
        rig.load(name, name)
        rig.ask(name)
    assert [rig.view(name)["tier"] for name in "ab"] == ["device", "device"]
    rig.unload("a")
    rig.load("g", "g", pinned=True)
    rig.finish()


def test_a_pin_ends_with_its_name_even_if_requests_run(rig: AdapterRig) -> None:
    rig.load("a", "same", pinned=True)
    rig.load("same as a", "same")
    running = rig.submit("a", count=150)
    rig.until(lambda: len(rig.outputs[running]) > 1)
    rig.command(UnloadAdapter(name="a"))
    rig.load("b", "b", pinned=True)
    assert not rig.is_over(running)
    rig.finish()
    assert rig.view("b")["tier"] == "device"


def test_a_pinned_adapter_whose_replacement_finds_no_room_stays_pinned(make_rig: MakeRig) -> None:
    rig = make_rig(max_loras=2, max_host=2)
    for name in "ab":
        rig.load(name, name, pinned=name == "a")
        running = rig.submit(name, count=150)
        rig.until(lambda rid=running: len(rig.outputs[rid]) > 0)
    load = rig.start_load("a", "new", replace=True, pinned=True)
    wait(rig.store.pending())
    rig.step()
    with pytest.raises(AdapterError, match="max-loaded-loras"):
        load.result(0)
    rig.finish()
    load = rig.start_load("c", "c", pinned=True)
    rig.until(load.done)
    with pytest.raises(AdapterError, match="starvation"):
        load.result()
    assert rig.view("a")["pinned"]


def test_an_evicted_adapter_comes_back_with_its_version_and_its_cache(make_rig: MakeRig) -> None:
    rig = make_rig(max_host=2)
    versions = {name: rig.load(name, name) for name in "abcd"}
    assert {name: rig.view(name)["tier"] for name in "abcd"} == {
        "a": "disk",
        "b": "disk",
        "c": "host",
        "d": "host",
    }
    for name, version in versions.items():
        assert rig.ask(name) == expected_tokens(version, PROMPT, 4)
    rid = rig.submit("a")
    rig.finish()
    assert rig.outputs[rid][-1].cached_tokens == 8
    assert {name: rig.view(name)["version"] for name in "abcd"} == versions
    assert set(rig.names().values()) == {"loaded"}
    assert len(rig.host) == 2
    stats = rig.core.stats()
    assert stats["total_adapter_host_evictions"] >= 4
    assert stats["total_adapter_reloads"] >= 3
    assert rig.core.adapters.take_samples()["adapter_reload_seconds"]


def test_a_reload_holds_up_nobody_else(make_rig: MakeRig) -> None:
    rig = make_rig(max_host=2)
    versions = {name: rig.load(name, name) for name in "abc"}
    gate = rig.block("/a")
    waiting = rig.submit("a")
    for name in ("c", None, "c"):
        assert rig.ask(name) == expected_tokens(versions[name] if name else 0, PROMPT, 4)
    assert not rig.outputs[waiting]
    gate.set()
    rig.finish()
    assert rig.tokens(waiting) == expected_tokens(versions["a"], PROMPT, 4)


def test_host_memory_full_of_pins_refuses_the_next(make_rig: MakeRig) -> None:
    rig = make_rig(max_loras=3, max_host=3)
    for name in "ab":
        rig.load(name, name, pinned=True)
    rig.load("c", "c")
    busy = rig.submit("c", count=50)
    rig.until(lambda: len(rig.outputs[busy]) > 1)
    load = rig.start_load("d", "d")
    wait(rig.store.pending())
    rig.step()
    with pytest.raises(AdapterError, match="max-loaded-loras"):
        load.result()
    assert set(rig.names()) == {"a", "b", "c"}
    rig.finish()
    rig.load("d", "d")  # nothing runs now, so c makes room
    rig.finish()
    assert len(rig.host) == 3


@pytest.mark.parametrize("content", [None, "something else"])
def test_files_that_change_or_vanish_fail_their_requests_alone(
    make_rig: MakeRig, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make_rig(max_host=2)
    versions = {name: rig.load(name, name) for name in "abc"}
    if content is None:
        del rig.disk.contents["/a"]
    else:
        rig.write("/a", content)
    waiting = [rig.submit("a"), rig.submit("a")]
    other = rig.submit("c")
    for rid in waiting:
        # Where the files lie is for the log.
        assert "/a" not in rig.refusal(rid)
        assert ("does not exist" if content is None else "have changed") in rig.refusal(rid)
    assert "/a" in caplog.text
    assert "cannot be served" in rig.refusal(rig.submit("a"))  # and at once, from now on
    rig.finish()
    assert rig.tokens(other) == expected_tokens(versions["c"], PROMPT, 4)
    view = rig.view("a")
    assert (view["state"], view["tier"]) == ("failed", "failed")
    assert "/a" not in view["reason"]
    version = rig.load("a", "a newer one")
    assert rig.ask("a") == expected_tokens(version, PROMPT, 4)
    assert rig.view("a")["state"] == "loaded"
    rig.finish()


def test_a_failed_adapter_comes_back_as_it_was_when_its_files_do(make_rig: MakeRig) -> None:
    rig = make_rig(max_host=2)
    versions = {name: rig.load(name, name) for name in "abc"}
    del rig.disk.contents["/a"]
    rig.refusal(rig.submit("a"))
    assert rig.load("a", "a") == versions["a"]
    assert rig.ask("a") == expected_tokens(versions["a"], PROMPT, 4)
    del rig.disk.contents["/a"]
    for name in "bc":
        rig.ask(name)
    rig.refusal(rig.submit("a"))
    rig.unload("a")
    assert set(rig.names()) == {"b", "c"}
    rig.finish()


def test_two_names_for_the_same_bytes(make_rig: MakeRig) -> None:
    rig = make_rig(max_host=2)
    version = rig.load("a", "same")
    assert rig.load("b", "same") == version
    assert len(rig.host) == 1
    del rig.disk.contents["/a"]  # b's files still have them
    for name in "cd":
        rig.load(name, name)
    assert rig.view("a")["tier"] == "disk"
    assert rig.ask("a") == expected_tokens(version, PROMPT, 4)
    rig.unload("b")
    assert rig.ask("a") == expected_tokens(version, PROMPT, 4)
    rig.unload("a")
    rig.finish()
    assert [name for name in "cd" if rig.view(name)["tier"] != "disk"] == ["d"]
    assert len(rig.host) == 1


def test_bytes_that_are_brought_while_they_are_read(make_rig: MakeRig) -> None:
    """A reload hangs; the same content is loaded under another name: those who wait are served at once."""
    rig = make_rig(max_host=2)
    version = rig.load("a", "same")
    for name in "cd":
        rig.load(name, name)
    gate = rig.block("/a")
    waiting = rig.submit("a")
    rig.until(lambda: rig.view("a")["tier"] == "reading")
    assert rig.load("b", "same") == version
    rig.until(lambda: rig.is_over(waiting))
    assert rig.tokens(waiting) == expected_tokens(version, PROMPT, 4)
    rig.disk.contents["/a"] = "changed"
    gate.set()
    rig.finish()
    assert rig.names() == {"a": "loaded", "b": "loaded", "c": "loaded", "d": "loaded"}


def test_requests_that_wait_keep_a_version_whose_files_are_overwritten(make_rig: MakeRig) -> None:
    """Replaced in place while its requests are in the queue: the old bytes are nowhere but in memory."""
    rig = make_rig(max_loras=1, max_host=2)
    old, busy = rig.load("a", "old"), rig.load("b", "b")
    running = rig.submit("b", count=150)
    rig.until(lambda: len(rig.outputs[running]) > 1)
    waiting = [rig.submit("a", count=6) for _ in range(3)]
    rig.step()
    new = rig.load("a", "new", replace=True)
    later = rig.submit("a", count=6)
    assert rig.residency.tier(old) in (Tier.DISK, Tier.READING)
    rig.finish()
    for rid in waiting:
        assert rig.tokens(rid) == expected_tokens(old, PROMPT, 6)
    assert rig.tokens(later) == expected_tokens(new, PROMPT, 6)
    assert rig.tokens(running) == expected_tokens(busy, PROMPT, 150)
    assert set(rig.names().values()) == {"loaded"}


def test_an_abort_while_its_adapter_is_read(make_rig: MakeRig) -> None:
    rig = make_rig(max_host=2)
    for name in "abc":
        rig.load(name, name)
    gate = rig.block("/a")
    waiting = rig.submit("a")
    rig.until(lambda: rig.view("a")["tier"] == "reading")
    rig.core.abort(waiting, "enough")
    unload = rig.command(UnloadAdapter(name="a"))
    rig.wait(unload)
    gate.set()
    rig.finish()
    assert set(rig.names()) == {"b", "c"}


def test_a_copy_that_fails_is_told_and_tried_again(rig: AdapterRig) -> None:
    version = rig.load("a", "first")
    rig.failing_copies.add(version)
    rid = rig.submit("a")
    rig.until(lambda: rig.is_over(rid))
    finish = rig.outputs[rid][-1].finish
    assert finish is not None
    assert finish.status_code == 500
    rig.failing_copies.clear()
    assert rig.ask("a") == expected_tokens(version, PROMPT, 4)
    rig.finish()


def test_a_pin_whose_copy_failed_is_copied_again_unasked(rig: AdapterRig) -> None:
    rig.failing_copies.add(1)
    assert rig.load("p", "pinned", pinned=True) == 1
    for _ in range(4):
        rig.step()
    assert rig.view("p")["tier"] == "host"
    rig.failing_copies.clear()
    rig.until(lambda: rig.view("p")["tier"] == "device")
    rig.finish()
