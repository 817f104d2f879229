"""Reads a text that grows, and JSON in it, without reading anything twice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from typing import Any, NoReturn, TypeVar

_T = TypeVar("_T")
Step = Generator[None, None, _T]
"""Part of a reader: it yields where it needs more text."""

SPACE = " \t\r\n"
NOTHING = object()
"""Stands for a value that is not there."""

_OUTSIDE_STRING = re.compile(r'["{}\[\]]')
_INSIDE_STRING = re.compile(r'["\\]')
_SCALAR = re.compile(r"[-+.\w]*")


class TextReader:
    """Generators that read from ``pos`` on. They do not depend on how the text is cut into pieces.

    Attributes:
        text: all that is there.
        is_over: nothing follows.
        pos: everything before it has been read.
        ran_out: the end of the text came where more was needed.
    """

    def __init__(self) -> None:
        self.text = ""
        self.is_over = False
        self.pos = 0
        self.ran_out = False
        self._told = 0
        self._tell: Callable[[int, int], None] | None = None

    def more(self) -> Step[bool]:
        """Wait for more text; False if none comes."""
        if self.is_over:
            self.ran_out = True
            return False
        yield
        return True

    def space(self) -> Step[None]:
        while True:
            while self.text[self.pos : self.pos + 1] in tuple(SPACE):
                self.pos += 1
            if self.pos < len(self.text) or not (yield from self.more()):
                return

    def literal(self, literal: str) -> Step[bool]:
        """Read ``literal``, if it is next."""
        while True:
            piece = self.text[self.pos : self.pos + len(literal)]
            if piece == literal:
                self.pos += len(literal)
                return True
            if not literal.startswith(piece) or not (yield from self.more()):
                return False

    def run_of(self, characters: re.Pattern[str]) -> Step[str]:
        """Read as many of these characters as there are."""
        while True:
            match = characters.match(self.text, self.pos)
            assert match is not None
            if match.end() < len(self.text) or not (yield from self.more()):
                self.pos = match.end()
                return match[0]

    def value(self, tell: Callable[[int, int], None] | None = None) -> Step[Any]:
        """Read one JSON value; ``NOTHING`` if it is malformed or the text ends in it.

        Args:
            tell: called with the half-open ranges of the text that make up the value, as they come.
        """
        begin = self.pos
        self._told, self._tell = begin, tell
        yield from self._scalar_or_first()
        if self.text[begin : begin + 1] in ("{", "[", '"') and not (yield from self._nested()):
            return NOTHING
        self._tell_so_far()
        return _read_json(self.text[begin : self.pos])

    def _nested(self) -> Step[bool]:
        """Read to the end of a string, list or object; False if the text ends before."""
        depth, in_string = 0, False
        while True:
            pattern = _INSIDE_STRING if in_string else _OUTSIDE_STRING
            match = pattern.search(self.text, self.pos)
            self.pos = len(self.text) if match is None else match.start()
            # An escape is two characters, and is not told by halves.
            needed = 2 if match is not None and match[0] == "\\" else 1
            if match is None or len(self.text) < self.pos + needed:
                self._tell_so_far()
                if (yield from self.more()):
                    continue
                self.pos = len(self.text)
                self._tell_so_far()
                return False
            self.pos += needed
            if match[0] == '"':
                in_string = not in_string
            elif not in_string:
                depth += 1 if match[0] in "{[" else -1
            if depth <= 0 and not in_string:
                return True

    def _tell_so_far(self) -> None:
        if self._tell is not None:
            self._tell(self._told, self.pos)
            self._told = self.pos

    def _scalar_or_first(self) -> Step[None]:
        """Wait for a value's first character; read all of a number, true, false or null."""
        while self.pos == len(self.text):
            if not (yield from self.more()):
                return
        yield from self.run_of(_SCALAR)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _read_json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return NOTHING
