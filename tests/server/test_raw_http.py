"""What no client library sends: bytes on a socket that are late, too many, too few, or no HTTP."""

from __future__ import annotations

import json
import logging
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from lorikeet.config import ServerConfig
from lorikeet.server.limits import MAX_HEAD, Limits
from lorikeet.text.tokenizer import Tokenizer
from tests.support.fake_engine import Knobs
from tests.support.live_server import LiveServer

MB = 1 << 20
# A second is enough to be late in a test, and more than a stalled machine needs to be in time.
QUICK = Limits(body_bytes=MB, adapter_bytes=2 * MB, body_seconds=1.5, body_rate=MB, head_seconds=2)
BODY = json.dumps({"text": "ab", "sampling_params": {"max_new_tokens": 4}}).encode()


@dataclass
class Answer:
    """One response as it was on the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, object]:
        assert self.headers["content-type"] == "application/json"
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["type"].endswith("_error")
        return error


class Wire:
    """A connection on which a test writes bytes."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._reader = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, *, has_body: bool = True) -> Answer:
        line = self._reader.readline()
        assert line.startswith(b"HTTP/1.1 "), line
        headers: dict[str, str] = {}
        while (field := self._reader.readline()) != b"\r\n":
            name, _, value = field.decode().partition(":")
            headers[name.lower()] = value.strip()
        length = int(headers.get("content-length", 0)) if has_body else 0
        return Answer(int(line.split()[1]), headers, self._reader.read(length))

    def wait_for_end(self) -> bytes:
        """What comes until the server closes the connection."""
        try:
            return self._reader.read()
        except ConnectionResetError:
            return b""

    def close(self) -> None:
        self._reader.close()
        self.socket.close()


@pytest.fixture(scope="module")
def server(model_dir: Path, tokenizer: Tokenizer) -> Iterator[LiveServer]:
    config = ServerConfig(model_path=str(model_dir), served_model_name="base")
    with LiveServer(config, tokenizer, Knobs(), QUICK) as made:
        yield made


@pytest.fixture
def wire(server: LiveServer) -> Iterator[Wire]:
    made = Wire(server.port)
    yield made
    made.close()


@pytest.fixture(scope="module")
def other() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=5) as made:
        yield made


@pytest.fixture(autouse=True)
def others_are_served(
    server: LiveServer, other: httpx.Client, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """After whatever a test did, everybody else gets an answer at once, and nothing of it is left but a line or two."""
    yield
    reply = other.post(server.url + "/generate", content=BODY)
    assert reply.json()["text"] == "abab"
    assert server.client.num_open == 0
    assert not [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]


def head(path: str = "/generate", *fields: str, method: str = "POST") -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        *fields,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def sized(body: bytes) -> str:
    return f"Content-Length: {len(body)}"


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),  # TLS on a port without it
        b"GET /health\r\n\r\n",
        b"GET  /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no Host
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: t\r\nNo colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: t\r\nX: a\x00b\r\n\r\n",
        b"GET /he\xc3\xa4lth HTTP/1.1\r\nHost: t\r\n\r\n",
        head("/generate", "Content-Length: -1"),
        head("/generate", "Content-Length: 0x10"),
        head("/generate", "Content-Length: 2", "Content-Length: 3"),
        head("/generate", "Content-Length: 99999999999999999999999"),
    ],
    ids=repr,
)
def test_what_is_not_http(wire: Wire, data: bytes) -> None:
    wire.send(data)
    answer = wire.read()
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert answer.headers["connection"] == "close"
    assert wire.wait_for_end() == b""


def test_an_unknown_coding_of_a_body(wire: Wire) -> None:
    wire.send(head("/generate", "Transfer-Encoding: gzip, chunked"))
    answer = wire.read()
    assert answer.status == 501
    assert answer.error["type"] == "server_error"


