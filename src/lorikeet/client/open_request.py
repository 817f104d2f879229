"""Calls and their completions between submission and terminal output, as the HTTP process sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from lorikeet.client.stream import CompletionStream
from lorikeet.errors import EngineFault, UserError
from lorikeet.metrics import RequestTimer
from lorikeet.text.completion import Completion


@dataclass(slots=True, eq=False)
class OpenCall:
    """The completions of one call, which begin together and are followed together.

    Attributes:
        stream: who follows them; None once nobody does.
        labels: the caller's names for them; claimed for as long as somebody follows.
        accepted: resolved when the engine has accepted every one, or refused one.
        entries: one per completion, in the order of the reply; none once nobody follows.
        num_running: of those, how many have not finished.
    """

    stream: CompletionStream | None
    labels: Mapping[str, list[int]]
    accepted: asyncio.Future[None]
    entries: list[OpenRequest] = field(default_factory=list["OpenRequest"])
    num_unaccepted: int = 0
    num_running: int = 0

    def add(self, entry: OpenRequest) -> None:
        self.entries.append(entry)
        self.num_unaccepted += 1
        self.num_running += 1

    def accept(self, entry: OpenRequest) -> None:
        """The engine has taken a completion, or has ended it in a way that is no error."""
        if not entry.is_accepted:
            entry.is_accepted = True
            self.num_unaccepted -= 1
            if not self.num_unaccepted and not self.accepted.done():
                self.accepted.set_result(None)

    def finish(self, entry: OpenRequest) -> None:
        """The end of a completion was told."""
        if not entry.is_over:
            entry.is_over = True
            self.num_running -= 1

    def refuse(self, error: UserError | EngineFault) -> None:
        """One completion will not run, so the call does not begin."""
        if not self.accepted.done():
            self.accepted.set_exception(error)
            # Somebody may have been cancelled while waiting for it; it is no error if nobody looks.
            self.accepted.exception()

    def fail(self, fault: EngineFault) -> None:
        """Tell whoever waits for it; nobody follows it any more."""
        self.refuse(fault)
        if self.stream is not None:
            self.stream.fail(fault)
        self.end()

    def end(self) -> None:
        """Nobody follows any more. What refers to each other is let go, so that memory is free at once."""
        self.stream = None
        self.entries.clear()


@dataclass(slots=True, eq=False)
class OpenRequest:
    """One completion on its way.

    Attributes:
        number: its id, by which the engine knows it.
        index: its place in the reply of its call.
        is_accepted: Accepted has come, or a terminal output.
        is_over: its end was told to whoever follows; the engine may still go on with it.
    """

    call: OpenCall
    number: int
    index: int
    completion: Completion
    timer: RequestTimer
    is_accepted: bool = False
    is_over: bool = False

    @property
    def is_followed(self) -> bool:
        return self.call.stream is not None and self.completion.finish is None
