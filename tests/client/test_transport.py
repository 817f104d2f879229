"""Both ends of the transport in one process, the engine's in a thread where it would block."""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from lorikeet.client import transport
from lorikeet.client.transport import ClientTransport, EngineAddress, EngineEndpoint
from lorikeet.core.commands import FlushCache, UnloadAdapter
from lorikeet.core.messages import (
    Abort,
    Accepted,
    Ask,
    Outputs,
    Pulse,
    Shutdown,
    Submit,
    Unreadable,
)
from lorikeet.core.request import FinishReason, Request, RequestOutput, SamplingParams


@pytest.fixture
def address() -> Iterator[EngineAddress]:
    address = EngineAddress.create()
    yield address
    address.remove()


def test_messages_arrive_whole_and_in_order_in_both_directions(address: EngineAddress) -> None:
    request = Request(prompt_token_ids=[1, 2], sampling=SamplingParams(stop=("a",)))
    to_engine = [
        Submit.of(3, [request]),
        Abort([3]),
        Ask(7, UnloadAdapter("x", 1.5)),
        Shutdown(1.5),
    ]
    finish = FinishReason(kind="stop", matched="a")
    to_client = [Accepted([3]), Outputs([RequestOutput(id=3, token_ids=[3], finish=finish)])]

    async def main() -> None:
        client, engine = ClientTransport(address), EngineEndpoint(address)
        try:
            for message in to_engine:
                client.send(message)
            received = []
            while len(received) < len(to_engine):
                received += engine.recv(5000)
            assert received == to_engine
            for message in to_client:
                engine.send(message)
            back = []
            while len(back) < len(to_client):
                back += await asyncio.wait_for(client.recv(), 5)
            assert back == to_client
        finally:
            engine.close()
            client.close()

    asyncio.run(main())


def test_messages_wait_for_a_side_that_comes_up_later(address: EngineAddress) -> None:
    async def main() -> None:
        client = ClientTransport(address)
        for number in range(3000):  # more than the default limit of a zmq queue
            client.send(Ask(number, FlushCache()))
        engine = EngineEndpoint(address)
        received = []
        while len(received) < 3000:
            batch = engine.recv(5000)
            assert batch, "messages were lost"
            received += batch
        assert received == [Ask(number, FlushCache()) for number in range(3000)]
        engine.close()
        client.close()

    asyncio.run(main())


def test_the_engine_never_blocks_on_a_client_that_does_not_read(address: EngineAddress) -> None:
    async def main() -> None:
        client, engine = ClientTransport(address), EngineEndpoint(address)
        for number in range(5000):
            engine.send(Accepted([number]))
        batch = await asyncio.wait_for(client.recv(), 5)
        assert 1 <= len(batch) <= 64, "a burst is handed on in parts"
        total = batch
        while len(total) < 5000:
            total += await asyncio.wait_for(client.recv(), 5)
        assert total == [Accepted([n]) for n in range(5000)]
        engine.close()
        client.close()

    asyncio.run(main())


def test_recv_waits_no_longer_than_it_is_told(address: EngineAddress) -> None:
    engine = EngineEndpoint(address)
    begun = time.monotonic()
    assert engine.recv(0) == []
    assert time.monotonic() - begun < 0.5
    assert engine.recv(30) == []
    assert time.monotonic() - begun >= 0.025
    engine.close()


def test_other_bytes_are_handed_on_as_such_by_both_ends(address: EngineAddress) -> None:
    async def main() -> None:
        client, engine = ClientTransport(address), EngineEndpoint(address)
        context = zmq.Context()
        for where in (address.to_engine, address.to_client):
            socket = context.socket(zmq.PUSH)
            socket.connect(where)
            socket.send(b"\x01")
            socket.close(linger=2000)
        for received in (engine.recv(5000), await asyncio.wait_for(client.recv(), 5)):
            assert len(received) == 1
            assert isinstance(received[0], Unreadable)
        context.term()
        engine.close()
        client.close()

    asyncio.run(main())


def test_an_engine_that_is_busy_still_says_that_it_lives(
    address: EngineAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "PULSE_S", 0.01)

    async def main() -> None:
        client, engine = ClientTransport(address), EngineEndpoint(address)
        engine.start_pulse()
        for _ in range(3):  # and nobody calls anything of the engine
            assert Pulse() in await asyncio.wait_for(client.recv(), 5)
        engine.close()
        client.close()

    asyncio.run(main())


def test_last_words_survive_the_end_of_the_engine(address: EngineAddress) -> None:
    async def main() -> None:
        client, engine = ClientTransport(address), EngineEndpoint(address)
        engine.send(Accepted([7]))
        engine.close()
        assert await asyncio.wait_for(client.recv(), 5) == [Accepted([7])]
        client.close()

    asyncio.run(main())


def test_the_directory_is_private_short_and_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    address = EngineAddress.create()
    assert len(address.to_client) < 107
    assert stat.S_IMODE(os.stat(address.directory).st_mode) == 0o700
    assert list(deep.iterdir()) == []
    address.remove()
    assert not Path(address.directory).exists()
    address.remove()  # harmless
