"""A server process and a client that notes when each token arrives."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lifecycle.fixtures import VOCAB
from lorikeet.utils import launch_server_cmd, terminate_process, wait_for_server

HOST = "127.0.0.1"
_TIMEOUT = 300


@dataclass(frozen=True)
class Timing:
    """When one streamed request got its tokens; seconds.

    Attributes:
        first: from the request to the first token.
        gaps: between one token and the next.
    """

    first: float
    gaps: tuple[float, ...]


class Server:
    """The server under test."""

    def __init__(self, port: int) -> None:
        self._port = port

    def request(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Status and JSON of a reply."""
        connection = http.client.HTTPConnection(HOST, self._port, timeout=_TIMEOUT)
        try:
            self._send(connection, method, path, body)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read() or b"null")
        finally:
            connection.close()

    def load(self, name: str, path: Path, *, pinned: bool = False) -> float:
        """Load an adapter; seconds that it took."""
        began = time.perf_counter()
        body = {"lora_name": name, "lora_path": str(path), "pinned": pinned}
        status, reply = self.request("POST", "/load_lora_adapter", body)
        if status != 200:
            raise RuntimeError(f"loading {name}: {reply}")
        return time.perf_counter() - began

    def unload(self, name: str) -> None:
        status, reply = self.request("POST", "/unload_lora_adapter", {"lora_name": name})
        if status != 200:
            raise RuntimeError(f"unloading {name}: {reply}")

    def tier(self, name: str) -> str:
        """Where an adapter is now: disk, host or device."""
        status, reply = self.request("GET", f"/v1/adapters/{name}")
        if status != 200:
            raise RuntimeError(f"adapter {name}: {reply}")
        return reply["tier"]

    def stream(self, adapter: str | None, prompt: list[int], num_tokens: int) -> Timing:
        """Generate ``num_tokens`` tokens and note when each came."""
        body = {
            "input_ids": prompt,
            "lora_path": adapter,
            "stream": True,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": num_tokens,
                "ignore_eos": True,
            },
        }
        connection = http.client.HTTPConnection(HOST, self._port, timeout=_TIMEOUT)
        try:
            began = time.perf_counter()
            self._send(connection, "POST", "/generate", body)
            reply = connection.getresponse()
            if reply.status != 200:
                raise RuntimeError(f"adapter {adapter}: {reply.read().decode()}")
            times = list(_token_times(reply, num_tokens))
        finally:
            connection.close()
        gaps = tuple(later - earlier for earlier, later in itertools.pairwise(times))
        return Timing(times[0] - began, gaps)

    @staticmethod
    def _send(connection: http.client.HTTPConnection, method: str, path: str, body: object) -> None:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})


def _token_times(reply: http.client.HTTPResponse, num_tokens: int) -> Iterator[float]:
    """When each event came that brought a new token; events that came together have nearly the same time."""
    seen = 0
    while line := reply.readline():
        now = time.perf_counter()
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        event = json.loads(line[len(b"data: ") :])
        if "error" in event:
            raise RuntimeError(str(event["error"]))
        if event["meta_info"]["completion_tokens"] > seen:
            seen = event["meta_info"]["completion_tokens"]
            yield now
    if seen != num_tokens:
        raise RuntimeError(f"{seen} tokens came of {num_tokens}")


@contextmanager
def running_server(model: Path, **options: object) -> Iterator[Server]:
    """A server on a free port with ``options`` as flags."""
    words = ["python3", "-m", "lorikeet.launch_server", "--model-path", str(model)]
    words += ["--load-format", "dummy", "--log-level", "warning", "--enable-lora"]
    for name, value in options.items():
        given = value if isinstance(value, list | tuple) else [value]
        words += [f"--{name.replace('_', '-')}", *(str(item) for item in given)]
    process, port = launch_server_cmd(shlex.join(words))
    try:
        wait_for_server(f"http://{HOST}:{port}", timeout=120, process=process)
        yield Server(port)
    finally:
        terminate_process(process)


def prompts(length: int, seed: int) -> Iterator[list[int]]:
    """Prompts of which no two begin alike, so that no prefix is found in the cache."""
    source = random.Random(seed)
    while True:
        yield [source.randrange(3, VOCAB) for _ in range(length)]
