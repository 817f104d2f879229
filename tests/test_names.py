"""What others may call things."""

from __future__ import annotations

import pytest

from lorikeet.errors import RequestError
from lorikeet.names import MAX_NAME, MAX_RID, check_adapter_name, check_name, shown_name


@pytest.mark.parametrize(
    "name", ["a", "sql-v2", "zoo/base:x", "Ünïcödé 名前 😀", "/models/a b", "é" * MAX_NAME]
)
def test_names_that_may_be_used(name: str) -> None:
    assert check_name(name, "lora_name") == name


@pytest.mark.parametrize(
    ("char", "code"),
    [
        ("\n", "U+000A"),
        ("\r", "U+000D"),
        ("\0", "U+0000"),
        ("\x1b", "U+001B"),
        ("\x7f", "U+007F"),
        ("\x85", "U+0085"),
        ("\u2028", "U+2028"),
        ("\u2029", "U+2029"),
        ("\u202e", "U+202E"),
        ("\u2066", "U+2066"),
        ("\u200f", "U+200F"),
        ("\ud800", "U+D800"),
    ],
)
def test_characters_that_cannot_be_shown_are_refused_and_not_repeated(char: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_name(f"a{char}b", "rid[3]")
    message = str(caught.value)
    assert "rid[3] is 'a\\" in message
    assert f"{code} at position 1" in message
    assert char not in message
    assert caught.value.param == "rid"
    message.encode()


def test_a_name_that_is_too_long_is_named_by_its_beginning() -> None:
    with pytest.raises(RequestError, match=r"rid has 1000000 characters .*at most 128") as caught:
        check_name("x" * 1_000_000, "rid", most=MAX_RID)
    assert len(str(caught.value)) < 300
    assert len(shown_name("x" * 1_000_000)) < 100


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(RequestError, match="lora_name is empty; allowed: 1 to 256"):
        check_name("", "lora_name")


@pytest.mark.parametrize("name", ["demo", "demo:sql", "demo:", "demo:demo:sql"])
def test_names_that_mean_the_base_or_what_follows_it(name: str) -> None:
    with pytest.raises(RequestError, match="lora_name: 'demo"):
        check_adapter_name(name, "demo")


@pytest.mark.parametrize("name", ["demo2", "sql", "demo-x:y", "x:demo", "dem:o"])
def test_names_beside_the_base(name: str) -> None:
    assert check_adapter_name(name, "demo") == name
