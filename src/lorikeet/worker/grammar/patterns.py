"""Regular expressions of grammars, read in one pass and written in the form that XGrammar enforces.

XGrammar matches a whole text, so an anchor that stands at the beginning or the end changes nothing; one anywhere else is
ignored, with no more than a line on stderr, and so are lookaheads inside of JSON strings. Here the first kind is left out
and the others are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["MAX_REPEATS", "checked_json_pattern", "checked_regex"]

MAX_GROUP_DEPTH = 100
MAX_REPEATS = 10_000
# Counted repeats inside of JSON strings: XGrammar 0.2 compiles up to 128 and fails beyond.
_MAX_PART = 128
_MAX_WRITTEN = 2**17

# No text matches in two ways. What does not close is met once: it is an error.
_TOKEN = re.compile(
    r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\u\{[0-9a-fA-F]{1,6}\}|\\c[A-Za-z]|\\.|\[\^?(?:\\.|[^\]\\])*\]|\(\?<?[:=!]|\(\?P?<\w+>|.",
    re.DOTALL,
)
_COUNT = re.compile(r"\{([0-9]+)(?:(,)([0-9]*))?\}")
_QUANTIFIERS = "*+?{"
# The last five are refused, each for a reason of its own.
_KNOWN_LETTER_ESCAPES = frozenset("dDwWsSnrtfv0xuc" + "bBpPk")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_JSON_ESCAPES = r'"|\\\\|\\"|\\[nrtfv0]|\\c.|\\(?:x|u00|u\{0*)(?:[01]?[0-9a-fA-F]|22|5[cC])(?:\}|(?!\w))|[\x00-\x1f]'
_NEEDS_JSON_ESCAPE = re.compile(_JSON_ESCAPES)
_ONLY_JSON_ESCAPES = re.compile(f"(?:{_JSON_ESCAPES})+")
_NO_ATOMS = ("^", "$", "(")


@dataclass(slots=True)
class _Piece:
    """Something to match and how often; ``branches`` if it is a group, else ``text``."""

    text: str
    branches: list[list[_Piece]] | None = None
    quantifier: str = ""
    lazy: str = ""


@dataclass(slots=True)
class _Group:
    """A group that is being read."""

    opening: str
    branches: list[list[_Piece]] = field(default_factory=lambda: [[]])


def checked_regex(pattern: str) -> str:
    """The pattern to give the compiler: the same without anchors.

    Raises:
        ValueError: it is not a regular expression, or part of it would not be enforced.
    """
    return _written(_parsed(pattern), largest=None)


def checked_json_pattern(pattern: str) -> str:
    """The pattern to give the compiler inside a JSON string: large repeats become several small ones.

    Raises:
        ValueError: as :func:`checked_regex`, or it asks for a character that JSON writes as an escape.
    """
    branches = _parsed(pattern)
    for token in _atoms(branches):
        if token.startswith("[^"):
            continue
        if token.startswith("["):
            # The compiler leaves such characters out of a class, unless nothing else is in it.
            unsafe = _ONLY_JSON_ESCAPES.fullmatch(token[1:-1].replace("-", ""))
        else:
            unsafe = _NEEDS_JSON_ESCAPE.match(token)
        if unsafe:
            raise ValueError(
                f"the pattern {shown(pattern)} asks for a quote, backslash or control character, "
                "which is not supported"
            )
    return _written(branches, largest=_MAX_PART)


def shown(text: str) -> str:
    """A client's text as part of a message."""
    return repr(text) if len(text) <= 100 else repr(text[:100]) + "…"


def _parsed(pattern: str) -> list[list[_Piece]]:
    try:
        branches = _read(pattern)
        _drop_anchors(branches, at_start=True, at_end=True)
    except ValueError as error:
        raise ValueError(f"the pattern {shown(pattern)}: {error}") from None
    return branches


def _read(pattern: str) -> list[list[_Piece]]:
    groups = [_Group("")]
    position = 0
    while position < len(pattern):
        branch = groups[-1].branches[-1]
        if pattern[position] in _QUANTIFIERS:
            position = _read_quantifier(pattern, position, branch)
            continue
        found = _TOKEN.match(pattern, position)
        assert found is not None
        token, position = found.group(), found.end()
        if token.startswith("("):
            _check_group(token, pattern[position : position + 1])
            if len(groups) > MAX_GROUP_DEPTH:
                raise ValueError(f"groups are nested deeper than {MAX_GROUP_DEPTH} levels")
            groups.append(_Group("(?:" if token == "(?:" else "("))
        elif token == ")":
            if len(groups) == 1:
                raise ValueError("a closing parenthesis without an opening one")
            group = groups.pop()
            groups[-1].branches[-1].append(_Piece(group.opening, group.branches))
        elif token == "|":
            groups[-1].branches.append([])
        else:
            _check_token(token)
            branch.append(_Piece(token))
    if len(groups) > 1:
        raise ValueError("a parenthesis is not closed")
    return groups[0].branches


