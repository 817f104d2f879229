"""A server in a process of its own, as a user starts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import Popen

from lorikeet.utils import free_port, launch_server_cmd, terminate_process, wait_for_server


@contextmanager
def served_process(options: str) -> Iterator[tuple[Popen[str], str]]:
    """The process of a server that answers, which leads a group, and its URL; it has to end by itself when it is told to.

    Args:
        options: of ``lorikeet serve``, as in a shell.
    """
    process, port = launch_server_cmd(
        f"python -m lorikeet.launch_server {options}", port=free_port()
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(url, timeout=120, process=process)
        yield process, url
    finally:
        terminate_process(process)
    assert process.returncode == 0


@contextmanager
def served(options: str) -> Iterator[str]:
    """The URL of a :func:`served_process`."""
    with served_process(options) as (_, url):
        yield url
