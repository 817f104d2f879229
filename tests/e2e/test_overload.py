"""A live server with a short queue: what does not fit gets 503 and may come again, what fits is served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import httpx
import openai
import pytest

from tests.e2e.conftest import World
from tests.server.test_live import send
from tests.support.live_server import LiveServer, wait_until
from tests.support.served import served

SAMPLING = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True}
BODY = {"text": "one two", "sampling_params": SAMPLING}
LONG = {"text": "x", "sampling_params": SAMPLING | {"max_new_tokens": 400, "n": 800}}


@pytest.fixture(scope="module")
def url(world: World) -> Iterator[str]:
    """One sequence runs, two wait."""
    with served(
        f"--model-path {world.model} --max-total-tokens 8192 --served-model-name base"
        f" --lora-paths a={world.adapters['qv']} --max-running-requests 1 --max-queued-requests 2"
    ) as url:
        yield url


def stats(url: str) -> dict[str, float]:
    return httpx.get(f"{url}/server_info", timeout=60).json()["internal_states"][0]


def test_a_crowd_is_served_or_sent_away(url: str) -> None:
    def post(_number: int) -> httpx.Response:
        return httpx.post(f"{url}/generate", json=BODY, timeout=60)

    alone = post(0).json()["output_ids"]
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(post, range(24)))
    counts = Counter(reply.status_code for reply in replies)
    assert counts.keys() == {200, 503}
    assert counts[200] >= 3
    for reply in replies:
        if reply.status_code == 200:
            assert reply.json()["output_ids"] == alone
        else:
            assert reply.headers["retry-after"] == "1"
            assert "the queue is full: 2 sequences wait" in reply.json()["error"]["message"]
    assert httpx.get(f"{url}/health", timeout=60).status_code == 200


def test_places_of_clients_that_leave_are_free_again(url: str) -> None:
    def status() -> int:
        return httpx.post(f"{url}/generate", json=BODY, timeout=60).status_code

    server = cast(LiveServer, SimpleNamespace(port=httpx.URL(url).port))
    for _ in range(3):  # nothing adds up
        # Nobody waits, so a call larger than the queue is taken. It would run for minutes.
        with send(server, LONG):
            wait_until(lambda: status() == 503)
        wait_until(lambda: status() == 200)
    wait_until(lambda: stats(url)["num_running"] == stats(url)["num_waiting"] == 0)


def test_the_openai_client_comes_again(url: str) -> None:
    def ask(client: openai.OpenAI, **fields: Any) -> openai.types.Completion:
        sampling = {"ignore_eos": True}
        return client.completions.create(
            model="base:a", prompt="x", max_tokens=100, extra_body=sampling, **fields
        )

    base_url = f"{url}/v1"
    impatient = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    patient = openai.OpenAI(base_url=base_url, api_key="none", max_retries=60)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, patient, n=16)
        wait_until(lambda: stats(url)["num_waiting"] > 2)
        with pytest.raises(openai.InternalServerError) as refused:
            ask(impatient)
        assert ask(patient).usage.completion_tokens == 100
        assert len(first.result().choices) == 16
    assert refused.value.status_code == 503
    assert refused.value.body["type"] == "server_error"
