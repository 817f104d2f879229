"""The decoders of ``tokenizer.json`` as streams: tokens go in one at a time, text comes out as soon as it is final.

The ``tokenizers`` library decodes a whole list of tokens. Serving needs the text of token n+1 without decoding the n
tokens before it again, so the decoders that language models use are written here a second time, as streams. What a
stream has emitted never changes, and everything it emits together is what the library makes of the whole list; the
tests hold the two against each other on random tokens.

A decoder that is not in ``_STAGES`` is refused when the tokenizer is loaded.
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from lorikeet.errors import ModelError

# A run of byte tokens longer than this is not looked into before it has ended; see ByteFallbackStage.peek.
MAX_PEEK_BYTES = 1024

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextStream(ABC):
    """Tokens to text. One stream serves one completion."""

    @abstractmethod
    def push(self, token: str) -> str:
        """Take the next token; return the text that it made final, which may be empty."""

    def peek(self) -> str:
        """Return the text that is held back if it would be valid should the tokens end here; changes nothing."""
        return ""

    def flush(self) -> str:
        """The tokens have ended: return what was held back, U+FFFD in place of broken characters."""
        return ""


class ByteLevelStream(TextStream):
    """Each token stands for bytes; characters are emitted when their last byte has come, so that what is held back is
    always the beginning of one."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> str:
        return self._utf8.decode(byte_level_bytes(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 bytes are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTE_LEVEL_ALPHABET = byte_level_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; a token outside the alphabet (an added one) stands for its own UTF-8."""
    try:
        return bytes([_BYTE_LEVEL_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode("utf-8")


class JoinedStream(TextStream):
    """A tokenizer without a decoder: whole words, joined by a space.

    Args:
        is_first: True if no visible token comes before.
        tight: tokens that are joined without a space on either side (``spaces_between_special_tokens`` is off).
    """

    def __init__(self, *, is_first: bool, tight: Callable[[str], bool]) -> None:
        self._tight = tight
        self._no_space = is_first

    def push(self, token: str) -> str:
        is_tight = self._tight(token)
        space = "" if self._no_space or is_tight else " "
        self._no_space = is_tight
        return space + token


class Stage(ABC):
    """One decoder of a sequence: a list of pieces becomes a list of pieces."""

    @abstractmethod
    def push(self, piece: str) -> list[str]:
        """Take the next piece; return those that are final now."""

    @abstractmethod
    def peek(self, pieces: list[str]) -> list[str]:
        """What ``pieces`` and everything held back would become if the tokens ended after them; changes nothing."""

    def flush(self) -> list[str]:
        """The pieces have ended: return those held back."""
        return []


class MapStage(Stage):
    """Changes each piece by itself."""

    def __init__(self, change: Callable[[str], str]) -> None:
        self._change = change

    def push(self, piece: str) -> list[str]:
        return [self._change(piece)]

    def peek(self, pieces: list[str]) -> list[str]:
        return [self._change(piece) for piece in pieces]


class ByteFallbackStage(Stage):
    """Tokens ``<0x0A>`` are bytes; a run of them is one text if all of it is UTF-8, else one U+FFFD per byte.

    Because the last byte of a run decides over all of it, a run is held back until a token of another kind ends it.
    """

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, piece: str) -> list[str]:
        byte = _BYTE_TOKEN.fullmatch(piece)
        if byte:
            self._run.append(int(byte[1], 16))
            return []
        return [*self.flush(), piece]

    def peek(self, pieces: list[str]) -> list[str]:
        """See :class:`Stage`; an unfinished or broken run counts as nothing, and so does a very long one.

        A stop string may be complete inside a run (newlines are byte tokens in many vocabularies), so the run has to
        be looked at after each token; the bound keeps the cost of that linear.
        """
        if not self._run or len(self._run) > MAX_PEEK_BYTES:
            return pieces
        try:
            return [self._run.decode("utf-8"), *pieces]
        except UnicodeDecodeError:
            return pieces

    def flush(self) -> list[str]:
        run = bytes(self._run)
        self._run.clear()
        if not run:
            return []
        try:
            return [run.decode("utf-8")]
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class FirstPieceStage(Stage):
    """Metaspace: the mark of a word's beginning is a space, and nothing at all in the first piece."""

    def __init__(self, *, mark: str, drop_in_first: bool) -> None:
        self._mark = mark
        self._drop = drop_in_first

    def _change(self, piece: str, *, drop: bool) -> str:
        return piece.replace(self._mark, "" if drop else " ")

    def push(self, piece: str) -> list[str]:
        changed = self._change(piece, drop=self._drop)
        self._drop = False
        return [changed]

    def peek(self, pieces: list[str]) -> list[str]:
        return [
            self._change(piece, drop=self._drop and index == 0)
            for index, piece in enumerate(pieces)
        ]


class StripStartStage(Stage):
    """Removes up to ``count`` times ``char`` from the beginning of the whole text."""

    def __init__(self, *, char: str, count: int) -> None:
        self._char = char
        self._left = count

    def _strip(self, piece: str) -> tuple[str, int]:
        left = self._left
        while left and piece.startswith(self._char):
            piece = piece[len(self._char) :]
            left -= 1
        return piece, 0 if piece else left

    def push(self, piece: str) -> list[str]:
        if self._left:
            piece, self._left = self._strip(piece)
        return [piece]

    def peek(self, pieces: list[str]) -> list[str]:
        return [self._strip("".join(pieces))[0]]


class StagedStream(TextStream):
    """A sequence of stages."""

    def __init__(self, stages: list[Stage]) -> None:
        self._stages = stages

    def push(self, token: str) -> str:
        return self._run([token], first=0)

    def peek(self) -> str:
        pieces: list[str] = []
        for stage in self._stages:
            pieces = stage.peek(pieces)
        return "".join(pieces)

    def flush(self) -> str:
        text = ""
        for index, stage in enumerate(self._stages):
            text += self._run(stage.flush(), first=index + 1)
        return text

    def _run(self, pieces: list[str], *, first: int) -> str:
        for stage in self._stages[first:]:
            pieces = [out for piece in pieces for out in stage.push(piece)]
        return "".join(pieces)


StageMaker = Callable[[bool], Stage]
"""Makes the stage of one completion; the argument says that no visible token comes before it."""


class StreamFactory:
    """Reads the decoder of a ``tokenizer.json`` once and opens streams for it.

    Args:
        decoder: the ``decoder`` object of the file; None if it has none.
        where: the file, for messages.

    Raises:
        ModelError: a decoder that has no streaming form here.
    """

    def __init__(self, decoder: Mapping[str, Any] | None, where: str) -> None:
        parts = flatten(decoder, "decoders")
        kinds = [str(part.get("type")) for part in parts]
        self.is_byte_level = kinds == ["ByteLevel"]
        self.joins_with_spaces = decoder is None
        self._makers: list[StageMaker] = []
        if not self.is_byte_level:
            self._makers = _stage_makers(parts, where)

    def open(self, *, is_first: bool, tight: Callable[[str], bool]) -> TextStream:
        """Open the stream of one completion.

        Args:
            is_first: True if no visible token comes before the first one pushed.
            tight: tokens that are joined without spaces where the decoder joins by spaces.
        """
        if self.is_byte_level:
            return ByteLevelStream()
        if self.joins_with_spaces:
            return JoinedStream(is_first=is_first, tight=tight)
        return StagedStream([make(is_first) for make in self._makers])


def flatten(part: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The parts of a component of ``tokenizer.json``; a sequence has them under ``name``."""
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [one for inner in part[name] for one in flatten(inner, name)]
    return [part]


def _stage_makers(parts: list[Mapping[str, Any]], where: str) -> list[StageMaker]:
    makers: list[StageMaker] = []
    is_fused = False
    for part in parts:
        kind = str(part.get("type"))
        if kind == "Fuse":
            is_fused = True
            continue
        reader = (_FUSED_STAGES if is_fused else _STAGES).get(kind)
        maker = reader(part) if reader else None
        if maker is None:
            raise ModelError(
                f"{where}: the decoder {dict(part)}{' after Fuse' if is_fused else ''} cannot be streamed; "
                f"supported: ByteLevel, or a sequence of {', '.join(_STAGES)} and, after Fuse, "
                "Strip at the start and Replace of single characters"
            )
        makers.append(maker)
    return makers


def _read_replace(part: Mapping[str, Any]) -> StageMaker | None:
    pattern, content = part["pattern"].get("String"), part["content"]
    if not pattern:
        return None
    return lambda is_first: MapStage(lambda piece: piece.replace(pattern, content))


def _read_fused_replace(part: Mapping[str, Any]) -> StageMaker | None:
    # A longer pattern could straddle two pieces of what is one text by now.
    return _read_replace(part) if len(part["pattern"].get("String", "")) == 1 else None


def _read_metaspace(part: Mapping[str, Any]) -> StageMaker | None:
    mark, drops = part["replacement"], part.get("prepend_scheme", "always") != "never"
    return lambda is_first: FirstPieceStage(mark=mark, drop_in_first=drops and is_first)


def _read_strip(part: Mapping[str, Any]) -> StageMaker | None:
    char, start, stop = part["content"], part["start"], part["stop"]

    def strip(piece: str) -> str:
        for _ in range(start):
            piece = piece.removeprefix(char)
        for _ in range(stop):
            piece = piece.removesuffix(char)
        return piece

    return lambda is_first: MapStage(strip)


def _read_fused_strip(part: Mapping[str, Any]) -> StageMaker | None:
    char, start, stop = part["content"], part["start"], part["stop"]
    if stop:  # the end of the text is not known while it streams
        return None
    return lambda is_first: StripStartStage(char=char, count=start if is_first else 0)


_STAGES: dict[str, Callable[[Mapping[str, Any]], StageMaker | None]] = {
    "Replace": _read_replace,
    "ByteFallback": lambda part: lambda is_first: ByteFallbackStage(),
    "Metaspace": _read_metaspace,
    "Strip": _read_strip,
}

_FUSED_STAGES: dict[str, Callable[[Mapping[str, Any]], StageMaker | None]] = {
    "Replace": _read_fused_replace,
    "Strip": _read_fused_strip,
}
