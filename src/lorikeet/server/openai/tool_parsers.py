"""Finds calls of tools in the text that a model writes, while it is being written.

A parser reads the text as far as it is there and says what is certain. What it says does not depend on how the text was
cut into pieces. Three rules:

- A call is told once its name has been read and is that of a tool, and its arguments have begun; from then on they are
  told as they are written, character by character as the model wrote them. One without arguments, which has ``{}``, is
  told when it is complete.
- What turns out to be no call is text. A call that breaks after it was told ends as :class:`Broken`.
- White space between text and a call, and between calls, belongs to neither.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Text:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True, slots=True)
class Begin:
    """A call of the tool ``name``."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the call's arguments, which together are a JSON object."""

    text: str


@dataclass(frozen=True, slots=True)
class End:
    """The call is complete."""


@dataclass(frozen=True, slots=True)
class Broken:
    """The call that has begun is malformed from here on; what follows its arguments is text."""


Event = Text | Begin | Arguments | End | Broken

_NAME = re.compile(r"[\w.-]*")


class ToolCallParser(TextReader, ABC):
    """Finds the calls of one output.

    Args:
        names: of the tools that may be called.
    """

    markers: tuple[str, ...]
    """What calls begin with."""

    other_markers: tuple[str, ...] = ()
    """What else may be a special token of theirs."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        super().__init__()
        self._start = 0  # everything before it has been told
        self._has_begun = False  # a call was told that has not ended
        self._call_end = -1  # where the last complete call ended
        self._name: str | None = None  # of the call that is read
        self._early: tuple[int, int] | None = None  # its arguments, where they came before the name
        self._events: list[Event] = []
        self._machine = self._parse()

    def advance(self, text: str, *, is_over: bool) -> list[Event]:
        """Read on, and return what is certain now.

        Args:
            text: the whole output so far.
            is_over: nothing follows.
        """
        self.text, self.is_over = text, is_over
        next(self._machine, None)
        events, self._events = self._events, []
        return events

    @abstractmethod
    def _calls(self) -> Step[bool]:
        """Read what follows a marker; False if it breaks off. ``_end`` has been called for each complete call."""

    def _parse(self) -> Step[None]:
        while (yield from self._find()):
            self.ran_out, marker_end = False, self.pos
            if (yield from self._calls()):
                continue
            if self._has_begun:
                # Up to self._start the arguments have been told: what follows them is text.
                self._events.append(Broken())
                self._has_begun = False
            # A marker in what was no call may begin one.
            self.pos = max(self._start, marker_end)

    def _find(self) -> Step[bool]:
        """Tell the text before the next marker and read the marker; False at the end of the output."""
        while True:
            found = [at for mark in self.markers if (at := self.text.find(mark, self.pos)) >= 0]
            if found:
                at = min(found)
                self._tell_text(at, trim=True)
                marker = next(mark for mark in self.markers if self.text.startswith(mark, at))
                self.pos = at + len(marker)
                return True
            if self.is_over:
                follows_call = self._start == self._call_end
                if not follows_call or not self.text[self._start :].isspace():
                    self._tell_text(len(self.text))
                return False
            self.pos = max(self.pos, self._first_that_may_be_a_marker())
            self._tell_text(self.pos, trim=True)
            yield

    def _first_that_may_be_a_marker(self) -> int:
        """Where the end of the text begins that may be the first half of a marker."""
        longest = max(map(len, self.markers)) - 1
        for at in range(max(self.pos, len(self.text) - longest), len(self.text)):
            if any(mark.startswith(self.text[at:]) for mark in self.markers):
                return at
        return len(self.text)

    def _tell_text(self, end: int, *, trim: bool = False) -> None:
        """Tell the text up to ``end``; white space at its end, if trimmed, is kept back: a call may follow."""
        text = self.text[self._start : end]
        text = text.rstrip(SPACE) if trim else text
        if text:
            self._events.append(Text(text))
            self._start += len(text)

    def _begin(self, name: str) -> None:
        self._has_begun = True
        self._events.append(Begin(name))

    def _tell_arguments(self, begin: int, end: int) -> None:
        if begin < end:
            self._events.append(Arguments(self.text[begin:end]))
        self._start = end

    def _end(self) -> None:
        if not self._has_begun:
            # The function has no parameters, and the model left them out.
            assert self._name is not None
            self._begin(self._name)
            self._events.append(Arguments("{}"))
        self._has_begun = False
        self._start = self._call_end = self.pos
        self._events.append(End())

    def _arguments(self, name: str) -> Step[bool]:
        """Read the arguments of a call, which begins with them."""
        yield from self.space()
        if not (yield from self.literal("{")):
            return False
        self._begin(name)
        self.pos -= 1
        return isinstance((yield from self.value(self._tell_arguments)), dict)

    def _object(self) -> Step[bool]:
        """Read a call as an object with ``name`` and, unless it has none, ``arguments`` or ``parameters``; ``id`` and
        ``type`` may be there, nothing else."""
        self._name, self._early = None, None
        if not (yield from self.literal("{")):
            return False
        while True:
            yield from self.space()
            key = yield from self.value()
            yield from self.space()
            if not (yield from self.literal(":")):
                return False
            yield from self.space()
            if not (yield from self._member(key)):
                return False
            yield from self.space()
            if (yield from self.literal("}")):
                return self._name is not None
            if not (yield from self.literal(",")):
                return False

    def _listed_call(self) -> Step[bool]:
        """Read a call that is an object without a marker of its own, and white space around it."""
        yield from self.space()
        if not (yield from self._object()):
            return False
        self._end()
        yield from self.space()
        return True

    def _member(self, key: object) -> Step[bool]:
        """Read the value of one key of a call; False if it does not belong there."""
        if key == "name" and self._name is None:
            name = yield from self.value()
            if not isinstance(name, str) or name not in self._names:
                return False
            self._name = name
            if self._early is not None:
                self._begin(name)
                self._tell_arguments(*self._early)
            return True
        if key in ("arguments", "parameters") and self._early is None and not self._has_begun:
            if self._name is not None:
                return (yield from self._arguments(self._name))
            begin = self.pos
            is_object = isinstance((yield from self.value()), dict)
            self._early = begin, self.pos
            return is_object
        return key in ("id", "type") and isinstance((yield from self.value()), str)


class HermesParser(ToolCallParser):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, once for each call: Hermes, Qwen 2.5 and 3."""

    markers = ("<tool_call>",)
    other_markers = ("</tool_call>",)

    def _calls(self) -> Step[bool]:
        yield from self.space()
        if not (yield from self._object()):
            return False
        yield from self.space()
        # Some models end their output where the tag should be closed.
        if not (yield from self.literal("</tool_call>")) and not self.ran_out:
            return False
        self._end()
        return True


