"""Secrets of URLs, wherever they stand in a text."""

from __future__ import annotations

import pytest

from lorikeet.masking import mask


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
