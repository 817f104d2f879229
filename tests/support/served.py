"""A server in a process of its own, as a user starts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lorikeet.utils import free_port, launch_server_cmd, terminate_process, wait_for_server


@contextmanager
def served(options: str) -> Iterator[str]:
    """The URL of a server that answers; it has to end by itself when it is told to.

    Args:
        options: of ``lorikeet serve``, as in a shell.
    """
    process, port = launch_server_cmd(
        f"python -m lorikeet.launch_server {options}", port=free_port()
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(url, timeout=120, process=process)
        yield url
    finally:
        terminate_process(process)
    assert process.returncode == 0
