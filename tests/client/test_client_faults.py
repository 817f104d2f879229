"""The client when something is wrong: an engine that is silent, messages that mean nothing, errors of its own."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from lorikeet.client import client as client_module
from lorikeet.client.client import EngineClient
from lorikeet.core.commands import FlushCache, ListAdapters, LoadAdapter
from lorikeet.core.failure import Failure
from lorikeet.core.messages import Abort, Outputs, Ready, ToClient, ToEngine, Unreadable
from lorikeet.core.request import FinishReason, RequestOutput
from lorikeet.errors import EngineDeadError, EngineFault, UnavailableError
from lorikeet.text.completion import Completion
from lorikeet.text.tokenizer import Tokenizer
from tests.client.test_client import batch, finish, group, one, request, session, until
from tests.support.engine_info import engine_info
from tests.support.fake_engine import FakeProcess

pytestmark = pytest.mark.anyio


async def test_a_silent_engine_is_given_up_when_somebody_waits(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TICK_S", 0.01)
    async with session(tokenizer, watchdog_timeout=0.2, hold_accept=True, load_s=300) as made:
        process = made.thread.process
        await asyncio.sleep(0.5)
        made.client.check_alive()  # nobody waits
        assert not process.was_killed
        call = asyncio.create_task(made.client.submit(one("r")))
        load = asyncio.create_task(made.client.command(LoadAdapter("slow", "/slow")))
        made.knobs.is_stuck = True
        await until(lambda: process.was_killed)
        for task in (call, load):
            with pytest.raises(EngineDeadError, match=r"has said nothing for 0\.2 s"):
                await task
        assert "said nothing" in str(await made.client.died())


async def test_an_engine_that_answers_is_never_given_up(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TICK_S", 0.01)
    async with session(tokenizer, watchdog_timeout=0.5, step_s=0.01) as made:
        stream = await made.client.submit(one("r", max_new_tokens=200))
        assert (await finish(stream))[0].snapshot().finish is not None
        assert not made.thread.process.was_killed


def is_awake(client: EngineClient) -> bool:
    try:
        client.check_awake()
    except UnavailableError:
        return False
    return True


async def test_a_process_without_a_pulse_is_not_awake(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TICK_S", 0.01)
    monkeypatch.setattr(client_module, "SILENCE_S", 0.2)
    monkeypatch.setattr(client_module, "LEAST_SILENCE_S", 0.0)
    async with session(tokenizer, has_pulse=False) as made:
        made.client.check_awake()
        # Only so much of a late look counts, so a busy machine takes longer than the clock says.
        await until(lambda: not is_awake(made.client))
        with pytest.raises(UnavailableError, match=r"no sign of life for 0\.2 s"):
            made.client.check_awake()
        await made.client.command(FlushCache())
        made.client.check_awake()  # it was heard again


@pytest.mark.parametrize("error", [TypeError("odd"), MemoryError(), UnicodeError("odd")], ids=str)
async def test_an_output_that_cannot_be_taken_in_ends_its_request(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    add = Completion.add

    def fail(self: Completion, output: Any) -> bool:
        if self.rid == "bad":
            raise error
        return add(self, output)

    monkeypatch.setattr(Completion, "add", fail)
    async with session(tokenizer, step_s=0.01) as made:
        bad = await made.client.submit(one("bad", max_new_tokens=400))
        good = await made.client.submit(one("good", max_new_tokens=10))
        failed = (await finish(bad))[0].finish
        assert failed is not None
        assert isinstance(failed.error(), EngineFault)
        assert type(error).__name__ in (failed.message or "")
        assert (await finish(good))[0].text == "ab" * 5
        await until(lambda: 0 in made.engine.aborted)


async def test_what_fails_in_a_call_leaves_the_rest_of_it(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Completion.add

    def fail(self: Completion, output: Any) -> bool:
        if self.rid in ("r_0", "r_2"):
            raise TypeError("odd")
        return add(self, output)

    monkeypatch.setattr(Completion, "add", fail)
    async with session(tokenizer, step_s=0.01) as made:
        stream = await made.client.submit(group("r", 4, max_new_tokens=10))
        async with asyncio.timeout(30):
            ends = await finish(stream)
        kinds = [end.kind for place in range(4) if (end := ends[place].finish) is not None]
        assert kinds == ["abort", "length", "abort", "length"]
        assert ends[1].text == ends[3].text == "ab" * 5
        await until(lambda: made.client.num_open == 0)
        assert sorted(made.engine.aborted) == [0, 2]


async def test_a_listener_that_fails_ends_everything(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with session(tokenizer, step_s=0.05) as made:
        stream = await made.client.submit(one("r", max_new_tokens=100))

        def fail(*_: object) -> None:
            raise TypeError("a metric that is none")

        monkeypatch.setattr(made.client._engine_metrics, "update", fail)
        with pytest.raises(EngineDeadError, match="TypeError: a metric that is none"):
            await finish(stream)
        await made.client.died()
        assert "the server's side of the engine failed" in caplog.text


class OddTransport:
    """Hands on what a test puts in."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[ToClient | Unreadable] = asyncio.Queue()
        self.sent: list[ToEngine] = []

    async def recv(self) -> list[ToClient | Unreadable]:
        return [await self.queue.get()]

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)

    def close(self) -> None:
        pass


