from __future__ import annotations

import random

import pytest

from lorikeet.adapters import registry as module
from lorikeet.adapters.registry import AdapterRegistry
from lorikeet.errors import AdapterError, AdapterNotFoundError


def load(registry: AdapterRegistry, name: str, digest: str, *, pinned: bool = False) -> int:
    return registry.register(
        name, path=f"/{name}", digest=digest, rank=8, targets=("q_proj",), nbytes=64, pinned=pinned
    )


def replace(registry: AdapterRegistry, name: str, digest: str) -> int:
    return registry.replace(
        name, path=f"/{name}", digest=digest, rank=8, targets=("q_proj",), nbytes=64
    )


def test_the_base_model_is_version_0_and_always_there() -> None:
    registry = AdapterRegistry()
    assert registry.lease(None) == 0
    registry.release(0)
    assert registry.pop_unleased() == []


def test_versions_increase() -> None:
    registry = AdapterRegistry()
    assert [load(registry, name, name) for name in "abc"] == [1, 2, 3]
    assert list(registry.loaded()) == ["a", "b", "c"]
    assert registry.info(2).path == "/b"


def test_a_name_is_loaded_once() -> None:
    registry = AdapterRegistry()
    load(registry, "a", "1")
    with pytest.raises(AdapterError, match="'a' is already loaded from '/a'"):
        load(registry, "a", "2")
    registry.check_integrity()


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    registry = AdapterRegistry()
    with pytest.raises(AdapterNotFoundError, match=r"'x' has never been loaded.*adapters: none"):
        registry.lease("x")
    load(registry, "b", "1")
    load(registry, "a", "2")
    with pytest.raises(AdapterNotFoundError, match=r"adapters: b, a$") as caught:
        registry.lease("x")
    assert caught.value.param == "lora_path"
    for index in range(30):
        load(registry, f"c{index:02}", f"c{index}")
    with pytest.raises(AdapterNotFoundError, match="c05 and 24 more"):
        registry.lease("x")


def test_unload_hides_at_once_and_frees_after_the_last_lease() -> None:
    registry = AdapterRegistry()
    version = load(registry, "a", "1")
    assert registry.lease("a") == registry.lease("a") == version
    registry.unload("a")
    with pytest.raises(AdapterNotFoundError):
        registry.lease("a")
    assert registry.pop_unleased() == []
    registry.release(version)
    assert (registry.pop_unleased(), registry.num_leases(version)) == ([], 1)
    registry.release(version)
    assert registry.pop_unleased() == [version]
    assert registry.pop_unleased() == []
    with pytest.raises(KeyError):
        registry.info(version)


def test_same_bytes_have_the_same_version() -> None:
    registry = AdapterRegistry()
    version = load(registry, "a", "1")
    assert load(registry, "b", "1") == version, "under another name"
    registry.unload("a")
    assert registry.pop_unleased() == [], "b still means it"
    registry.unload("b")
    assert load(registry, "c", "1") == version, "while it is hidden"
    assert registry.pop_unleased() == []
    registry.unload("c")
    assert registry.pop_unleased() == [version]
    assert load(registry, "d", "1") == version, "after it was dropped"
    assert load(registry, "e", "2") == version + 1
    registry.check_integrity()


def test_replace_leaves_old_leases_alone() -> None:
    registry = AdapterRegistry()
    old = load(registry, "a", "1")
    assert registry.lease("a") == old
    new = replace(registry, "a", "2")
    assert registry.lease("a") == new != old
    assert registry.pop_unleased() == []
    registry.release(old)
    assert registry.pop_unleased() == [old]
    assert replace(registry, "a", "2") == new, "same bytes"
    assert registry.pop_unleased() == []
    with pytest.raises(AdapterNotFoundError):
        replace(registry, "b", "3")


def test_release_without_lease_is_a_bug() -> None:
    registry = AdapterRegistry()
    version = load(registry, "a", "1")
    for unleased in (version, 99):
        with pytest.raises(ValueError, match="is not leased"):
            registry.release(unleased)


def test_pinned_by_any_of_its_names() -> None:
    registry = AdapterRegistry()
    version = load(registry, "a", "1")
    assert not registry.is_pinned(version)
    load(registry, "b", "1", pinned=True)
    assert registry.is_pinned(version)
    registry.unload("b")
    assert not registry.is_pinned(version)
    assert not registry.is_pinned(99)


def test_digests_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED", 3)
    registry = AdapterRegistry()
    kept = load(registry, "kept", "kept")
    for index in range(5):
        load(registry, "a", str(index))
        registry.unload("a")
        registry.pop_unleased()
    assert load(registry, "again", "kept") == kept
    assert load(registry, "b", "4") == 6, "the newest is remembered"
    assert load(registry, "c", "0") == 7, "the oldest is not, and gets a number of its own"
    registry.check_integrity()


def test_random_loads_and_leases() -> None:
    rng = random.Random(3)
    registry = AdapterRegistry()
    leases: list[int] = []
    content: dict[int, str] = {}
    dropped: set[int] = set()
    for step in range(3000):
        name = rng.choice("abcd")
        digest = str(rng.randint(0, 5))
        action = rng.random()
        if name not in registry.loaded():
            version = load(registry, name, digest)
            assert content.setdefault(version, digest) == digest
            dropped.discard(version)
        elif action < 0.2:
            registry.unload(name)
        elif action < 0.4:
            version = replace(registry, name, digest)
            assert content.setdefault(version, digest) == digest
            dropped.discard(version)
        elif action < 0.7:
            leases.append(registry.lease(name))
        elif leases:
            registry.release(leases.pop(rng.randrange(len(leases))))
        if step % 3 == 0:
            gone = set(registry.pop_unleased())
            assert not gone & set(leases)
            assert not gone & {info.version for info in registry.loaded().values()}
            dropped |= gone
        registry.check_integrity()
        assert not dropped & set(leases)


def test_a_content_has_its_version_before_its_name() -> None:
    registry = AdapterRegistry()
    load(registry, "a", "1")
    assert registry.version_of("2") == 2
    assert registry.version_of("1") == 1
    assert load(registry, "b", "3") == 3
    assert load(registry, "c", "2") == 2
    registry.check_integrity()


def test_names_and_hidden_versions() -> None:
    registry = AdapterRegistry()
    load(registry, "b", "1")
    load(registry, "a", "1")
    version = registry.lease("a")
    assert registry.names_of(version) == ["a", "b"]
    registry.unload("a")
    assert registry.names_of(version) == ["b"]
    assert not registry.is_hidden(version)
    registry.unload("b")
    assert registry.names_of(version) == []
    assert registry.is_hidden(version)
    assert registry.get("a") is None
    with pytest.raises(AdapterNotFoundError, match="'a'"):
        registry.find("a")
    registry.release(version)
    assert registry.is_hidden(version)
    assert registry.pop_unleased() == [version]
    assert not registry.is_hidden(version)
    assert registry.names_of(version) == []


def test_what_is_said_of_an_unknown_name_is_short_and_on_one_line():
    registry = AdapterRegistry()
    for number in range(50):
        load(registry, f"{number:02}\n" + "x" * 5000, str(number))
    with pytest.raises(AdapterNotFoundError) as caught:
        registry.find("\x1b[31m" + "y" * 100_000)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    assert message.endswith(" and 42 more"), "the first 8 are listed"
