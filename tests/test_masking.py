"""Secrets of URLs, wherever they stand in a text."""

from __future__ import annotations

import pytest

from lorikeet.masking import mask, mask_path, printable, shortened


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
    "text",
    [
        "a." * 500_000,
        "://" * 300_000,
        "a://x:" * 200_000,
        "a://" + "@" * 500_000,
        "a://1" + "1" * 500_000,
    ],
    ids=["schemes", "slashes", "users", "ats", "port"],
)
def test_masking_takes_time_in_proportion_to_the_text(text):
    # A matcher that begins anew at each letter takes hours for these.
    assert len(mask(text)) <= len(text)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/a/b?c", "/a/b?c"),
        ("owner/name@main", "owner/name@main"),
        ("/adapters/x@2", "/adapters/x@2"),
        ("ftp://user:secret@host/x", "ftp://***@host/x"),
        ("http:/user:secret@host/x?k=1", "http:***@host/x?***"),
        ("https:user:secret@host", "https:***@host"),
        ("user:secret@host:/x", "user:***@host:/x"),
        ("http:/host/x?sig=1", "http:/host/x?***"),
        ("a\nb", r"a\nb"),
        ("a\x1b[31m\ud800", r"a\x1b[31m\ud800"),
    ],
)
def test_a_path_that_is_no_proper_url(path, shown):
    assert mask_path(path) == shown


def test_printable_text_stays_and_anything_else_is_escaped():
    assert printable("größer, 大きい 'x'") == "größer, 大きい 'x'"
    assert printable("a\nb\x00\u2028\ud800\x9b") == r"a\nb\x00\u2028\ud800\x9b"
    assert shortened("x" * 300) == "x" * 200 + "…"