@asynccontextmanager
async def odd_client(tokenizer: Tokenizer) -> AsyncIterator[tuple[EngineClient, OddTransport]]:
    process, transport = FakeProcess(), OddTransport()
    client = EngineClient(
        transport=transport,  # pyright: ignore[reportArgumentType]
        process=process,
        tokenizer=tokenizer,
        registry=CollectorRegistry(),
        model_name="m",
    )
    transport.queue.put_nowait(Ready(engine_info()))
    await client.start()
    yield client, transport
    process.end(0)
    await client.close()
    process.close()


async def test_an_answer_that_cannot_be_read_is_a_fault_for_whom_it_was(
    tokenizer: Tokenizer,
) -> None:
    async with odd_client(tokenizer) as (client, transport):
        submits = [asyncio.create_task(client.submit(one(rid))) for rid in "ab"]
        command = asyncio.create_task(client.command(LoadAdapter("x", "/x")))
        await asyncio.sleep(0)
        transport.queue.put_nowait(Unreadable("odd", ids=[0], command=None))
        transport.queue.put_nowait(Unreadable("odd", ids=[], command=1))
        for task in (submits[0], command):
            with pytest.raises(EngineFault, match="cannot be read: odd"):
                await task
        assert Abort([0]) in transport.sent
        client.check_alive()
        assert not submits[1].done()
        transport.queue.put_nowait(Unreadable("odd", ids=[], command=None))
        with pytest.raises(EngineDeadError, match="cannot be read: odd"):
            await submits[1]  # whose answer was it?


async def test_thousands_of_ends_leave_others_their_turn(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TURN_S", -1.0)  # every turn has been long enough
    async with odd_client(tokenizer) as (client, transport):
        call = asyncio.create_task(client.submit(group("r", 100)))
        await asyncio.sleep(0)
        reason = FinishReason(kind="abort", failure=Failure("aborted", "all of them"))
        ends = [RequestOutput(id=number, token_ids=[], finish=reason) for number in range(100)]
        transport.queue.put_nowait(Outputs(ends))
        seen = []
        while client.num_open:
            seen.append(client.num_open)
            await asyncio.sleep(0)
        assert max(a - b for a, b in itertools.pairwise(seen)) == 1
        (await call).close()


async def test_aborting_all_is_one_message(tokenizer: Tokenizer) -> None:
    async with odd_client(tokenizer) as (client, transport):
        calls = {str(number): request() for number in range(5)}
        call = asyncio.create_task(client.submit(batch(**calls)))
        await asyncio.sleep(0)
        assert client.abort() == 5
        assert [m for m in transport.sent if isinstance(m, Abort)] == [Abort(None)]
        call.cancel()


async def test_a_question_has_a_deadline(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "QUERY_TIMEOUT_S", 0.05)
    async with session(tokenizer, is_stuck=True) as made:
        for command in (FlushCache(), ListAdapters()):
            with pytest.raises(UnavailableError, match=r"not answered within 0\.05 seconds"):
                await made.client.command(command)