def _check_token(token: str) -> None:
    if token == "\\":
        raise ValueError("it ends in a backslash")
    if token == "[":
        raise ValueError("a bracket is not closed")
    if token in ("[]", "[^]"):
        raise ValueError(r"an empty class; a bracket in a class is written \]")
    if "\0" in token:
        raise ValueError("the null character is not supported")
    for escape in _ESCAPE.findall(token) if "\\" in token else ():
        if escape.isascii() and escape.isalpha() and escape not in _KNOWN_LETTER_ESCAPES:
            raise ValueError(f"the escape \\{escape} is not supported")
        if escape in "bB" and not token.startswith("["):
            raise ValueError("a word boundary is not supported")
        if escape in "pP":
            raise ValueError("Unicode classes are not supported")
        if escape in "123456789k":
            raise ValueError("Backreferences are not supported")


def _check_group(opening: str, following: str) -> None:
    if opening == "(" and following == "?":
        raise ValueError("(? is supported as (?: and (?<name> alone")
    if opening in ("(?=", "(?!"):
        raise ValueError("Lookahead is not supported")
    if opening in ("(?<=", "(?<!"):
        raise ValueError("Lookbehind is not supported")


def _read_quantifier(pattern: str, position: int, branch: list[_Piece]) -> int:
    """Give the last piece its quantifier; returns where the next token begins."""
    count = _COUNT.match(pattern, position) if pattern[position] == "{" else None
    if pattern[position] == "{" and count is None:
        raise ValueError(
            r"a brace that is no repetition ({2}, {2,} or {2,5}); as a character it is written \{"
        )
    if not branch or branch[-1].quantifier:
        raise ValueError(f"{pattern[position]!r} has nothing before it that it could repeat")
    piece = branch[-1]
    if piece.branches is None and piece.text in _NO_ATOMS:
        raise ValueError(f"{piece.text} cannot be repeated")
    if count is None:
        piece.quantifier = pattern[position]
        position += 1
    else:
        _check_count(count)
        piece.quantifier = count.group()
        position = count.end()
    if pattern[position : position + 1] == "?":
        piece.lazy = "?"
        position += 1
    return position


def _check_count(count: re.Match[str]) -> None:
    digits = max(len(number or "") for number in (count[1], count[3]))
    least, most = _bounds(count.group()) if digits < 10 else (MAX_REPEATS + 1, None)
    if max(least, most or 0) > MAX_REPEATS:
        raise ValueError(
            f"the repetition {shown(count.group())} is too large; allowed: up to {MAX_REPEATS:,}"
        )
    if most is not None and most < least:
        raise ValueError(
            f"Lower bound of the repetition {count.group()} is larger than the upper one"
        )


def _bounds(quantifier: str) -> tuple[int, int | None]:
    found = _COUNT.match(quantifier)
    assert found is not None
    least, is_range, most = found.groups()
    if not is_range:
        return int(least), int(least)
    return int(least), int(most) if most else None


def _drop_anchors(branches: list[list[_Piece]], *, at_start: bool, at_end: bool) -> None:
    """Leave out the anchors that hold anyway.

    Args:
        at_start, at_end: nothing stands before, or behind, this group.
    """
    for branch in branches:
        first = next((i for i, piece in enumerate(branch) if piece.text != "^"), len(branch))
        kept = branch[first:] if at_start else branch
        last = len(kept)
        while last and at_end and kept[last - 1].text == "$":
            last -= 1
        kept = kept[:last]
        for index, piece in enumerate(kept):
            if piece.branches is not None:
                once = not piece.quantifier
                _drop_anchors(
                    piece.branches,
                    at_start=once and at_start and index == 0,
                    at_end=once and at_end and index == len(kept) - 1,
                )
            elif piece.text in ("^", "$"):
                raise ValueError(f"{piece.text} in the middle is not supported")
        branch[:] = kept


def _atoms(branches: list[list[_Piece]]) -> Iterator[str]:
    for branch in branches:
        for piece in branch:
            if piece.branches is None:
                yield piece.text
            else:
                yield from _atoms(piece.branches)


def _written(branches: list[list[_Piece]], *, largest: int | None) -> str:
    """The pattern as text; no count in it is above ``largest``.

    Raises:
        ValueError: that makes it too long.
    """
    texts: list[str] = []
    length = 0
    for branch in branches:
        for piece in branch:
            atom = piece.text
            if piece.branches is not None:
                atom = f"{piece.text}{_written(piece.branches, largest=largest)})"
            quantifiers = _split(piece.quantifier, largest)  # none for {0}
            length += sum(len(atom) + len(text) for text in quantifiers)
            if length > _MAX_WRITTEN:
                raise ValueError("the repetitions of a pattern are too large together")
            texts += [f"{atom}{text}{piece.lazy}" for text in quantifiers]
        texts.append("|")
    return "".join(texts[:-1])


def _split(quantifier: str, largest: int | None) -> list[str]:
    """Quantifiers that mean the same one after the other: x{1,255} is x{1,128}x{0,127}."""
    if not quantifier.startswith("{"):
        return [quantifier]
    least, most = _bounds(quantifier)
    if largest is None:
        return [] if most == 0 else [quantifier]
    parts: list[str] = []
    while least > largest or (most is not None and most > largest):
        part = min(least, largest)
        if most is None:
            parts.append(f"{{{part}}}")
        else:
            parts.append(f"{{{part},{largest}}}")
            most -= largest
        least -= part
    if most is None:
        parts.append(f"{{{least},}}")
    elif most:
        parts.append(f"{{{least},{most}}}")
    return parts
