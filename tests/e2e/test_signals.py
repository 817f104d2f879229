"""A real server whose every process is signalled at once, as by systemd."""

from __future__ import annotations

import json
import os
import signal

import httpx

from tests.e2e.conftest import World
from tests.support.served import served_process

NEW_TOKENS = 300


def test_running_requests_finish(world: World) -> None:
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    body = {"input_ids": [1, 2, 3], "sampling_params": sampling, "stream": True}
    events: list[str] = []
    with (
        served_process(f"--model-path {world.model} --max-total-tokens 4096") as (process, url),
        httpx.stream("POST", f"{url}/generate", json=body, timeout=60) as reply,
    ):
        for line in reply.iter_lines():
            if line and not events:
                os.killpg(process.pid, signal.SIGTERM)
            events += [line] if line else []
        assert process.wait(60) == 0
    assert events[-1] == "data: [DONE]"
    first, last = (json.loads(event.removeprefix("data: ")) for event in (events[0], events[-2]))
    assert first["meta_info"]["completion_tokens"] < NEW_TOKENS, "it ran when the signal came"
    assert last["meta_info"]["completion_tokens"] == NEW_TOKENS
    assert last["meta_info"]["finish_reason"]["type"] == "length"
