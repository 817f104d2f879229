"""A real server whose every process is signalled at once, as by systemd."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from subprocess import Popen

import httpx
import pytest

from lorikeet.utils import launch_server_cmd, terminate_process, wait_for_server
from tests.e2e.conftest import World

NEW_TOKENS = 300


@pytest.fixture
def server(world: World) -> Iterator[tuple[Popen[str], str]]:
    """Its process, which leads a group, and its URL."""
    process, port = launch_server_cmd(
        f"python -m lorikeet.launch_server --model-path {world.model} --max-total-tokens 4096"
    )
    url = f"http://127.0.0.1:{port}"
    wait_for_server(url, timeout=120, process=process)
    yield process, url
    terminate_process(process)


def test_running_requests_finish(server: tuple[Popen[str], str]) -> None:
    process, url = server
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    body = {"input_ids": [1, 2, 3], "sampling_params": sampling, "stream": True}
    events: list[str] = []
    with httpx.stream("POST", f"{url}/generate", json=body, timeout=60) as reply:
        for line in reply.iter_lines():
            if line and not events:
                os.killpg(process.pid, signal.SIGTERM)
            events += [line] if line else []
    assert events[-1] == "data: [DONE]"
    first, last = (json.loads(event.removeprefix("data: ")) for event in (events[0], events[-2]))
    assert first["meta_info"]["completion_tokens"] < NEW_TOKENS, "it ran when the signal came"
    assert last["meta_info"]["completion_tokens"] == NEW_TOKENS
    assert last["meta_info"]["finish_reason"]["type"] == "length"
    assert process.wait(60) == 0
