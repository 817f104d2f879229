"""What clients see of a queue that is full."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Api, MakeApi
from tests.server.test_drain import CHAT, COMPLETION, GENERATE
from tests.server.test_native import message

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", GENERATE),
        ("/generate", GENERATE | {"text": ["a", "b"]}),
        ("/v1/completions", COMPLETION),
        ("/v1/completions", COMPLETION | {"n": 3, "model": "sql"}),
        ("/v1/chat/completions", CHAT),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_real_503_also_for_a_stream(
    make_api: MakeApi, path: str, body: dict[str, Any], stream: bool
) -> None:
    api: Api = await make_api(queue_is_full=True)
    reply = await api.http.post(path, json=body | {"stream": stream})
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"
    assert message(reply) == "the queue is full"
    assert reply.json()["error"]["type"] == "server_error"
    assert api.client.num_open == 0
    api.knobs.queue_is_full = False
    assert (await api.http.post(path, json=body)).status_code == 200


async def test_a_full_queue_is_no_illness(make_api: MakeApi) -> None:
    api: Api = await make_api(queue_is_full=True)
    assert (await api.http.get("/health_generate")).status_code == 200
