"""The command ``lorikeet demo``: start a server, ask the base and every adapter in one call, show the answers."""

from __future__ import annotations

import shlex
import sys
import time
import urllib.error
from collections.abc import Callable

from lorikeet import demo, envs
from lorikeet.errors import EngineDeadError, EngineFault
from lorikeet.utils import (
    format_answers,
    free_port,
    launch_server_cmd,
    post_json,
    terminate_process,
    wait_for_server,
)

PORT = 30000
HOST = "127.0.0.1"
SAMPLING = {"temperature": 0, "max_new_tokens": 128}


def run(*, once: bool, port: int | None = None) -> None:
    """Run the demo until Ctrl-C (KeyboardInterrupt), or until the table is shown.

    Raises:
        EngineFault: the server did not start or answer, or ended by itself.
    """
    port = port or free_port(HOST, preferred=PORT)
    url = f"http://{HOST}:{port}"
    command = (
        "python3 -m lorikeet.launch_server"
        f" --model-path {demo.NAME} --lora-paths {demo.NAME} --host {HOST} --port {port}"
    )
    _say(f"[1/3] Starting the server: {command}")
    started = time.monotonic()
    process, _ = launch_server_cmd(command)
    try:
        wait_for_server(url, process=process)
        _say(
            f"[2/3] Ready after {time.monotonic() - started:.1f} s. Asking the base and every adapter in one call."
        )
        adapters: list[str | None] = [None, *demo.adapter_paths()]
        _say(ask(url, demo.QUESTION, adapters))
        if once:
            _say("[3/3] Done; ending the server.")
            return
        _say(
            f"[3/3] Serving at {url} until Ctrl-C. Ask it yourself from another terminal:\n\n{example(url)}\n"
        )
        raise EngineDeadError(f"the server ended with exit code {process.wait()}")
    except urllib.error.URLError as error:
        raise EngineFault(f"the server did not answer: {error}") from error
    finally:
        terminate_process(process)


def ask(
    url: str,
    prompt: str,
    adapters: list[str | None],
    post: Callable[..., list[dict[str, str]]] = post_json,
) -> str:
    """Send one prompt once for each adapter (None is the base) in one request; return the answers as a table."""
    body = {
        "text": [prompt] * len(adapters),
        "lora_path": adapters,
        "sampling_params": SAMPLING,
    }
    started = time.monotonic()
    replies = post(f"{url}/generate", body, api_key=envs.API_KEY.get())
    seconds = time.monotonic() - started
    table = format_answers([prompt] * len(adapters), adapters, [reply["text"] for reply in replies])
    return f"{table}\n{len(replies)} answers from one call in {seconds:.2f} s."


def example(url: str) -> str:
    """A curl command that asks the demo server."""
    adapter = next(iter(demo.adapter_paths()), None)
    body = (
        f'{{"text": "{demo.QUESTION}", "lora_path": "{adapter}", '
        '"sampling_params": {"temperature": 0}}'
    )
    return f"  curl -s {url}/generate -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    # Through a pipe (CI, tee), too, each step shows when it happens and in order with the server's output.
    sys.stdout.flush()