def test_a_head_without_end(wire: Wire) -> None:
    wire.send(b"GET /health HTTP/1.1\r\nHost: t\r\n")
    # One byte too many, so that nothing is unread when the server closes the connection.
    wire.send(b"X: " + b"a" * MAX_HEAD)
    answer = wire.read()
    assert answer.status == 431
    assert str(MAX_HEAD) in str(answer.error["message"])
    assert wire.wait_for_end() == b""


def test_large_headers_within_the_limit(wire: Wire) -> None:
    wire.send(head("/health", *(f"X-{number}: {'a' * 600}" for number in range(100)), method="GET"))
    assert wire.read().status == 200


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("length", [MB + 1, 100 * MB, 10**18])
def test_a_declared_body_that_is_too_large(wire: Wire, path: str, length: int) -> None:
    wire.send(head(path, f"Content-Length: {length}"))
    answer = wire.read()  # before a byte of the body was sent
    assert answer.status == 413
    assert answer.error["type"] == "request_too_large_error"
    assert str(length) in str(answer.error["message"])
    assert str(MB) in str(answer.error["message"])


def test_the_rest_of_a_refused_body_is_thrown_away(wire: Wire) -> None:
    """Its client writes all of 100 MB before it reads, and still finds the answer, and the connection usable."""
    wire.send(head("/generate", f"Content-Length: {100 * MB}"))
    for _ in range(100):
        wire.send(bytes(MB))
    assert wire.read().status == 413
    wire.send(head("/generate", sized(BODY)) + BODY)
    assert json.loads(wire.read().body)["text"] == "abab"


@pytest.mark.parametrize("sized_first", [True, False])
def test_a_client_that_will_close_finds_the_refusal_too(wire: Wire, sized_first: bool) -> None:
    """It writes everything before it reads; the server closes its half and reads on."""
    coding = f"Content-Length: {40 * MB}" if sized_first else "Transfer-Encoding: chunked"
    wire.send(head("/generate", coding, "Connection: close"))
    for _ in range(40):
        wire.send(bytes(MB) if sized_first else b"100000\r\n" + bytes(MB) + b"\r\n")
    answer = wire.read()
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert wire.wait_for_end() == b""


def test_a_client_that_goes_on_sending_is_cut_off(wire: Wire) -> None:
    wire.send(head("/generate", f"Content-Length: {40 * MB}", "Connection: close"))
    begun = time.monotonic()
    while _is_open(wire):
        assert time.monotonic() < begun + 20
        time.sleep(0.02)
    assert time.monotonic() - begun > QUICK.head_seconds - 0.5


def _is_open(wire: Wire) -> bool:
    try:
        wire.send(b"x")
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def test_urllib_sees_the_refusal_of_a_large_body(server: LiveServer) -> None:
    request = urllib.request.Request(server.url + "/generate", bytes(20 * MB))
    with pytest.raises(urllib.error.HTTPError) as caught:  # it sends Connection: close
        urllib.request.urlopen(request, timeout=30)
    assert caught.value.code == 413
    caught.value.close()


def test_httpx_sees_the_refusal_of_a_large_body(server: LiveServer, other: httpx.Client) -> None:
    reply = other.post(server.url + "/generate", content=bytes(20 * MB), timeout=30)
    assert reply.status_code == 413


def test_an_endless_chunked_body(wire: Wire) -> None:
    wire.send(head("/generate", "Transfer-Encoding: chunked"))
    for _ in range(20):
        wire.send(b"10000\r\n" + bytes(0x10000) + b"\r\n")
    answer = wire.read()
    assert answer.status == 413
    assert answer.error["type"] == "request_too_large_error"


