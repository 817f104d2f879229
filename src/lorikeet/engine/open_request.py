"""A request between its submission and its terminal output, as the HTTP process sees it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from lorikeet.core.request import Request
from lorikeet.engine.completion import Completion
from lorikeet.engine.stream import CompletionStream
from lorikeet.errors import EngineFault
from lorikeet.metrics import RequestTimer


@dataclass(slots=True, eq=False)
class OpenRequest:
    """One request on its way.

    Attributes:
        stream: who follows it; None once nobody does.
        group: the id by which the caller knows this request and others of its call, if that is not its own.
        accepted: resolved by Accepted, or by a terminal output that refuses the request.
        released: set when the terminal output has arrived and the id is free again.
    """

    request: Request
    completion: Completion
    timer: RequestTimer
    index: int
    group: str
    stream: CompletionStream | None
    accepted: asyncio.Future[None]
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def fail(self, fault: EngineFault) -> None:
        """Tell whoever waits for it; nobody follows it any more."""
        if not self.accepted.done():
            self.accepted.set_exception(fault)
            # Somebody may have been cancelled while waiting for it; it is no error if nobody looks.
            self.accepted.exception()
        if self.stream is not None:
            self.stream.fail(fault)
            self.stream = None
