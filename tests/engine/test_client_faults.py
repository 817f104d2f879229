"""The client when something is wrong: an engine that is silent, messages that mean nothing, errors of its own."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from lorikeet.core.messages import Abort, Outputs, Ready, ToClient, ToEngine, Unreadable
from lorikeet.core.request import FinishReason, RequestOutput
from lorikeet.engine import client as client_module
from lorikeet.engine.client import EngineClient
from lorikeet.engine.completion import Completion
from lorikeet.engine.tokenizer import Tokenizer
from lorikeet.errors import EngineDeadError, EngineFault, UnavailableError
from tests.engine.test_client import finish, request, session, until
from tests.support.byte_tokenizer import save_byte_tokenizer
from tests.support.fake_engine import FakeProcess

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


async def test_a_silent_engine_is_given_up_when_somebody_waits(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TICK_S", 0.01)
    async with session(tokenizer, watchdog_timeout=0.2, hold_accept=True) as made:
        process = made.thread.process
        await asyncio.sleep(0.5)
        made.client.check_alive()  # nobody waits
        assert not process.was_killed
        call = asyncio.create_task(made.client.submit([request("r")]))
        load = asyncio.create_task(made.client.command("nothing answers this"))
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
        stream = await made.client.submit([request("r", max_new_tokens=200)])
        assert (await finish(stream))[0].snapshot().finish is not None
        assert not made.thread.process.was_killed


async def test_a_process_without_a_pulse_is_not_awake(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TICK_S", 0.01)
    monkeypatch.setattr(client_module, "SILENCE_S", 0.2)
    monkeypatch.setattr(client_module, "LEAST_SILENCE_S", 0.0)
    async with session(tokenizer, has_pulse=False) as made:
        made.client.check_awake()
        await asyncio.sleep(1)
        with pytest.raises(UnavailableError, match=r"no sign of life for 0\.2 s"):
            made.client.check_awake()
        await made.client.command("info")
        made.client.check_awake()  # it was heard again


@pytest.mark.parametrize("error", [TypeError("odd"), MemoryError(), UnicodeError("odd")], ids=str)
async def test_an_output_that_cannot_be_taken_in_ends_its_request(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    add = Completion.add

    def fail(self: Completion, output: Any) -> bool:
        if output.rid == "bad":
            raise error
        return add(self, output)

    monkeypatch.setattr(Completion, "add", fail)
    async with session(tokenizer, step_s=0.01) as made:
        bad = await made.client.submit([request("bad", max_new_tokens=400)])
        good = await made.client.submit([request("good", max_new_tokens=10)])
        with pytest.raises(EngineFault, match=type(error).__name__):
            await finish(bad)
        assert (await finish(good))[0].text == "ab" * 5
        await until(lambda: "bad" in made.engine.aborted)


async def test_a_listener_that_fails_ends_everything(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with session(tokenizer, step_s=0.05) as made:
        stream = await made.client.submit([request("r", max_new_tokens=100)])

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
    transport.queue.put_nowait(Ready({"vocab_size": 257, "context_length": 64}))
    await client.start()
    yield client, transport
    process.end(0)
    await client.close()
    process.close()


async def test_an_answer_that_cannot_be_read_is_a_fault_for_whom_it_was(
    tokenizer: Tokenizer,
) -> None:
    async with odd_client(tokenizer) as (client, transport):
        submits = [asyncio.create_task(client.submit([request(rid)])) for rid in "ab"]
        command = asyncio.create_task(client.command("load_adapter"))
        await asyncio.sleep(0)
        transport.queue.put_nowait(Unreadable("odd", rids=["a"], command=None))
        transport.queue.put_nowait(Unreadable("odd", rids=[], command=1))
        for task in (submits[0], command):
            with pytest.raises(EngineFault, match="cannot be read: odd"):
                await task
        assert Abort("a") in transport.sent
        client.check_alive()
        assert not submits[1].done()
        transport.queue.put_nowait(Unreadable("odd", rids=[], command=None))
        with pytest.raises(EngineDeadError, match="cannot be read: odd"):
            await submits[1]  # whose answer was it?


async def test_thousands_of_ends_leave_others_their_turn(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_OUTPUTS", 10)
    async with odd_client(tokenizer) as (client, transport):
        requests = [request(str(number)) for number in range(100)]
        call = asyncio.create_task(client.submit(requests))
        await asyncio.sleep(0)
        reason = FinishReason(kind="abort", message="all of them")
        ends = [RequestOutput(rid=r.rid, token_ids=[], finish=reason) for r in requests]
        transport.queue.put_nowait(Outputs(ends))
        seen = []
        while client.num_open:
            seen.append(client.num_open)
            await asyncio.sleep(0)
        assert max(a - b for a, b in itertools.pairwise(seen)) <= 10
        (await call).close()


async def test_aborting_all_is_one_message(tokenizer: Tokenizer) -> None:
    async with odd_client(tokenizer) as (client, transport):
        call = asyncio.create_task(client.submit([request(str(number)) for number in range(5)]))
        await asyncio.sleep(0)
        assert client.abort() == 5
        assert [m for m in transport.sent if isinstance(m, Abort)] == [Abort(None)]
        call.cancel()


async def test_a_question_has_a_deadline(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "QUERY_TIMEOUT_S", 0.05)
    async with session(tokenizer, is_stuck=True) as made:
        for name in client_module.QUERIES:
            with pytest.raises(UnavailableError, match=r"not answered within 0\.05 seconds"):
                await made.client.command(name)
