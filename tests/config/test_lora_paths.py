"""The spellings of an entry of --lora-paths, and what is said about one that cannot be read."""

from __future__ import annotations

import json

import pytest

from lorikeet.config import LoRAPath
from lorikeet.config.lora_paths import parse_lora_path
from lorikeet.errors import ConfigError

A = LoRAPath("a", "path/a")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("path/to/it", LoRAPath("path/to/it", "path/to/it")),
        ("sql=path/to/it", LoRAPath("sql", "path/to/it")),
        ("a=p=q", LoRAPath("a", "p=q")),
        ("a=https://u:p@host/a?key=b", LoRAPath("a", "https://u:p@host/a?key=b")),
        ("s3://bucket/a", LoRAPath("s3://bucket/a", "s3://bucket/a")),
        ('{"lora_name": "n", "lora_path": "p"}', LoRAPath("n", "p")),
        ('{"lora_name":"n","lora_path":"p=q","pinned":true}', LoRAPath("n", "p=q", pinned=True)),
        ({"lora_name": "n", "lora_path": "p", "pinned": False}, LoRAPath("n", "p")),
        (A, A),
    ],
)
def test_spellings_of_an_adapter(entry, expected):
    assert parse_lora_path(entry) == expected


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("", ["''"]),
        (7, ["7", "NAME=PATH"]),
        ("=path", ["'=path'", "both"]),
        ("name=", ["'name='", "both"]),
        ("https://host/a?key=secret", ["URL", "NAME=URL"]),
        ('{"lora_name": 3, "lora_path": "https://h/a?secret"}', ["https://h/a?***", "lora_name"]),
        ({"lora_path": "s3://u:secret@b/a"}, ["s3://***@b/a", "lora_name is missing"]),
        ("https://user:secret@host/a", ["URL", "NAME=URL"]),
        ('{"lora_name": "n"}', ["lora_path is missing"]),
        ('{"lora_path": "p"}', ["lora_name is missing"]),
        ('{"lora_name": "n", "lora_path": ""}', ["lora_path must be text"]),
        ('{"lora_name": 3, "lora_path": "p"}', ["lora_name must be text"]),
        ('{"lora_name": "n", "lora_path": "p", "pinned": "yes"}', ["pinned must be true or false"]),
        (
            '{"lora_name": "n", "lora_path": "p", "rank": 8}',
            ["unknown key rank", "known: lora_name"],
        ),
        ('{"name": "n"', ["not JSON", '{"lora_name"']),
    ],
)
def test_a_bad_adapter_entry_is_refused(entry, words):
    with pytest.raises(ConfigError) as caught:
        parse_lora_path(entry)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("eaten", "meant"),
    [
        # dash keeps the braces, bash expands them into three words; both remove the quotes.
        ("{lora_name:lora0,lora_path:p/q,pinned:true}", ("lora0", "p/q", True)),
        ("{lora_name: lora0, lora_path: p}", ("lora0", "p", False)),
        ("{lora_name:lora0,lora_path:p,pinned:True}", ("lora0", "p", True)),
        ("lora_name:lora0", ("lora0", "PATH", False)),
        ("pinned:true", ("NAME", "PATH", True)),
    ],
)
def test_json_whose_quotes_the_shell_ate_is_shown_quoted(eaten, meant):
    with pytest.raises(ConfigError) as caught:
        parse_lora_path(eaten)
    message = str(caught.value)
    assert "single quotes" in message
    quoted = json.loads(message[message.rindex("'{") + 1 : message.rindex("}") + 1])
    assert (quoted["lora_name"], quoted["lora_path"], quoted["pinned"]) == meant


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('{"lora_name":"x","lora_path":"p","pinned":True}', ("x", "p", True)),
        ("{'lora_name': 'x', 'lora_path': 'p=q', 'pinned': False}", ("x", "p=q", False)),
        ('{"lora_name": "x", "lora_path": "p",}', ("x", "p", False)),
    ],
)
def test_an_object_of_python_is_shown_as_json(written, meant):
    with pytest.raises(ConfigError) as caught:
        parse_lora_path(written)
    message = str(caught.value)
    assert "Python and not JSON" in message
    quoted = json.loads(message[message.rindex("'{") + 1 : message.rindex("}") + 1])
    assert (quoted["lora_name"], quoted["lora_path"], quoted["pinned"]) == meant


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("{lora_name:x,lora_path:p,pinned:yes}", "pinned must be true or false"),
        ("{'lora_name': 'x', 'lora_path': 'p', 'pinned': 1}", "pinned must be true or false"),
        ("{'lora_name': 'x', 'rank': 1}", "unknown key rank"),
        ("{'lora_name'", "not JSON"),
        ("{'lora_name'}", "not JSON"),
        ("{" * 5000, "not JSON"),
    ],
)
def test_no_value_is_proposed_that_was_not_meant(written, words):
    with pytest.raises(ConfigError) as caught:
        parse_lora_path(written)
    assert words in str(caught.value)
