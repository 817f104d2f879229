"""How a reading of an adapter is ended: by its deadline, or because nobody wants it any more."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from lorikeet.adapters.sources.transfer import Reach, Transfer, TransferEndedError

PATIENCE_S = 20


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(PATIENCE_S)
    loop.close()


@pytest.fixture
def ended():
    return threading.Event()


def forever(ended):
    async def coroutine():
        try:
            await asyncio.sleep(1000)
        finally:
            ended.set()

    return coroutine()


def test_a_result_and_an_error_come_through(loop):
    async def good():
        return 3

    async def bad():
        raise ConnectionResetError("cut")

    transfer = Transfer(seconds=100)
    assert transfer.wait(loop, good()) == 3
    with pytest.raises(ConnectionResetError):
        transfer.wait(loop, bad())


def test_the_deadline_ends_what_is_waited_for(loop, ended):
    transfer = Transfer(seconds=0.05)
    with pytest.raises(TransferEndedError, match=r"0\.05 s \(--lora-download-timeout\)"):
        transfer.wait(loop, forever(ended))
    assert ended.wait(PATIENCE_S)
    with pytest.raises(TransferEndedError):
        transfer.check()


def test_whoever_cancels_ends_what_is_waited_for(loop, ended):
    transfer = Transfer()
    threading.Timer(0.05, transfer.cancel).start()
    with pytest.raises(TransferEndedError, match="cancelled"):
        transfer.wait(loop, forever(ended))
    assert ended.wait(PATIENCE_S)
    with pytest.raises(TransferEndedError):
        transfer.sleep(1000)


def test_a_pause_ends_with_the_deadline():
    with pytest.raises(TransferEndedError):
        Transfer(seconds=0.01).sleep(1000)
    Transfer().sleep(0.0)


@pytest.mark.parametrize("seconds", [None, 0.05])
def test_a_job_that_nothing_can_stop_is_left_behind(seconds):
    gate = threading.Event()
    transfer = Transfer(seconds=seconds)
    if seconds is None:
        threading.Timer(0.05, transfer.cancel).start()
    with pytest.raises(TransferEndedError):
        transfer.run(lambda: gate.wait(PATIENCE_S))
    gate.set()


def test_a_job_gives_its_result_or_its_error():
    assert Transfer(seconds=100).run(lambda: 3) == 3
    assert Transfer(Reach.CACHE).run(threading.get_ident) == threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        Transfer(seconds=100).run(lambda: 1 // 0)


def test_a_request_that_times_out_by_itself_is_not_the_end(loop):
    async def slow():
        raise TimeoutError("no answer")

    transfer = Transfer(seconds=100)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer"):
        transfer.wait(loop, slow())
    assert time.monotonic() - began < 100
