"""Commands and their replies over a transport that only remembers."""

from __future__ import annotations

import asyncio

import pytest

from lorikeet.client.commands import Commands
from lorikeet.client.transport import ClientTransport
from lorikeet.core.messages import Command, Reply, ToEngine
from lorikeet.errors import EngineDeadError, EngineFault, RequestError

pytestmark = pytest.mark.anyio


class Memory(ClientTransport):
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[ToEngine] = []

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)


async def begin(commands: Commands, name: str, /, **args: object) -> asyncio.Task[object]:
    task = asyncio.create_task(commands.run(name, args))
    await asyncio.sleep(0)
    return task


async def test_each_reply_finds_its_command() -> None:
    transport = Memory()
    commands = Commands(transport)
    first = await begin(commands, "adapters")
    second = await begin(commands, "load_adapter", name="x")
    assert transport.sent == [Command(1, "adapters"), Command(2, "load_adapter", {"name": "x"})]
    commands.reply(Reply(2, "two"))
    commands.reply(Reply(1, "one"))
    assert [await first, await second] == ["one", "two"]
    assert commands.num_waiting == 0


@pytest.mark.parametrize("status", [400, 404])
async def test_a_refusal_keeps_its_status(status: int) -> None:
    commands = Commands(Memory())
    task = await begin(commands, "unload_adapter")
    commands.reply(Reply(1, error="no", status_code=status))
    with pytest.raises(RequestError, match="no") as caught:
        await task
    assert caught.value.status_code == status


async def test_a_fault_is_a_fault() -> None:
    commands = Commands(Memory())
    task = await begin(commands, "unload_adapter")
    commands.reply(Reply(1, error="broken", status_code=500))
    with pytest.raises(EngineFault, match="broken"):
        await task


async def test_who_goes_away_takes_the_command_along() -> None:
    transport = Memory()
    commands = Commands(transport)
    task = await begin(commands, "load_adapter")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert transport.sent[1:] == [Command(2, "cancel", {"id": 1})]
    commands.reply(Reply(1, error="cancelled by the client"))
    commands.reply(Reply(2, {"cancelled": True}))
    assert commands.num_waiting == 0
    again = await begin(commands, "load_adapter")
    assert transport.sent[2:] == [Command(3, "load_adapter")]
    commands.reply(Reply(3, "loaded"))
    assert await again == "loaded"


async def test_a_dead_engine_answers_all_and_is_told_nothing() -> None:
    transport = Memory()
    commands = Commands(transport)
    tasks = [await begin(commands, "adapters") for _ in range(2)]
    tasks[0].cancel()
    commands.fail(EngineDeadError("gone"))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert isinstance(results[1], EngineDeadError)
    assert [message for message in transport.sent if message != Command(1, "adapters")] == [
        Command(2, "adapters")
    ]
