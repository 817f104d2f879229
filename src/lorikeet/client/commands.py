"""Commands on their way to the engine, each waiting for its reply."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from lorikeet.client.stream import finish_error
from lorikeet.client.transport import ClientTransport
from lorikeet.core.messages import Command, Reply
from lorikeet.core.request import FinishReason
from lorikeet.errors import EngineFault, UnavailableError


class Commands:
    """The commands of one client, for one asyncio loop.

    Args:
        transport: sends them; the caller hands the replies to :meth:`reply`.
    """

    def __init__(self, transport: ClientTransport) -> None:
        self._transport = transport
        self._waiting: dict[int, asyncio.Future[object]] = {}
        self._num = 0
        self._is_dead = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def run(
        self, name: str, args: Mapping[str, object], *, timeout: float | None = None
    ) -> Any:
        """Send a command and wait for its result, at most ``timeout`` seconds.

        If the caller is cancelled, the engine is told; it drops what it can still undo (a load that is not complete).

        Raises:
            UserError, EngineFault: the answer was an error, by its status.
            EngineFault: it was given up meanwhile (:meth:`fail`).
            UnavailableError: there was no answer in time.
        """
        number = self._next()
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._transport.send(Command(number, name, dict(args)))
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise UnavailableError(
                f"the engine has not answered within {timeout:g} seconds; try again later"
            ) from None
        except asyncio.CancelledError:
            if not self._is_dead:
                # Nobody waits for the answer to this one.
                self._transport.send(Command(self._next(), "cancel", {"id": number}))
            raise
        finally:
            del self._waiting[number]

    def reply(self, reply: Reply) -> None:
        """An answer has arrived; that of a command whose caller has gone is dropped."""
        future = self._waiting.get(reply.id)
        if future is None or future.done():
            return
        if reply.error is None:
            future.set_result(reply.result)
            return
        finish = FinishReason(kind="abort", message=reply.error, status_code=reply.status_code)
        future.set_exception(finish_error(finish) or EngineFault(reply.error))

    def fail(self, fault: EngineFault) -> None:
        """No answer will come: the engine is lost, or told to end."""
        self._is_dead = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(fault)

    def _next(self) -> int:
        self._num += 1
        return self._num
