"""Calls and their completions from submission to the end, and the stream in which one consumer follows them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

from lorikeet.core.request import FinishReason
from lorikeet.errors import EngineFault, UserError
from lorikeet.metrics import RequestTimer
from lorikeet.text.completion import Completion


class CompletionStream:
    """The completions of one call, followed together: ``async for index, completion in stream``.

    Args:
        size: how many there are.
        abandon: called when nobody follows any more.

    Yields a completion whenever it has grown, and a last time when it has finished. Updates that come while the
    consumer is busy with another one are merged: completions are cumulative, so a slow consumer sees fewer, larger
    steps, and nothing queues up. Ends when every completion has finished.

    Raises (while iterating):
        EngineFault: the engine died, or the server ends; updates that came before have been yielded.
    """

    def __init__(self, size: int, abandon: Callable[[], None]) -> None:
        self._abandon = abandon
        self._num_unfinished = size
        self._changed: dict[int, Completion] = {}
        self._wake = asyncio.Event()
        self._fault: EngineFault | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Completion]:
        while not self._changed:
            if self._num_unfinished == 0:
                raise StopAsyncIteration
            if self._fault is not None:
                raise self._fault
            self._wake.clear()
            await self._wake.wait()
        index = next(iter(self._changed))
        completion = self._changed.pop(index)
        if completion.finish is not None:
            self._num_unfinished -= 1
        return index, completion

    async def finished(self, check: Callable[[FinishReason], None]) -> list[Completion]:
        """The completions in their order, once all have finished; each is checked when it has, so that one may raise."""
        found: dict[int, Completion] = {}
        async for index, completion in self:
            if completion.finish is not None:
                check(completion.finish)
                found[index] = completion
        return [found[index] for index in sorted(found)]

    def close(self) -> None:
        """Nobody follows any more: what still runs is aborted. Harmless after the end."""
        self._abandon()

    def update(self, index: int, completion: Completion) -> None:
        self._changed[index] = completion
        self._wake.set()

    def fail(self, fault: EngineFault) -> None:
        self._fault = fault
        self._wake.set()


@dataclass(slots=True, eq=False)
class OpenCall:
    """The completions of one call, which begin together and are followed together.

    Attributes:
        stream: who follows them; None once nobody does.
        labels: the caller's names for them; claimed for as long as somebody follows.
        accepted: resolved when the engine has accepted every one, or refused one.
        num_unaccepted, num_running: completions that the engine has not accepted, and that have not finished.
        entries: one per completion, in the order of the reply; none once nobody follows.
    """

    stream: CompletionStream | None
    labels: Mapping[str, list[int]]
    accepted: asyncio.Future[None]
    num_unaccepted: int
    num_running: int
    entries: list[OpenRequest] = field(default_factory=list["OpenRequest"])

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
