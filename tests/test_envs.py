"""Environment variables: types, defaults, and that all of them are in the table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorikeet import envs
from lorikeet.errors import ConfigError

SOURCES = Path(envs.__file__).parent


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for variable in envs.ALL:
        monkeypatch.delenv(variable.name, raising=False)


@pytest.mark.parametrize("text", ["1", "true", "YES"])
def test_true(monkeypatch, text):
    monkeypatch.setenv("DEMO_ONCE", text)
    assert envs.DEMO_ONCE.get() is True


@pytest.mark.parametrize("text", ["0", "False", "no", "", " "])
def test_false_and_empty(monkeypatch, text):
    monkeypatch.setenv("DEMO_ONCE", text)
    assert envs.DEMO_ONCE.get() is False


def test_defaults():
    assert [variable.get() for variable in envs.ALL] == [None, None, False, None, False]


def test_text(monkeypatch):
    monkeypatch.setenv("LORIKEET_API_KEY", " key ")
    assert envs.API_KEY.get() == "key"


@pytest.mark.parametrize("variable", [envs.API_KEY, envs.ADMIN_API_KEY], ids=lambda v: v.name)
@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_an_empty_key_is_no_open_server(monkeypatch, variable, text):
    monkeypatch.setenv(variable.name, text)
    with pytest.raises(ConfigError, match=f"{variable.name} is empty; allowed: a key"):
        variable.get()


def test_a_bad_value_is_named(monkeypatch):
    monkeypatch.setenv("DEMO_ONCE", "maybe")
    with pytest.raises(ConfigError, match="DEMO_ONCE is 'maybe'; allowed: 1, true"):
        envs.DEMO_ONCE.get()


def test_processes_below_get_everything_but_our_keys(monkeypatch):
    monkeypatch.setenv("LORIKEET_API_KEY", "key")
    monkeypatch.setenv("LORIKEET_ADMIN_API_KEY", "key")
    monkeypatch.setenv("OTHER", "stays")
    monkeypatch.setenv("CHANGED", "before")
    child = envs.for_child(CHANGED="after", NEW="1")
    assert not child.keys() & {"LORIKEET_API_KEY", "LORIKEET_ADMIN_API_KEY"}
    assert (child["OTHER"], child["CHANGED"], child["NEW"]) == ("stays", "after", "1")


def test_only_envs_reads_the_environment():
    readers = [
        path.name
        for path in SOURCES.rglob("*.py")
        if re.search(r"os\.environ|getenv", path.read_text(encoding="utf-8"))
    ]
    assert readers == ["envs.py"]


def test_every_variable_is_used():
    names = {id(value): name for name, value in vars(envs).items()}
    text = "".join(
        p.read_text(encoding="utf-8") for p in SOURCES.rglob("*.py") if p.name != "envs.py"
    )
    for variable in envs.ALL:
        assert f"envs.{names[id(variable)]}.get()" in text
