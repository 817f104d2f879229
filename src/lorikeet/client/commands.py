"""Commands on their way to the engine, each waiting for its reply."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from lorikeet.client.transport import ClientTransport
from lorikeet.core.commands import AnyCommand, Command, R
from lorikeet.core.messages import Ask, Cancel, Reply
from lorikeet.errors import EngineFault, UnavailableError


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
