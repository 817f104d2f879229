"""A streaming client that notes when each token arrives.

It speaks just as much HTTP/1.1 as the server answers with. A general client spends more time on each event than a fast
server does on making it, and would measure itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import orjson

# Of one request, from its first byte to its last.
TIMEOUT_S = 600.0
# A line of a reply is one event; the largest holds the whole text so far.
_LINE_LIMIT = 2**24
_DATA = b"data: "
_DONE = b"[DONE]"


class ReplyError(Exception):
    """The server refused a request or broke off its reply."""


@dataclass
class Record:
    """One request as its caller saw it; seconds of ``time.perf_counter``.

    Attributes:
        arrival: when it was due. All times count from here, so that a client that falls behind cannot flatter the
            server.
        sent: when the client got to it.
        events: for each event with new tokens: when it came, and how many tokens were new.
        error: what went wrong, in a few words; None for a whole reply.
    """

    adapter: str | None
    arrival: float
    sent: float = 0.0
    events: list[tuple[float, int]] = field(default_factory=list)
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        return sum(tokens for _, tokens in self.events)

    @property
    def first_token_s(self) -> float:
        return self.events[0][0] - self.arrival

    @property
    def total_s(self) -> float:
        return self.events[-1][0] - self.arrival

    @property
    def gaps_s(self) -> list[float]:
        """From one event to the next, as a reader sees the text grow."""
        times = [when for when, _ in self.events]
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    @property
    def per_token_s(self) -> float | None:
        """Mean time of a token after the first event's; None if there are none."""
        later = self.num_tokens - self.events[0][1]
        return (self.events[-1][0] - self.events[0][0]) / later if later else None


class Client:
    """Sends requests to one server, each on a connection of its own.

    Args:
        url: ``http://host:port``.
        api_key: sent with each request; None sends none.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        self.address = parts.hostname or "127.0.0.1", parts.port or 80
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new connection."""
        return await asyncio.open_connection(*self.address, limit=_LINE_LIMIT)

    def head(self, method: str, path: str, length: int) -> bytes:
        """Of a request with a body of ``length`` bytes, after which the server is to close the connection."""
        host, port = self.address
        return (
            f"{method} {path} HTTP/1.1\r\nHost: {host}:{port}\r\n{self._key}"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n"
            "Connection: close\r\n\r\n"
        ).encode()

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and content of a reply that comes whole.

        Raises:
            ReplyError: none came.
            OSError: the connection failed.
        """
        reader, writer = await self.open()
        try:
            writer.write(self.head(method, path, len(body)) + body)
            head, _, content = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            await _close(writer)
        if not head:
            raise ReplyError("the connection was closed without a reply")
        return int(head.split()[1]), content

    async def generate(self, record: Record, prompt: list[int], num_tokens: int) -> None:
        """Stream one greedy completion of exactly ``num_tokens`` tokens; what goes wrong becomes ``record.error``."""
        body = generate_body(prompt, num_tokens, adapter=record.adapter)
        record.sent = time.perf_counter()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._stream(record, body)
        except (OSError, TimeoutError, EOFError, ValueError, ReplyError) as error:
            record.error = f"{type(error).__name__}: {error}"[:200]
            return
        if record.num_tokens != num_tokens:
            record.error = f"{record.num_tokens} tokens came instead of {num_tokens}"

    async def _stream(self, record: Record, body: bytes) -> None:
        reader, writer = await self.open()
        try:
            writer.write(self.head("POST", "/generate", len(body)) + body)
            await writer.drain()
            seen = 0
            async for event in _events(reader):
                now = time.perf_counter()
                if "error" in event:
                    raise ReplyError(str(event["error"]))
                total = event["meta_info"]["completion_tokens"]
                if total > seen:
                    record.events.append((now, total - seen))
                    seen = total
        finally:
            await _close(writer)


def generate_body(
    prompt: list[int], num_tokens: int, *, adapter: str | None = None, stream: bool = True
) -> bytes:
    """Body of ``/generate`` for one greedy completion of exactly ``num_tokens`` tokens."""
    body = {
        "input_ids": prompt,
        "lora_path": adapter,
        "stream": stream,
        "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True},
    }
    return orjson.dumps(body)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event.

    Raises:
        ReplyError: the status is not 200.
        EOFError: the reply ends before its last event.
    """
    status = (await reader.readline()).split()
    while (await reader.readline()).strip():
        pass  # the headers
    if len(status) < 2 or status[1] != b"200":
        text = (await reader.read(2048)).decode(errors="replace")
        raise ReplyError(f"status {status[1:2]}: {text}")
    rest = b""
    async for piece in _chunks(reader):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(_DATA + _DONE):
                return
            if line.startswith(_DATA):
                yield orjson.loads(line[len(_DATA) :])
    raise EOFError("the reply ended before its last event")


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The pieces of a reply in chunked encoding."""
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]
