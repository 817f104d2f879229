"""The wire between the HTTP process and the engine process: two one-way zmq sockets, msgpack in both directions.

The receiver of a direction binds and the sender connects, so that a message sent before the other side is up waits in
the sender's queue instead of blocking. Neither queue has a limit: a sender must never block (the engine's loop least
of all), and the receivers always read on, whatever their own clients do. What bounds them is that the engine sends
one message for a step, and a client one for a request.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import zmq
import zmq.asyncio

from lorikeet.core.messages import (
    ToClient,
    ToEngine,
    decode_to_client,
    decode_to_engine,
    encode,
)

# A Unix socket's path must fit 107 bytes (sockaddr_un); the longest name below is 14.
MAX_DIRECTORY = 90
# How long a closing engine still tries to deliver its last words.
LINGER_MS = 2000
# A burst is handed on in parts, so that other coroutines of the HTTP process get their turn.
MAX_BATCH = 64


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where the two processes meet: a directory that only this user can enter."""

    directory: str

    @classmethod
    def create(cls) -> EngineAddress:
        """Make the directory; :meth:`remove` deletes it."""
        directory = tempfile.mkdtemp(prefix="lorikeet-")
        if len(directory) > MAX_DIRECTORY:
            Path(directory).rmdir()
            directory = tempfile.mkdtemp(prefix="lorikeet-", dir="/tmp")
        return cls(directory)

    @property
    def to_engine(self) -> str:
        return f"ipc://{self.directory}/engine.sock"

    @property
    def to_client(self) -> str:
        return f"ipc://{self.directory}/client.sock"

    @property
    def uploads(self) -> Path:
        """Where adapters lie that clients have sent."""
        return Path(self.directory) / "adapters"

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


class ProcessHandle(Protocol):
    """What the client needs of the engine's process (a ``multiprocessing.Process`` has it)."""

    @property
    def sentinel(self) -> int:
        """A file descriptor that becomes readable when the process ends."""
        ...

    @property
    def exitcode(self) -> int | None: ...


class ClientTransport:
    """The HTTP process's end, for one asyncio loop.

    Attributes:
        address: where the two processes meet.
    """

    def __init__(self, address: EngineAddress) -> None:
        self.address = address
        self._context = zmq.asyncio.Context()
        self._pull = self._context.socket(zmq.PULL)
        self._pull.rcvhwm = 0
        self._pull.bind(address.to_client)
        self._push = zmq.Socket(
            self._context, zmq.PUSH
        )  # the plain kind, whose send() does not await
        self._push.sndhwm = 0
        self._push.connect(address.to_engine)

    def send(self, message: ToEngine) -> None:
        """Queue a message; never blocks."""
        self._push.send(encode(message), zmq.NOBLOCK)

    async def recv(self) -> list[ToClient]:
        """Wait for the engine's next message and return it with those that have come with it.

        Raises:
            msgspec.DecodeError: the engine sent something else.
        """
        messages = [decode_to_client(await self._pull.recv())]
        while len(messages) < MAX_BATCH:
            try:
                data = await self._pull.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            messages.append(decode_to_client(data))
        return messages

    def close(self) -> None:
        """Close both sockets; what is not sent yet is dropped, since the engine may be gone."""
        self._pull.close(linger=0)
        self._push.close(linger=0)
        self._context.term()


class EngineEndpoint:
    """The engine process's end: blocking, for one thread."""

    def __init__(self, address: EngineAddress) -> None:
        self._context = zmq.Context()
        self._pull = self._context.socket(zmq.PULL)
        self._pull.rcvhwm = 0
        self._pull.bind(address.to_engine)
        self._push = self._context.socket(zmq.PUSH)
        self._push.sndhwm = 0
        self._push.connect(address.to_client)

    def recv(self, timeout_ms: int) -> list[ToEngine]:
        """All messages that are there, waiting at most ``timeout_ms`` for the first (0: not at all).

        Raises:
            msgspec.DecodeError: the client sent something else.
        """
        messages: list[ToEngine] = []
        if not self._pull.poll(timeout_ms):
            return messages
        while True:
            try:
                data = self._pull.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            messages.append(decode_to_engine(data))

    def send(self, message: ToClient) -> None:
        """Queue a message; never blocks."""
        self._push.send(encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        """Close; what is queued still gets ``LINGER_MS`` to be delivered."""
        self._pull.close(linger=0)
        self._push.close(linger=LINGER_MS)
        self._context.term()
