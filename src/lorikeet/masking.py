"""URLs without their secrets: a password or a key in a URL must not reach a log, a reply or an error message."""

from __future__ import annotations

import re
from typing import Any, cast

_URL = re.compile(
    r"""
    (?P<scheme> \b[a-z][a-z0-9+.-]*:// )
    (?P<user>
        [^\s/?\#"'<>@:]* : (?! \d*(?:[/?\#\s"'<>)]|$) ) [^\s"'<>]* @   # a password, even with / or ? in it; no port
      | [^\s/?\#"'<>]* @
    )?
    (?P<rest> [^\s?\#"'<>]* )
    (?P<query> [?\#][^\s"'<>]* )?
    """,
    re.IGNORECASE | re.VERBOSE,
)


def mask(text: str) -> str:
    """``text`` with the user information and the query of every URL in it replaced by ``***``. Rather too much than too
    little: a query ends only at a blank, a quote or an angle bracket."""
    return _URL.sub(_masked, text)


def mask_all(value: Any) -> Any:
    """The same of every text in nested lists, tuples and dictionaries, their keys included."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value).items()
        return {mask_all(key): mask_all(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [mask_all(item) for item in cast("list[Any]", value)]
    return value


def _masked(match: re.Match[str]) -> str:
    user = "***@" if match["user"] else ""
    query = "?***" if match["query"] else ""
    return f"{match['scheme']}{user}{match['rest']}{query}"
