"""Adapters by their names in one directory: what is found, what is not, and for how long that is remembered."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorikeet.adapters.sources import resolver as module
from lorikeet.adapters.sources.resolver import Resolver
from lorikeet.errors import AdapterError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def fill(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_bytes(b"{}")
    return path


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def directory(tmp_path):
    fill(tmp_path / "dir" / "a")
    fill(tmp_path / "outside")
    return tmp_path / "dir"


@pytest.fixture
def resolver(directory, clock):
    return Resolver(directory, negative_seconds=10, max_negative=3, clock=clock)


@pytest.fixture
def looked_up(monkeypatch):
    """Names that reached the disk."""
    names: list[str] = []
    look_up = Resolver._look_up

    def count(self, name):
        names.append(name)
        return look_up(self, name)

    monkeypatch.setattr(Resolver, "_look_up", count)
    return names


def test_a_directory_of_that_name(resolver, directory):
    assert resolver.find("a") == directory / "a"


@pytest.mark.parametrize(
    "name",
    [
        "b",
        "",
        ".",
        "..",
        "../outside",
        "a/../../outside",
        "/etc",
        "a/",
        "a\\b",
        "a\0",
        ".git",
        "x" * 256,
        "\udcff" * 200,
    ],
)
def test_other_names_are_not_there(resolver, directory, name):
    fill(directory / ".git")
    assert resolver.find(name) is None


def test_a_directory_without_a_configuration_is_no_adapter(resolver, directory):
    (directory / "b").mkdir()
    (directory / "file").write_bytes(b"")
    assert resolver.find("b") is None
    assert resolver.find("file") is None


def test_links_stay_inside(resolver, directory):
    (directory / "out").symlink_to(directory.parent / "outside")
    (directory / "in").symlink_to(directory / "a")
    (directory / "loop").symlink_to(directory / "loop")
    (directory / "self").symlink_to(directory)
    assert resolver.find("out") is None
    assert resolver.find("in") == directory / "a"
    assert resolver.find("loop") is None
    assert resolver.find("self") is None
    allowed = Resolver(directory, roots=(directory.parent / "outside",))
    assert allowed.find("out") == directory.parent / "outside"


def test_a_missing_name_is_looked_up_again_only_after_a_while(
    resolver, directory, clock, looked_up
):
    assert resolver.find("b") is None
    fill(directory / "b")
    clock.now = 9.9
    assert resolver.find("b") is None
    assert looked_up == ["b"]
    clock.now = 10.0
    assert resolver.find("b") == directory / "b"
    assert resolver.find("b") == directory / "b"


def test_a_name_can_be_forgotten(resolver, directory):
    assert resolver.find("b") is None
    fill(directory / "b")
    resolver.forget("b")
    assert resolver.find("b") == directory / "b"


def test_a_failed_load_is_repeated_as_its_reason(resolver, clock, looked_up):
    resolver.find("a")
    resolver.reject("a", "rank 64 is too large")
    with pytest.raises(AdapterError, match="rank 64 is too large"):
        resolver.find("a")
    assert looked_up == ["a"]
    clock.now = 10.0
    assert resolver.find("a") is not None


def test_what_is_remembered_is_bounded(resolver, looked_up):
    for name in ("m1", "m2", "m3", "m4"):
        resolver.find(name)
    resolver.find("m4")
    resolver.find("m1")
    assert looked_up == ["m1", "m2", "m3", "m4", "m1"]
    assert len(resolver._negative) == 3


def test_names_that_cannot_be_names_are_not_remembered(resolver, looked_up):
    resolver.find("../x")
    resolver.reject("../x", "no")
    assert looked_up == []
    assert len(resolver._negative) == 0


def test_a_directory_that_is_gone(tmp_path):
    assert Resolver(tmp_path / "gone").find("a") is None


def test_the_default_keeps_a_name_for_seconds_not_hours():
    assert 1 <= Resolver(Path())._seconds <= 60
    assert module.Resolver is Resolver
