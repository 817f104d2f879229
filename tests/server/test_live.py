"""What needs real sockets: clients that leave, clients that do not read."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from lorikeet.config import ServerConfig
from tests.support.live_server import LiveServer, wait_until

MakeLive = Callable[..., LiveServer]


def send(
    server: LiveServer, body: dict[str, Any], *, receive_buffer: int = 0, path: str = "/generate"
) -> socket.socket:
    """Post a body by hand and leave the answer in the socket."""
    connection = socket.socket()
    connection.settimeout(60)
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", server.port))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(data)}\r\n"
    connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + data)
    return connection


def read_all(connection: socket.socket) -> str:
    parts: list[bytes] = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts).decode()


LONG = {"max_new_tokens": 400}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_completions(make_live: MakeLive, stream: bool) -> None:
    server = make_live(step_s=0.02)
    body = {"model": "base", "prompt": ["a", "b"], "max_tokens": 400, "n": 2, "stream": stream}
    with send(server, body, path="/v1/completions"):
        wait_until(lambda: server.engine.num_running == 4)
    wait_until(lambda: server.engine.num_running == 0)
    assert len(server.engine.aborted) == 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_accept", [False, True])
def test_a_client_that_leaves_aborts_its_requests(
    make_live: MakeLive, caplog: pytest.LogCaptureFixture, stream: bool, hold_accept: bool
) -> None:
    caplog.set_level(logging.INFO, "lorikeet.access")
    server = make_live(step_s=0.02, hold_accept=hold_accept)
    body = {"text": ["a", "b"], "rid": ["x", "y"], "sampling_params": LONG, "stream": stream}
    with send(server, body) as connection:
        wait_until(lambda: server.engine.num_running == 2)
        if stream and not hold_accept:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
    wait_until(lambda: server.engine.num_running == 0)
    assert sorted(server.engine.aborted) == [0, 1]
    wait_until(lambda: server.client.num_open == 0)
    wait_until(lambda: any("(client left)" in line for line in caplog.messages))
    other = httpx.get(server.url + "/health", timeout=60)
    assert other.status_code == 200


def test_a_client_that_stops_reading_slows_nobody(make_live: MakeLive) -> None:
    server = make_live(step_s=0.002)
    body = {"text": "a" * 100, "sampling_params": LONG | {"n": 24}, "stream": True}
    with send(server, body, receive_buffer=4096) as slow:
        wait_until(lambda: server.engine.num_running == 24)
        body = {"text": "b", "sampling_params": {"max_new_tokens": 5}}
        reply = httpx.post(server.url + "/generate", json=body, timeout=60)
        assert reply.json()["text"] == "bbbbb"
        # Its own requests run to their end, too, although it has read nothing.
        wait_until(lambda: server.client.num_open == 0)
        text = read_all(slow)
    found = [part for part in text.split("data: ") if part.startswith("{")]
    assert text.count("data: [DONE]") == 1
    assert len(found) < 24 * 400 / 2, "what it missed was merged into later events"
    last = {}
    for part in found:
        event = json.loads(_unchunked(part))
        last[event["index"]] = event
    assert [len(last[index]["text"]) for index in range(24)] == [400] * 24


def _unchunked(part: str) -> str:
    """One event without the marks of chunked encoding around it."""
    return part[: part.rindex("}") + 1]


def test_many_streams_at_a_time(make_live: MakeLive) -> None:
    server = make_live(step_s=0.005)
    texts: dict[int, str] = {}

    def one(number: int) -> None:
        body = {"text": f"{number:02}", "sampling_params": {"max_new_tokens": 8}, "stream": True}
        with send(server, body) as connection:
            events = [part for part in read_all(connection).split("data: ") if part[0] == "{"]
            texts[number] = json.loads(_unchunked(events[-1]))["text"]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: f"{number:02}" * 4 for number in range(50)}


def test_the_path_of_a_probe_is_no_way_around_the_key(
    make_live: MakeLive, config: ServerConfig
) -> None:
    server = make_live(config=replace(config, api_key="k"))
    for path in ("/health/../v1/models", "/health%2F..%2Fv1/models", "/health/", "//health"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(
                f"GET {path} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n".encode()
            )
            assert read_all(connection).startswith("HTTP/1.1 401 "), path
