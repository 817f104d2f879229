"""The wire between the HTTP process and the engine process: two one-way zmq sockets, msgpack in both directions.

The receiver of a direction binds and the sender connects, so that a message sent before the other side is up waits in
the sender's queue instead of blocking. Neither queue has a limit: a sender must never block (the engine's loop least
of all), and the receivers always read on, whatever their own clients do. What bounds them is that the engine sends
one message for a step, and a client one for a request. Whatever a message holds, it can be sent, and what cannot be
read is handed on as such (:class:`lorikeet.core.messages.Unreadable`).
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import zmq
import zmq.asyncio

from lorikeet.core.commands import AnyCommand, Command, R
from lorikeet.core.messages import (
    Ask,
    Cancel,
    Pulse,
    Reply,
    ToClient,
    ToEngine,
    Unreadable,
    decode_to_client,
    decode_to_engine,
    encode,
)
from lorikeet.errors import EngineFault, UnavailableError
from lorikeet.scratch import ScratchDir

# A Unix socket's path must fit 107 bytes (sockaddr_un); the longest name below is 14.
MAX_DIRECTORY = 90
# Of a directory in the place for temporary files, with its slash.
LONGEST_NAME = 1 + len("lorikeet-") + 8
# How long a closing engine still tries to deliver its last words.
LINGER_MS = 2000
# How often a living engine says so.
PULSE_S = 1.0
# A burst is handed on in parts, so that other coroutines of the HTTP process get their turn.
MAX_BATCH = 64
# A longer pause between two looks says nothing of the engine: this process was stopped, the machine asleep or overloaded.
MAX_TICKS = 2


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where the two processes meet: a directory of the HTTP process that only this user can enter."""

    scratch: ScratchDir

    @classmethod
    def create(cls) -> EngineAddress:
        """Make the directory; :meth:`remove` deletes it."""
        base = tempfile.gettempdir()
        is_long = len(base) + LONGEST_NAME > MAX_DIRECTORY
        return cls(ScratchDir("/tmp" if is_long else base))

    @property
    def directory(self) -> str:
        return self.scratch.path

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
        self.scratch.remove()


class ProcessHandle(Protocol):
    """What the client needs of the engine's process (a ``multiprocessing.Process`` has it)."""

    @property
    def sentinel(self) -> int:
        """A file descriptor that becomes readable when the process ends."""
        ...

    @property
    def exitcode(self) -> int | None: ...

    def kill(self) -> None:
        """End it, whatever it does (SIGKILL)."""
        ...


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

    async def recv(self) -> list[ToClient | Unreadable]:
        """Wait for the engine's next message and return it with those that have come with it."""
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


class Commands:
    """The commands of one client, for one asyncio loop.

    Args:
        transport: sends them; the caller hands the replies to :meth:`reply`.
    """

    def __init__(self, transport: ClientTransport) -> None:
        self._transport = transport
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._num = 0
        self._is_dead = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def run(self, command: Command[R], *, timeout: float | None = None) -> R:
        """Send a command and wait for its result, at most ``timeout`` seconds.

        If the caller is cancelled, the engine is told; it drops what it can still undo (a load that is not complete).

        Raises:
            UserError, EngineFault: the answer was an error.
            EngineFault: it was given up meanwhile (:meth:`fail`).
            UnavailableError: there was no answer in time.
        """
        self._num += 1
        number = self._num
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._transport.send(Ask(number, cast("AnyCommand", command)))
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise UnavailableError(
                f"the engine has not answered within {timeout:g} seconds; try again later"
            ) from None
        except asyncio.CancelledError:
            if not self._is_dead:
                self._transport.send(Cancel(number))
            raise
        finally:
            del self._waiting[number]

    def reply(self, reply: Reply) -> None:
        """Take in an answer; that of a command whose caller has gone is dropped."""
        future = self._waiting.get(reply.id)
        if future is None or future.done():
            return
        if reply.failure is None:
            future.set_result(reply.result)
        else:
            future.set_exception(reply.failure.error())

    def fail(self, fault: EngineFault) -> None:
        """No answer will come: the engine is lost, or told to end."""
        self._is_dead = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(fault)


class Silence:
    """Seconds without news, counted only while this process looks.

    A clock alone would call the engine silent when it is this process that was suspended, or that has not come to read
    what is there.

    Args:
        tick: seconds between two looks.
    """

    def __init__(self, tick: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = MAX_TICKS * tick
        self._clock = clock
        self._looked = clock()
        self.turn = 0.0
        self.pulse = 0.0

    def heard(self, *, is_pulse: bool = False) -> None:
        """There is news: from the engine's loop, or only that its process lives."""
        self.pulse = 0.0
        if not is_pulse:
            self.turn = 0.0

    def tick(self) -> None:
        """Look at the clock."""
        now = self._clock()
        passed = min(now - self._looked, self._most)
        self._looked = now
        self.turn += passed
        self.pulse += passed

    def exceeds(self, seconds: float) -> bool:
        """True if the loop has said nothing for so long, whether or not its process lives."""
        return self.turn > seconds


class EngineEndpoint:
    """The engine process's end: blocking, for one thread."""

    def __init__(self, address: EngineAddress) -> None:
        self._address = address
        self._context = zmq.Context()
        self._pull = self._context.socket(zmq.PULL)
        self._pull.rcvhwm = 0
        self._pull.bind(address.to_engine)
        self._push = self._context.socket(zmq.PUSH)
        self._push.sndhwm = 0
        self._push.connect(address.to_client)
        self._closing = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def recv(self, timeout_ms: int) -> list[ToEngine | Unreadable]:
        """All messages that are there, waiting at most ``timeout_ms`` for the first (0: not at all)."""
        messages: list[ToEngine | Unreadable] = []
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

    def start_pulse(self) -> None:
        """Tell the client once a second that this process lives, from a thread, until :meth:`close`.

        A step may take longer than a client should wait for news, and so may what holds the interpreter's lock: the
        thread tells one from the other.
        """
        self._pulse.start()

    def _beat(self) -> None:
        # A zmq socket belongs to one thread, so this one has its own.
        push = self._context.socket(zmq.PUSH)
        push.connect(self._address.to_client)
        while not self._closing.wait(PULSE_S):
            with suppress(zmq.Again):  # a client that has not read for long finds enough of them
                push.send(encode(Pulse()), zmq.NOBLOCK)
        push.close(linger=0)

    def close(self) -> None:
        """Close; what is queued still gets ``LINGER_MS`` to be delivered."""
        self._closing.set()
        if self._pulse.is_alive():
            self._pulse.join()
        self._pull.close(linger=0)
        self._push.close(linger=LINGER_MS)
        self._context.term()
