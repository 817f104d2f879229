"""Rules for names that come from outside: ids of requests, names of adapters, paths.

Names stand in log lines, headers, labels of metrics and messages to other users, so they are short and consist of
characters that can be seen: none that ends a line, moves a terminal's cursor or turns the direction of what follows.
"""

from __future__ import annotations

import re

from lorikeet.errors import RequestError

# Characters. A UUID has 36; a name is repeated in every log line, label and list; a path is what the system opens.
MAX_RID = 128
MAX_NAME = 256
MAX_PATH = 4096
# Characters of somebody's name that a message repeats when it says that the name is unknown.
MAX_ECHO = 80

# Control characters (C0, DEL, C1), the separators of lines and paragraphs, what turns the direction of writing, and
# halves of surrogate pairs, which no encoding can write.
_FORBIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def check_name(text: str, field: str, *, most: int = MAX_NAME) -> str:
    """Return ``text`` if it may be used as a name.

    Args:
        field: what to call it in the message: ``lora_name``, ``rid[3]``.
        most: characters that it may have.

    Raises:
        RequestError: it is empty or too long, or holds a character that cannot be shown.
    """
    param = field.partition("[")[0]
    if not text:
        raise RequestError(f"{field} is empty; allowed: 1 to {most} characters", param)
    if len(text) > most:
        raise RequestError(
            f"{field} has {len(text)} characters ({shown_name(text)}); allowed: at most {most}",
            param,
        )
    found = _FORBIDDEN.search(text)
    if found:
        raise RequestError(
            f"{field} is {shown_name(text)} and has the character U+{ord(found[0]):04X} at position {found.start()}; "
            "allowed: no control characters, line breaks or other characters that cannot be shown",
            param,
        )
    return text


def check_adapter_name(text: str, base: str, field: str = "lora_name") -> str:
    """Return ``text`` if it may be the name of an adapter.

    Args:
        base: what the base model is called; "" if it has no name.

    Raises:
        RequestError: as :func:`check_name`, or it means the base or, by a request's ``model``, another adapter.
    """
    check_name(text, field)
    if text == base:
        raise RequestError(
            f"{field}: {text!r} is the name of the base model; allowed: any other", field
        )
    if is_reserved(text, base):
        raise RequestError(
            f"{field}: {shown_name(text)} begins with the base model's name and ':', by which requests name the adapter "
            "that follows; allowed: a name without that beginning",
            field,
        )
    return text


def is_reserved(text: str, base: str) -> bool:
    """True for ``BASE`` and ``BASE:x``, which mean the base and the adapter ``x``."""
    return bool(base) and (text == base or text.startswith(f"{base}:"))


def shown_name(text: str) -> str:
    """A name as a message quotes it: escaped, and cut where it is long."""
    return repr(text if len(text) <= MAX_ECHO else text[:MAX_ECHO] + "…")
