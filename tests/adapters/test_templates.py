"""Chat templates that adapters bring: from their files to whoever renders messages."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from lorikeet.adapters.templates import read_templates
from lorikeet.core.commands import FindAdapter
from lorikeet.core.messages import AdapterTemplates
from lorikeet.errors import AdapterError
from tests.support.adapter_rig import AdapterRig

CONFIG = "tokenizer_config.json"


def write(directory: Path, name: str, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / name).write_text(text, encoding="utf-8")


def test_files(tmp_path: Path) -> None:
    assert read_templates(tmp_path) == {}
    write(tmp_path, CONFIG, {"eos_token": "</s>"})
    assert read_templates(tmp_path) == {}
    write(tmp_path, CONFIG, {"chat_template": "{{ messages }}"})
    assert read_templates(tmp_path) == {"default": "{{ messages }}"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    write(tmp_path, CONFIG, {"chat_template": named})
    assert read_templates(tmp_path) == {"default": "a", "tool_use": "b"}
    # The file of its own wins.
    write(tmp_path, "chat_template.jinja", "é{{ tools }}")
    assert read_templates(tmp_path) == {"default": "é{{ tools }}"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("chat_template.jinja", "a\n{% for %}", "line 2"),
        ("chat_template.jinja", "{% nothing %}", "unknown tag"),
        ("chat_template.jinja", "{{ x | nothing }}", "nothing"),
        ("chat_template.jinja", "{% break %}", "cannot be used"),
        ("chat_template.jinja", "{{ 3**(10**7*2) }}", "cannot be used: it takes"),
        ("chat_template.jinja", "{{ 'a' * 100000000 }}", "it takes more than 256 MB of memory"),
        ("chat_template.jinja", "x" * 300_000, "have 300,007 characters; allowed: 262,144"),
        (CONFIG, '{"chat_template": "\\ud800"}', "half of a surrogate pair"),
        (CONFIG, '{"chat_template": [{"name": "\\ud800", "template": ""}]}', "half of a surrogate"),
        (CONFIG, "[" * 1_000_000, "not valid JSON"),
        (CONFIG, {"chat_template": "{{"}, "cannot be used"),
        (
            CONFIG,
            {
                "chat_template": [
                    {"name": "default", "template": "a"},
                    {"name": "b", "template": "{{"},
                ]
            },
            "'b'",
        ),
        (CONFIG, {"chat_template": 5}, "a string or a list"),
        (CONFIG, "{", "not valid JSON"),
        (CONFIG, "[]", "a JSON object"),
    ],
)
def test_what_is_no_template_is_refused(
    tmp_path: Path, name: str, content: object, words: str
) -> None:
    write(tmp_path, name, content)
    with pytest.raises(AdapterError) as raised:
        read_templates(tmp_path)
    assert str(tmp_path / name) in str(raised.value)
    assert words in str(raised.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(AdapterError, match="not UTF-8"):
        read_templates(tmp_path)


def test_news() -> None:
    with closing(AdapterRig()) as rig:
        rig.disk.templates = {"/a": {"default": "1"}}
        known = dict[str, dict[str, str]]()
        rig.load("a", "a")
        rig.load("b", "b")
        AdapterTemplates(rig.core.adapters.take_templates()).apply(known)
        assert known == {"a": {"default": "1"}, "b": {}}
        rig.unload("a")
        rig.unload("b")
        rig.disk.templates["/b"] = {"default": "2"}
        rig.load("b", "b")
        AdapterTemplates(rig.core.adapters.take_templates()).apply(known)
        assert known == {"b": {"default": "2"}}
        assert not rig.core.adapters.take_templates()


def test_names_and_their_templates() -> None:
    """Two names with the same bytes are one version, but each has the template of its own directory."""
    with closing(AdapterRig()) as rig:
        rig.disk.templates = {"/a": {"default": "1"}, "/b": {"default": "2"}}
        assert rig.load("a", "same") == rig.load("b", "same")
        assert rig.core.adapters.take_templates() == {"a": {"default": "1"}, "b": {"default": "2"}}
        rig.load("c", "other")
        assert rig.core.adapters.take_templates() == {"c": {}}
        rig.disk.templates["/a"] = {"default": "3"}
        rig.unload("a")
        assert rig.core.adapters.take_templates() == {"a": None}
        rig.load("a", "same")
        assert rig.core.adapters.take_templates() == {"a": {"default": "3"}}
        # The same bytes in place, but another template.
        rig.disk.templates["/a"] = {"default": "4"}
        rig.load("a", "same", replace=True)
        assert rig.core.adapters.take_templates() == {"a": {"default": "4"}}


def test_a_load_that_fails_is_no_news() -> None:
    with closing(AdapterRig()) as rig:
        with pytest.raises(AdapterError):
            rig.load("nothing")
        assert rig.core.adapters.take_templates() == {}


def test_finding_an_adapter(caplog: pytest.LogCaptureFixture) -> None:
    with closing(AdapterRig(resolver=True)) as rig:
        assert rig.core.command(FindAdapter("nobody")) is not None
        rig.write("/found/late", "late")
        gate = rig.block("/found/late")
        first = rig.command(FindAdapter(name="late"))
        second = rig.command(FindAdapter(name="late"))
        # Whoever does not wait any more takes nothing from the others.
        assert first.cancel()
        gate.set()
        rig.until(second.done)
        assert "late" in rig.core.adapters.take_templates()
        assert rig.core.command(FindAdapter("late")) is None
    assert "callback" not in caplog.text
