"""What an upload costs the HTTP process in memory: a few pieces of it, however large it is."""

from __future__ import annotations

import base64
import http.client
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lorikeet.utils import free_port
from tests.support.live_server import wait_until

PIECE = bytes(3 << 18)
NUM_PIECES = 128  # 96 MiB of tensors, 128 MiB of base64
MOST = 32 << 20


def body() -> Iterator[bytes]:
    """Tensors first: what follows them must not make them wait in memory."""
    yield b'{"tensors":"'
    head = struct.pack("<Q", 1024) + b"{}" + b" " * 1022
    yield base64.b64encode(head + PIECE[len(head) :])
    text = base64.b64encode(PIECE)
    for _ in range(NUM_PIECES - 1):
        yield text
    yield b'","lora_name":"large","config_dict":{"r":4}}'


def peak(pid: int) -> int:
    """The most memory that a process has had, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def is_up(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def test_an_upload_never_lies_in_memory_as_a_whole(model_dir: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "tests.support.serve_fake", str(model_dir), str(port), "{}"]
    with subprocess.Popen(command) as server:
        try:
            wait_until(lambda: is_up(port))
            before = peak(server.pid)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            length = sum(map(len, body()))
            connection.request(
                "POST",
                "/load_lora_adapter_from_tensors",
                body(),
                {"Content-Length": str(length), "Content-Type": "application/json"},
            )
            reply = json.loads(connection.getresponse().read())
            connection.close()
            assert reply["loaded_adapters"]["large"] == "__tensor__", reply
            grown = peak(server.pid) - before
            assert grown < MOST < length, f"{grown >> 20} MiB more for {length >> 20} MiB"
        finally:
            server.terminate()
