"""Servers started and ended from a script: the command's words, ports, waiting, ending, tables."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from lorikeet.errors import EngineDeadError
from lorikeet.utils import (
    format_table,
    free_port,
    launch_server_cmd,
    post_json,
    print_highlight,
    split_command,
    terminate_process,
    wait_for_server,
)

# Answers /health with 200 and a POST with its own body; the first words of its output are its arguments.
SERVER = """
import http.server, signal, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"key": "%s", "body": %s}' % (self.headers["Authorization"].encode(), body))

    def log_message(self, *args):
        pass

if "--deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("arguments", *sys.argv[1:], flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def server_script(tmp_path):
    path = tmp_path / "server.py"
    path.write_text(textwrap.dedent(SERVER), encoding="utf-8")
    return path


@pytest.fixture
def launched(server_script):
    started: list[subprocess.Popen[str]] = []

    def launch(flags: str = "", **keywords):
        process, port = launch_server_cmd(f"python3 {server_script} {flags}", **keywords)
        started.append(process)
        return process, port

    yield launch
    for process in started:
        terminate_process(process)


def test_the_notebook_command_keeps_its_json():
    words = split_command(
        """
        python3 -m lorikeet.launch_server --model-path base \\
            --lora-paths \\
                {"lora_name":"lora0","lora_path":"p0","pinned":true} \\
                {"lora_name": "lora1", "lora_path": "p 1"} \\
                lora2=p2 'a path/with spaces'
            --log-level warning \\
        """
    )
    assert words == [
        *(sys.executable, "-m", "lorikeet.launch_server", "--model-path", "base", "--lora-paths"),
        '{"lora_name":"lora0","lora_path":"p0","pinned":true}',
        '{"lora_name": "lora1", "lora_path": "p 1"}',
        *("lora2=p2", "a path/with spaces", "--log-level", "warning"),
    ]


def test_quoted_json_loses_only_its_quotes():
    assert split_command("""serve --lora-paths '{"lora_name": "a"}'""") == [
        *("serve", "--lora-paths", '{"lora_name": "a"}')
    ]


def test_free_port_can_be_bound_and_prefers():
    port = free_port()
    assert free_port(preferred=port) == port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert free_port(preferred=port) != port


def test_a_server_is_started_asked_and_ended(launched, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    process, port = launched()
    wait_for_server(f"http://localhost:{port}", timeout=20, process=process)
    reply = post_json(f"http://127.0.0.1:{port}/x", {"a": 1}, api_key="k")
    assert reply == {"key": "Bearer k", "body": {"a": 1}}
    terminate_process(process)
    assert process.returncode == -signal.SIGTERM
    assert f"arguments --port {port} --host 127.0.0.1" in shown.getvalue()


def test_port_and_host_of_the_command_are_kept(launched):
    given = free_port()
    process, port = launched(f"--port {given} --host=localhost")
    assert port == given
    assert process.args.count("--port") == 1
    assert "--host" not in process.args
    _, other = launched(port=free_port(), host="127.0.0.1")
    assert other != given


def test_a_server_that_fails_is_noticed():
    process, port = launch_server_cmd("python3 -c 'import sys; sys.exit(3)'")
    with pytest.raises(EngineDeadError, match="exit code 3"):
        wait_for_server(f"http://127.0.0.1:{port}", timeout=20, process=process)


def test_waiting_has_an_end():
    with pytest.raises(TimeoutError, match="did not answer within"):
        wait_for_server(f"http://127.0.0.1:{free_port()}", timeout=0.2)


def test_a_deaf_server_is_killed(launched):
    process, port = launched("--deaf")
    wait_for_server(f"http://127.0.0.1:{port}", timeout=20, process=process)
    started = time.monotonic()
    terminate_process(process, timeout=0.3)
    assert process.returncode == -signal.SIGKILL
    assert time.monotonic() - started < 10
    terminate_process(process)  # ending it twice is no error


def test_a_process_of_another_group_is_killed_alone():
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        terminate_process(process, timeout=0.1)
    assert process.returncode == -signal.SIGKILL
    assert os.getpid()  # we are in its group and still here


def test_a_server_ends_with_the_script_that_forgot_it(server_script):
    code = (
        "from lorikeet.utils import *\n"
        f"process, port = launch_server_cmd('python3 {server_script}')\n"
        "wait_for_server(f'http://127.0.0.1:{port}', timeout=20, process=process)\n"
        "print('pid', process.pid)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    pid = int(done.stdout.split("pid ")[1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_highlight_without_a_notebook(capsys):
    print_highlight({"a": 1})
    assert capsys.readouterr().out == "{'a': 1}\n"


def test_table_keeps_lines_and_wraps():
    table = format_table(
        ("prompt", "answer"),
        [("one two three four five", json.dumps({"a": 1}, indent=1)), ("x", "")],
        width=30,
    )
    lines = table.splitlines()
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= 30
    assert lines[0] == "+------------------+---------+"
    assert lines[1] == "| prompt           | answer  |"
    assert lines[3] == "| one two three    | {       |"
    assert lines[4] == '| four five        |  "a": 1 |'
    assert lines[5] == "|                  | }       |"
    assert lines[7] == "| x                |         |"


def test_a_table_that_cannot_fit_is_wider():
    table = format_table(("a" * 20, "b" * 20), [("c", "d")], width=5)
    assert "aaaaaaaa" in table
