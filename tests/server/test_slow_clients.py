"""Hundreds of clients that do not read their streams: nobody else waits for them, and they hold little memory."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest

from tests.server.test_live import read_all, send
from tests.support.live_server import LiveServer, wait_until

NUM_SLOW = 500
# uvicorn asks for no more of a stream above this, so that it holds as much and one event at most.
HIGH_WATER = 64 * 1024


@pytest.fixture(autouse=True)
def enough_files() -> Iterator[None]:
    """Each connection has two ends in this process."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(4 * NUM_SLOW, before[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], wanted), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_five_hundred_streams_that_nobody_reads(make_live: Callable[..., LiveServer]) -> None:
    server = make_live(step_s=0.01, send_buffer=4096)
    # Events become long soon: the socket's own buffers do not hold a stream.
    asked = {"sampling_params": {"max_new_tokens": 150}, "return_logprob": True}
    asked |= {"top_logprobs_num": 20, "stream": True}
    with ExitStack() as stack:
        slow = [
            stack.enter_context(
                send(
                    server,
                    {"text": f"{number:03}"} | asked,
                    receive_buffer=4096,
                )
            )
            for number in range(NUM_SLOW)
        ]
        wait_until(lambda: len(server.engine.seen) == NUM_SLOW)
        body = {"text": "x", "sampling_params": {"max_new_tokens": 100}, "stream": True}
        with httpx.stream("POST", server.url + "/generate", json=body, timeout=60) as reply:
            events = [line for line in reply.iter_lines() if line.startswith("data: {")]
        assert json.loads(events[-1].removeprefix("data: "))["text"] == "x" * 100
        assert len(events) > 20, "it was told as the tokens came"
        # The engine is done with the slow ones, too, and so is its client; only their sockets are not.
        wait_until(lambda: server.engine.num_running == 0 and server.client.num_open == 0)
        assert server.drain.num_running == NUM_SLOW
        held = server.num_buffered_bytes()
        assert len(held) >= NUM_SLOW
        text = read_all(slow[7])
        assert text.count("data: [DONE]") == 1
        last = [part for part in text.split("data: ") if part.startswith("{")][-1]
        assert max(held) <= HIGH_WATER + len(last)
        assert json.loads(last[: last.rindex("}") + 1])["text"] == "007" * 50, "nothing was lost"