def test_the_weights_of_an_adapter_may_be_larger(wire: Wire) -> None:
    path = "/load_lora_adapter_from_tensors"
    body = b"x" * (2 * MB)
    wire.send(head(path, sized(body)) + body)
    answer = wire.read()
    assert answer.status == 400, "it was read, and is no JSON"
    wire.send(head(path, f"Content-Length: {2 * MB + 1}"))
    answer = wire.read()
    assert answer.status == 413
    reply = json.loads(answer.body)
    assert set(reply) == {"success", "error_message", "loaded_adapters"}
    assert reply["success"] is False
    assert str(2 * MB) in reply["error_message"]
    assert reply["loaded_adapters"] == {"json": "/a/json", "sql": "/a/sql"}


def test_a_large_body_behind_expect_is_refused_before_it_is_sent(wire: Wire) -> None:
    wire.send(head("/generate", f"Content-Length: {100 * MB}", "Expect: 100-continue"))
    assert wire.read().status == 413
    assert wire.wait_for_end() == b""


def test_a_body_behind_expect_is_asked_for(wire: Wire) -> None:
    wire.send(head("/generate", sized(BODY), "Expect: 100-continue"))
    assert wire.read(has_body=False).status == 100
    wire.send(BODY)
    assert wire.read().status == 200


def test_a_key_is_asked_for_before_the_body(model_dir: Path, tokenizer: Tokenizer) -> None:
    config = ServerConfig(model_path=str(model_dir), served_model_name="base", api_key="k")
    with LiveServer(config, tokenizer, Knobs(), QUICK) as server:
        wire = Wire(server.port)
        wire.send(head("/generate", f"Content-Length: {100 * MB}"))
        assert wire.read().status == 401
        wire.close()


@pytest.mark.parametrize("sent", [0, 5])
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/load_lora_adapter"])
def test_a_body_that_is_cut_off(wire: Wire, server: LiveServer, path: str, sent: int) -> None:
    wire.send(head(path, sized(BODY)) + BODY[:sent])
    wire.socket.shutdown(socket.SHUT_WR)
    assert wire.wait_for_end() == b"", "nobody answers half a request"


@pytest.mark.parametrize(
    "chunks",
    [b"zz\r\n", b"-5\r\n", b"3\r\nabcdef\r\n", b"fffffffffffffffffffff\r\n"],
    ids=repr,
)
def test_malformed_chunks(wire: Wire, chunks: bytes) -> None:
    wire.send(head("/generate", "Transfer-Encoding: chunked") + chunks)
    assert wire.read().status == 400
    assert wire.wait_for_end() == b""


def test_malformed_chunks_behind_an_answer(wire: Wire) -> None:
    """The route has answered without the body; there is no second answer to its garbage."""
    wire.send(head("/nothing", "Transfer-Encoding: chunked"))
    assert wire.read().status == 404
    wire.send(b"zz\r\n")
    assert wire.wait_for_end() == b""


def test_a_body_in_many_chunks(wire: Wire) -> None:
    wire.send(head("/generate", "Transfer-Encoding: chunked"))
    for byte in BODY:
        wire.send(b"1\r\n" + bytes([byte]) + b"\r\n")
    wire.send(b"0\r\n\r\n")
    assert json.loads(wire.read().body)["text"] == "abab"


@pytest.mark.parametrize("start", [b"", b"POST /gen", head("/generate")[:-2]], ids=repr)
def test_a_slow_head(wire: Wire, start: bytes) -> None:
    """Neither silence nor a byte now and then keeps a connection open."""
    begun = time.monotonic()
    wire.send(start)
    wire.socket.settimeout(0.25)
    while time.monotonic() < begun + 20:
        try:
            if wire.socket.recv(1) == b"":
                break
        except TimeoutError:
            if start:
                wire.send(b"x")
        except ConnectionResetError:
            break
    took = time.monotonic() - begun
    assert QUICK.head_seconds - 0.5 < took < 15


