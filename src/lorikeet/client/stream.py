"""The completions of one call as they grow, for one consumer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

from lorikeet.errors import EngineFault
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

    def close(self) -> None:
        """Nobody follows any more: what still runs is aborted. Harmless after the end."""
        self._abandon()

    def update(self, index: int, completion: Completion) -> None:
        self._changed[index] = completion
        self._wake.set()

    def fail(self, fault: EngineFault) -> None:
        self._fault = fault
        self._wake.set()
