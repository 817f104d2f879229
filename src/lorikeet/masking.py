"""Makes untrusted text fit to be shown: URLs without secrets, no forged lines, nothing endless."""

from __future__ import annotations

import re
from typing import Any, cast

# URLs are found by their slashes, not by their scheme: a pattern that begins with a scheme starts anew at each letter.
# From there a match takes everything up to a blank, a quote or an angle bracket, so each character is read a few times.
_URL = re.compile(
    r"""
    (?<= [a-z0-9+.-] ) (?P<slashes> :// )
    (?P<user>
        [^\s/?\#"'<>@:]* : (?! \d*(?:[/?\#\s"'<>)]|$) ) [^\s"'<>]* @   # a password, even with / or ? in it; no port
      | [^\s/?\#"'<>]* @
    )?
    (?P<rest> [^\s?\#"'<>]* )
    (?P<query> [?\#][^\s"'<>]* )?
    """,
    re.IGNORECASE | re.VERBOSE,
)
_MAX_SHOWN = 200
# Of a path: as many characters as the longest that the system takes.
_MAX_PATH = 4096


# The directories of an absolute path, up to its last component; no URL's.
_DIRECTORIES = re.compile(r"(?<![\w:/.~*+@-])(?:~|\.\.?)?/(?:[^\s/'\":;,()]++/)*+")


def without_paths(text: str, *known: str) -> str:
    """``text`` with the last component in place of each absolute path, and of each that begins with one of ``known``."""
    for path in known:
        directory, slash, _ = path.rstrip("/").rpartition("/")
        if slash:
            text = text.replace(f"{directory}/", "")
    return _DIRECTORIES.sub("", text)


def mask(text: str) -> str:
    """``text`` with the user information and the query of every URL in it replaced by ``***``. Rather too much than too
    little: a query ends only at a blank, a quote or an angle bracket."""
    return _URL.sub(_masked, text)


def mask_all(value: Any) -> Any:
    """:func:`mask` of every text in nested lists, tuples and dictionaries, their keys included."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return {mask_all(key): mask_all(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [mask_all(item) for item in cast("list[Any]", value)]
    return value


def mask_path(path: str) -> str:
    """One path, which may be a misspelt URL (``ftp:/user:password@host``): whatever looks like a password or a query is
    replaced, and what no path can be is cut."""
    masked = mask(shortened(path, _MAX_PATH))
    if "://" in masked:
        return masked
    before, at, after = masked.rpartition("@")
    scheme, colon, _ = before.partition(":")
    if at and colon:
        masked = f"{scheme}:***@{after}"
    # A colon makes it a URL; a directory may have a question mark in its name.
    head, mark, _ = masked.partition("?")
    return f"{head}?***" if mark and ":" in head else masked


def printable(text: str) -> str:
    """``text`` with everything that is not a visible character or a plain blank written as an escape, as ``repr`` does."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def shortened(text: str, most: int = _MAX_SHOWN) -> str:
    """The beginning of ``text``, printable: enough to know it by."""
    return printable(text if len(text) <= most else text[:most] + "…")


def _masked(match: re.Match[str]) -> str:
    user = "***@" if match["user"] else ""
    query = "?***" if match["query"] else ""
    return f"{match['slashes']}{user}{match['rest']}{query}"