@pytest.mark.parametrize(
    "path", ["/generate", "/v1/completions", "/load_lora_adapter", "/abort_request"]
)
def test_a_slow_body(wire: Wire, path: str) -> None:
    begun = time.monotonic()
    wire.send(head(path, sized(BODY)))
    wire.socket.settimeout(0.25)
    for byte in BODY:
        wire.send(bytes([byte]))
        try:
            wire.socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            continue
        break
    wire.socket.settimeout(30)
    answer = wire.read()
    assert answer.status == 408
    assert QUICK.body_seconds - 0.1 < time.monotonic() - begun < 15
    text = json.loads(answer.body)
    message = text["error_message"] if "lora" in path else text["error"]["message"]
    assert "too slowly" in message


def test_a_body_that_keeps_its_rate_may_take_longer(wire: Wire) -> None:
    """The bound of 1.5 seconds grows by a second with each megabyte."""
    padding = b" " * (MB - len(BODY))
    body = BODY + padding
    begun = time.monotonic()
    wire.send(head("/generate", sized(body)))
    for start in range(0, MB, MB // 8):
        wire.send(body[start : start + MB // 8])
        time.sleep(0.22)
    answer = wire.read()
    assert time.monotonic() - begun > QUICK.body_seconds
    assert json.loads(answer.body)["text"] == "abab"


def test_many_slow_clients_at_a_time(server: LiveServer, other: httpx.Client) -> None:
    wires = [Wire(server.port) for _ in range(200)]
    for number, wire in enumerate(wires):
        wire.send(head("/generate", sized(BODY))[: 20 if number % 2 else None])
    reply = other.post(server.url + "/generate", content=BODY)
    assert reply.json()["text"] == "abab"
    for number, wire in enumerate(wires):
        if number % 2 == 0:
            assert wire.read().status == 408
        assert wire.wait_for_end() == b""
        wire.close()


def test_requests_one_behind_the_other(wire: Wire) -> None:
    """Answers come in the order of the requests, each complete."""
    one = head("/generate", sized(BODY)) + BODY
    wire.send(one + head("/health", method="GET") + one + head("/nothing", method="GET"))
    answers = [wire.read() for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 200, 404]
    assert [json.loads(answers[place].body)["text"] for place in (0, 2)] == ["abab"] * 2


@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-8"],
)
def test_the_content_type_is_not_looked_at(wire: Wire, kind: str | None) -> None:
    """What `curl -d` sends is called a form; its body decides."""
    fields = [] if kind is None else [f"Content-Type: {kind}"]
    wire.send(head("/generate", *fields, sized(BODY)) + BODY)
    assert wire.read().status == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"text=ab", b"\xff\xfe", BODY.decode().encode("utf-16"), b"[1]", b"null", b"{" * 100_000],
    ids=lambda body: repr(body[:9]),
)
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_a_body_that_is_no_json_object(wire: Wire, path: str, body: bytes) -> None:
    wire.send(head(path, "Content-Type: application/json", sized(body)) + body)
    answer = wire.read()
    assert answer.status == 400
    assert "JSON" in str(answer.error["message"])


@pytest.mark.parametrize("method", ["OPTIONS", "PATCH", "DELETE", "TRACE", "BREW"])
def test_methods_that_a_path_does_not_have(wire: Wire, method: str) -> None:
    wire.send(head("/generate", method=method))
    answer = wire.read()
    assert answer.status == 405
    assert answer.headers["allow"] == "POST, PUT"
    assert answer.error["type"] == "method_not_allowed_error"


def test_head_has_no_body(wire: Wire) -> None:
    wire.send(head("/generate", method="HEAD") + head("/health", method="GET"))
    assert wire.read(has_body=False).status == 405
    assert wire.read().status == 200, "the next answer begins where the head's ends"


@pytest.mark.parametrize(
    "path",
    ["/", "*", "/v1", "/../etc/passwd", "/%00", "/%ff", "http://test/generate"],
)
def test_unknown_paths(wire: Wire, path: str) -> None:
    wire.send(head(path))
    answer = wire.read()
    assert answer.status == 404
    assert answer.error["type"] == "not_found_error"
