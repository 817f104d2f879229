"""Commands and their replies over a transport that only remembers."""

from __future__ import annotations

import asyncio

import pytest

from lorikeet.client.transport import ClientTransport, Commands
from lorikeet.core.commands import (
    Command,
    FlushCache,
    ListAdapters,
    LoadAdapter,
    LoadOutcome,
    R,
    UnloadAdapter,
)
from lorikeet.core.failure import Failure, FailureKind
from lorikeet.core.messages import Ask, Cancel, Reply, ToEngine
from lorikeet.errors import EngineDeadError, EngineFault, RequestError

pytestmark = pytest.mark.anyio


class Memory(ClientTransport):
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[ToEngine] = []

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)


LOAD = LoadAdapter("x", "/x")
LOADED = LoadOutcome("x", "/x", 1, 0.5)


async def begin(commands: Commands, command: Command[R]) -> asyncio.Task[R]:
    task = asyncio.create_task(commands.run(command))
    await asyncio.sleep(0)
    return task


async def test_each_reply_finds_its_command() -> None:
    transport = Memory()
    commands = Commands(transport)
    first = await begin(commands, FlushCache())
    second = await begin(commands, LOAD)
    assert transport.sent == [Ask(1, FlushCache()), Ask(2, LOAD)]
    commands.reply(Reply(2, LOADED))
    commands.reply(Reply(1, True))
    assert (await first, await second) == (True, LOADED)
    assert commands.num_waiting == 0


@pytest.mark.parametrize("kind", ["refused", "not_found"])
async def test_a_refusal_stays_what_it_is(kind: FailureKind) -> None:
    commands = Commands(Memory())
    task = await begin(commands, UnloadAdapter("x"))
    failure = Failure(kind, "no", param="lora_name", code="odd")
    commands.reply(Reply(1, failure=failure))
    with pytest.raises(RequestError, match="no") as caught:
        await task
    assert Failure.of(caught.value) == failure


async def test_a_fault_is_a_fault() -> None:
    commands = Commands(Memory())
    task = await begin(commands, UnloadAdapter("x"))
    commands.reply(Reply(1, failure=Failure("failed", "broken")))
    with pytest.raises(EngineFault, match="broken"):
        await task


async def test_who_goes_away_takes_the_command_along() -> None:
    transport = Memory()
    commands = Commands(transport)
    task = await begin(commands, LOAD)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert transport.sent[1:] == [Cancel(1)]
    commands.reply(Reply(1, failure=Failure("aborted", "cancelled by the client")))
    assert commands.num_waiting == 0
    again = await begin(commands, LOAD)
    assert transport.sent[2:] == [Ask(2, LOAD)]
    commands.reply(Reply(2, LOADED))
    assert await again == LOADED


async def test_a_dead_engine_answers_all_and_is_told_nothing() -> None:
    transport = Memory()
    commands = Commands(transport)
    tasks = [await begin(commands, ListAdapters()) for _ in range(2)]
    tasks[0].cancel()
    commands.fail(EngineDeadError("gone"))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert isinstance(results[1], EngineDeadError)
    assert transport.sent == [Ask(1, ListAdapters()), Ask(2, ListAdapters())]