class Llama3Parser(ToolCallParser):
    """``{"name": ..., "parameters": {...}}`` as the first thing or after ``<|python_tag|>``; several joined by ``;``."""

    markers = ("<|python_tag|>",)

    def _find(self) -> Step[bool]:
        if not self.pos:
            yield from self.space()
            if (yield from self.literal("{")):
                return True
        return (yield from super()._find())

    def _calls(self) -> Step[bool]:
        if self.text[self.pos - 1] == "{":
            self.pos -= 1
        while True:
            if not (yield from self._listed_call()):
                return False
            if not (yield from self.literal(";")):
                return True


class MistralParser(ToolCallParser):
    """``[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]``, or ``[TOOL_CALLS]name[ARGS]{...}`` for each call."""

    markers = ("[TOOL_CALLS]",)
    other_markers = ("[ARGS]",)

    def _calls(self) -> Step[bool]:
        yield from self.space()
        if not (yield from self.literal("[")):
            return (yield from self._named_call())
        while True:
            if not (yield from self._listed_call()):
                return False
            if (yield from self.literal("]")):
                self._start = self._call_end = self.pos
                return True
            if not (yield from self.literal(",")):
                # Some models end their output before the bracket.
                return self.ran_out

    def _named_call(self) -> Step[bool]:
        name = yield from self.run_of(_NAME)
        if not (yield from self.literal("[ARGS]")) or name not in self._names:
            return False
        if not (yield from self._arguments(name)):
            return False
        self._end()
        return True
