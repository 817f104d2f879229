"""Secrets of URLs, wherever they stand in a text."""

from __future__ import annotations

import pytest

from lorikeet.masking import mask, mask_all, without_directories


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/a/b?c", "/a/b?c"),
        ("owner/name@main", "owner/name@main"),
        ("https://host/a", "https://host/a"),
        ("https://host:8/a/b.c", "https://host:8/a/b.c"),
        ("https://user:pass@host/a", "https://***@host/a"),
        ("https://token@host", "https://***@host"),
        ("https://user:p@ss@host/a", "https://***@host/a"),
        ("https://user:p/ss@host/a", "https://***@host/a"),
        ("https://user:p?ss@host/a", "https://***@host/a"),
        ("https://host/a?X-Amz-Signature=1&b=2", "https://host/a?***"),
        ("HTTPS://u:p@HOST/a#fragment", "HTTPS://***@HOST/a?***"),
        ("s3://key:secret@bucket/a", "s3://***@bucket/a"),
        ("s3+v4://u:p@b", "s3+v4://***@b"),
        (
            "got 'https://u:p@h/a?k=1', then (http://h/b?x)",
            "got 'https://***@h/a?***', then (http://h/b?***",
        ),
        ("URL('https://h/a?k=(1)')", "URL('https://h/a?***')"),
    ],
)
def test_mask(text, shown):
    assert mask(text) == shown
    assert mask(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/zoo/a/adapter_model.safetensors is gone", "adapter_model.safetensors is gone"),
        ("its files at '/srv/my zoo/a' have changed", "its files at 'my zoo/a' have changed"),
        ("of (/a/b), /c/d:e", "of (b), d:e"),
        (
            "https://***@host/x/y?***, owner/name, a/b/c",
            "https://***@host/x/y?***, owner/name, a/b/c",
        ),
        ("/name and / and //x", "/name and / and //x"),
        ("", ""),
    ],
)
def test_paths_are_shown_without_their_directories(text: str, shown: str) -> None:
    assert without_directories(text) == shown


def test_a_long_text_of_slashes_takes_no_time() -> None:
    for text in ("/a" * 200_000, "/" * 200_000, "'/a" * 200_000, "/a/ " * 100_000):
        without_directories(text)


def test_every_text_of_nested_values_is_masked() -> None:
    url = "https://u:p@h/x?k=v"
    value = {url: [url, (url, 3)], "a": {"b": url}, "n": None}
    shown = "https://***@h/x?***"
    assert mask_all(value) == {shown: [shown, [shown, 3]], "a": {"b": shown}, "n": None}
