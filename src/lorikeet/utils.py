"""Helpers for notebooks, scripts and tests: start a server, wait for it, end it, show what it says.

    process, port = launch_server_cmd("python3 -m lorikeet.launch_server --model-path demo --lora-paths demo")
    wait_for_server(f"http://localhost:{port}", process=process)
    ...
    terminate_process(process)

Only the standard library is used, so that a client needs nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import html
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import IO, Any

from lorikeet.errors import EngineDeadError

logger = logging.getLogger(__name__)

BASE = "(base)"
POLL_SECONDS = 0.1
# What a server gets to finish its requests before it is killed.
GRACE_SECONDS = 30.0

# JSON whose quotes a shell would eat: notebooks write it bare into the command, and here no shell reads it.
_BARE_JSON = re.compile(r"(?<!\S)\{[^{}]*\}(?!\S)")
# A proxy of the environment must not come between a client and its own machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def split_command(command: str) -> list[str]:
    """Split a command into words like a shell, but leave JSON objects and ends of lines alone.

    ``python3`` as the first word is the interpreter that runs this, whatever ``PATH`` says.
    """
    text = command.replace("\\\n", " ").strip().rstrip("\\")
    words: list[str] = []
    start = 0
    for match in _BARE_JSON.finditer(text):
        words += [*shlex.split(text[start : match.start()]), match[0]]
        start = match.end()
    words += shlex.split(text[start:])
    if words and words[0] in ("python", "python3"):
        words[0] = sys.executable
    return words


def free_port(host: str = "127.0.0.1", preferred: int | None = None) -> int:
    """A port that nobody listens on now: the preferred one if it is free, else any."""
    for port in (preferred, 0):
        if port is None:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            # As servers bind: a port whose last connections are still closing counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    raise OSError(f"no free port on {host}")


def launch_server_cmd(
    command: str, host: str = "127.0.0.1", port: int | None = None
) -> tuple[subprocess.Popen[str], int]:
    """Start a server in the background and return its process and port; its output is shown as it comes.

    Args:
        command: like ``python3 -m lorikeet.launch_server --model-path demo``; no shell reads it.
        host: where it listens unless the command has ``--host``.
        port: None takes the ``--port`` of the command, or else a free one.
    """
    words = split_command(command)
    given = _option_value(words, "--port")
    if port is None:
        port = int(given) if given is not None else free_port(host)
    if given is None:
        words += ["--port", str(port)]
    if _option_value(words, "--host") is None:
        words += ["--host", host]
    logger.info("Starting: %s", shlex.join(words))
    # A notebook replaces sys.stdout; what a process writes to the file descriptor would not reach the cell.
    shown = None if sys.stdout is sys.__stdout__ else subprocess.PIPE
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=shown,
        stderr=subprocess.STDOUT if shown else None,
        text=True,
        # Its own group: Ctrl-C ends the caller, which ends the server, in this order.
        start_new_session=True,
    )
    if process.stdout is not None:
        threading.Thread(target=_show, args=(process.stdout,), daemon=True).start()
    atexit.register(terminate_process, process)
    return process, port


def _option_value(words: list[str], flag: str) -> str | None:
    for number, word in enumerate(words):
        if word == flag and number + 1 < len(words):
            return words[number + 1]
        if word.startswith(flag + "="):
            return word.partition("=")[2]
    return None


def _show(stream: IO[str]) -> None:
    with stream:
        for line in stream:
            sys.stdout.write(line)


def wait_for_server(
    base_url: str,
    timeout: float | None = None,
    process: subprocess.Popen[str] | None = None,
) -> None:
    """Return as soon as the server answers ``/health``.

    Args:
        timeout: seconds; None waits as long as it takes.
        process: the server, if known, so that its end is noticed.

    Raises:
        EngineDeadError: the process has ended.
        TimeoutError: it did not answer in time.
    """
    started = time.monotonic()
    while not _answers(base_url + "/health"):
        if process is not None and process.poll() is not None:
            raise EngineDeadError(
                f"the server ended with exit code {process.returncode} before it was ready; "
                "its output says why"
            )
        if timeout is not None and time.monotonic() - started > timeout:
            raise TimeoutError(f"{base_url} did not answer within {timeout:g} seconds")
        time.sleep(POLL_SECONDS)


def _answers(url: str) -> bool:
    try:
        with _opener.open(url, timeout=5) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False


def post_json(url: str, body: object, *, api_key: str | None = None, timeout: float = 600) -> Any:
    """Post a JSON body and return the JSON of the reply.

    Raises:
        urllib.error.HTTPError: the status is 400 or above.
    """
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with _opener.open(request, timeout=timeout) as response:
        return json.load(response)


def terminate_process(process: subprocess.Popen[str], timeout: float = GRACE_SECONDS) -> None:
    """End a server: ask it, wait, and after ``timeout`` seconds kill it with its children."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        logger.warning("process %d did not end within %g seconds; killed", process.pid, timeout)
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def print_highlight(content: object) -> None:
    """Show a line that stands out: coloured in a notebook, as it is elsewhere."""
    if "ipykernel" in sys.modules and find_spec("IPython") is not None:
        from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

        display(HTML(f"<strong style='color: #00008B;'>{html.escape(str(content))}</strong>"))
    else:
        sys.stdout.write(f"{content}\n")


def format_answers(
    prompts: Iterable[str], adapters: Iterable[str | None], texts: Iterable[str]
) -> str:
    """The answers to prompts as a table as wide as the terminal; None is the base model."""
    rows = [
        (prompt, adapter or BASE, text.strip())
        for prompt, adapter, text in zip(prompts, adapters, texts, strict=True)
    ]
    return format_table(("prompt", "adapter", "answer"), rows, width=terminal_width())


def terminal_width() -> int:
    return shutil.get_terminal_size((110, 24)).columns


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, width: int = 100) -> str:
    """Lay out text in columns with borders, at most about ``width`` wide; long cells are wrapped.

    A column gets the width of its longest line unless the sum is too wide; then the widest columns give way.
    """
    cells = [header, *rows]
    widths = [
        max(len(line) for row in cells for line in (row[column].splitlines() or [""]))
        for column in range(len(header))
    ]
    room = width - 3 * len(widths) - 1
    while sum(widths) > room and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    rule = "+" + "+".join("-" * (size + 2) for size in widths) + "+"
    lines = [rule]
    for row in cells:
        lines += [*_row_lines(row, widths), rule]
    return "\n".join(lines)


def _row_lines(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    wrapped = [
        [piece for line in cell.splitlines() for piece in textwrap.wrap(line, size) or [""]]
        for cell, size in zip(row, widths, strict=True)
    ]
    height = max(1, *(len(lines) for lines in wrapped))
    return [
        "| "
        + " | ".join(
            (lines[number] if number < len(lines) else "").ljust(size)
            for lines, size in zip(wrapped, widths, strict=True)
        )
        + " |"
        for number in range(height)
    ]
