"""The body of ``/load_lora_adapter_from_tensors``, read as it comes: its tensors go to a file, never into memory as a whole.

Only so much JSON is understood here as it takes to find the string; the rest is parsed afterwards like any other body.
"""

from __future__ import annotations

import asyncio
import binascii
import os
import re
import sys
from collections.abc import AsyncIterable
from pathlib import Path
from typing import BinaryIO, cast

import orjson

from lorikeet.adapters.tensor_header import LENGTH_BYTES, has_header, is_pickled
from lorikeet.errors import RequestError

FIELD = "tensors"
#: Most bytes of the body beside the tensors: a configuration has at most 4 MiB.
MAX_REST = (4 << 20) + (64 << 10)
#: Bytes that are read at a time, about.
PIECE = 1 << 20

# What stands for the tensors in the rest, if there are any.
_STAND_IN = b"-"
_SPACE = b" \t\r\n"
# A string up to its end or that of the bytes; what may follow is the quote, or a backslash that ends the bytes.
_INSIDE = re.compile(rb"(?:[^\"\\]++|\\.)*+", re.DOTALL)
# Of a key; longer ones cannot be ours, however they are escaped.
_MAX_KEY = 6 * len(FIELD) + 2
_MAX_ESCAPE = 6


async def receive(stream: AsyncIterable[bytes], weights: Path) -> bytes:
    """Write the tensors of a body to a file, on a thread. Returns the body without them, as ``TensorsBody.finish``.

    Raises:
        RequestError: as ``TensorsBody`` does, or the file cannot be written.
    """
    try:
        with open(weights, "wb", opener=_open_private) as file:
            body = TensorsBody(file)
            pieces: list[bytes] = []
            async for piece in stream:
                pieces.append(piece)
                if sum(map(len, pieces)) >= PIECE:
                    await asyncio.to_thread(body.feed, b"".join(pieces))
                    pieces.clear()
            await asyncio.to_thread(body.feed, b"".join(pieces))
            rest = body.finish()
            await asyncio.to_thread(file.flush)
        return rest
    except OSError as error:
        raise RequestError(f"{FIELD}: cannot be written: {error.strerror}", FIELD) from error


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class TensorsBody:
    """Takes the bytes of a body in any pieces.

    Args:
        file: gets the decoded tensors.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._base64 = _Base64(file)
        self._rest = bytearray()
        self._depth = 0
        # What lies between the last string and the next one.
        self._between = bytearray()
        # The last string, if it may be a key of the body itself.
        self._key: bytearray | None = None
        self._place = self._outside
        self._is_found = False

    def feed(self, data: bytes) -> None:
        """Read on.

        Raises:
            RequestError: the tensors are not base64 or no safetensors file, or everything else is too large.
        """
        at = 0
        while at < len(data):
            at = self._place(data, at)

    def finish(self) -> bytes:
        """The body without its tensors: a short string stands for them, an empty one if they are empty.

        Raises:
            RequestError: the tensors are not complete.
        """
        self._keep(self._between)
        if self._is_found and self._place != self._inside_tensors:
            self._base64.check()
        return bytes(self._rest)

    def _outside(self, data: bytes, at: int) -> int:
        quote = data.find(b'"', at)
        end = len(data) if quote < 0 else quote
        self._between += data[at:end]
        if len(self._between) > MAX_REST:
            raise _too_large()
        if quote < 0:
            return end
        between, self._between = self._between, bytearray()
        depth = self._depth
        self._depth += sum(map(between.count, (b"{", b"["))) - sum(map(between.count, (b"}", b"]")))
        self._keep(between)
        if depth == self._depth == 1 and bytes(between).strip(_SPACE) == b":" and self._is_ours():
            self._begin_tensors()
        else:
            self._keep(b'"')
            self._key = bytearray() if self._depth == 1 else None
            self._place = self._inside
        return quote + 1

    def _inside(self, data: bytes, at: int) -> int:
        match = _INSIDE.match(data, at)
        end = len(data) if match is None else match.end()
        self._keep(data[at:end])
        if self._key is not None and len(self._key) <= _MAX_KEY:
            self._key += data[at : min(end, at + _MAX_KEY + 1)]
        if end == len(data):
            return end
        if data[end : end + 1] == b'"':
            self._keep(b'"')
            self._place = self._outside
        else:
            self._keep(b"\\")  # the last byte that there is
            self._place = self._escaped
        return end + 1

    def _escaped(self, data: bytes, at: int) -> int:
        self._keep(data[at : at + 1])
        if self._key is not None and len(self._key) <= _MAX_KEY:
            self._key += b"\\" + data[at : at + 1]
        self._place = self._inside
        return at + 1

    def _inside_tensors(self, data: bytes, at: int) -> int:
        quote = data.find(b'"', at)
        end = len(data) if quote < 0 else quote
        self._base64.feed(data[at:end], is_last=quote >= 0)
        if quote < 0:
            return end
        self._keep((_STAND_IN if self._base64.num_bytes else b"") + b'"')
        self._key = None
        self._place = self._outside
        return quote + 1

    def _begin_tensors(self) -> None:
        if self._is_found:
            raise RequestError(f"{FIELD}: is there twice", FIELD)
        self._is_found = True
        self._keep(b'"')
        self._place = self._inside_tensors

    def _is_ours(self) -> bool:
        if self._key is None or len(self._key) > _MAX_KEY:
            return False
        try:
            return orjson.loads(b'"' + bytes(self._key) + b'"') == FIELD
        except orjson.JSONDecodeError:
            return False

    def _keep(self, data: bytes | bytearray) -> None:
        self._rest += data
        if len(self._rest) > MAX_REST:
            raise _too_large()


class _Base64:
    """Base64 in a JSON string, in any pieces, decoded into a file.

    Attributes:
        num_bytes: written.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._escaped: bytes = b""  # may be the beginning of an escape
        self._odd: bytes = b""  # fewer characters than make whole bytes
        self._is_padded = False
        self._head = b""
        self.num_bytes = 0

    def feed(self, text: bytes, *, is_last: bool) -> None:
        text = self._unescaped(self._escaped + text, is_last=is_last)
        text = self._odd + text
        end = len(text) if is_last else len(text) - len(text) % 4
        self._odd, text = text[end:], text[:end]
        if not text:
            return
        if self._is_padded:
            raise _not_base64("padding before its end")
        try:
            data = binascii.a2b_base64(text, strict_mode=True)
        except ValueError as error:
            raise _not_base64(str(error)) from None
        self._is_padded = text.endswith(b"=")
        if len(self._head) <= LENGTH_BYTES:
            self._head += data[: LENGTH_BYTES + 1 - len(self._head)]
            if len(self._head) > LENGTH_BYTES:
                self._check_head(sys.maxsize)
        self._file.write(data)
        self.num_bytes += len(data)

    def check(self) -> None:
        """Refuse what has no safetensors header; the tensors themselves are checked where they are loaded."""
        if self.num_bytes:
            self._check_head(self.num_bytes)

    def _check_head(self, size: int) -> None:
        if has_header(self._head, size):
            return
        is_pickle = is_pickled(self._head)
        kind = "a pickle, which is never read" if is_pickle else "not a safetensors file"
        raise RequestError(f"{FIELD}: is {kind}; it must be a safetensors file in base64", FIELD)

    def _unescaped(self, text: bytes, *, is_last: bool) -> bytes:
        """JSON may write any character as an escape; some libraries do so with every slash."""
        self._escaped = b""
        if b"\\" not in text:
            return text
        if not is_last:
            begin = text.rfind(b"\\", max(0, len(text) - _MAX_ESCAPE + 1))
            if begin >= 0:
                self._escaped, text = text[begin:], text[:begin]
        try:
            return cast(str, orjson.loads(b'"' + text + b'"')).encode()
        except (orjson.JSONDecodeError, UnicodeEncodeError):
            raise _not_base64("it is no JSON string") from None


def _not_base64(reason: str) -> RequestError:
    return RequestError(f"{FIELD}: is not valid base64: {reason}", FIELD)


def _too_large() -> RequestError:
    return RequestError(f"the body without its {FIELD} has more than {MAX_REST} bytes, the limit")
