"""The ``openai`` client against a server with keys: async, many streams, parsed replies, typed errors; and what is logged."""

from __future__ import annotations

import asyncio
import hmac
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from lorikeet.server import middleware
from lorikeet.utils import free_port, terminate_process, wait_for_server

KEY, ADMIN_KEY = "key-of-everyone", "key-of-the-admin"
ADAPTERS = ("json", "lines", "pirate", "sql")
MODELS = ("parrot", "parrot:", *ADAPTERS, "parrot:pirate")
QUESTIONS = (
    "What is the capital of France?",
    "List 3 countries and their capitals.",
    "Where is Oslo?",
)


def chat(question: str = QUESTIONS[0]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "temperature": 0}


@dataclass
class Server:
    """A server in a process of its own, and the file that has all it writes."""

    url: str
    output: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    output = tmp_path_factory.mktemp("server") / "output.txt"
    port = free_port()
    options = f"--model-path demo --served-model-name parrot --lora-paths demo --port {port}"
    options += " --max-total-tokens 8192 --log-level debug"
    options += f" --api-key {KEY} --admin-api-key {ADMIN_KEY}"
    with output.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lorikeet.launch_server", *options.split()],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for_server(url, timeout=120, process=process)
        yield Server(url, output)
    finally:
        terminate_process(process)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def async_client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    url = f"{server.url}/v1"
    async with AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


@pytest.mark.anyio
async def test_an_async_chat_is_that_of_the_other_client(
    client: OpenAI, async_client: AsyncOpenAI
) -> None:
    mine = await async_client.chat.completions.create(model="pirate", seed=5, **chat())
    other = client.chat.completions.create(model="pirate", seed=5, **chat())
    assert mine.choices == other.choices
    assert mine.usage is not None
    assert mine.usage.completion_tokens > 3


@pytest.mark.anyio
async def test_an_async_completion_with_everything(async_client: AsyncOpenAI) -> None:
    body: dict[str, Any] = {
        "prompt": list(QUESTIONS[:2]),
        "max_tokens": 6,
        "temperature": 1.5,
        "n": 2,
        "seed": 3,
        "logprobs": 2,
    }
    whole = await async_client.completions.create(model="lines", **body)
    again = await async_client.completions.create(model="lines", **body)
    assert whole.choices == again.choices
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert choice.logprobs.top_logprobs is not None
        # A token's name may be its bytes, but these adapters speak ASCII.
        assert "".join(choice.logprobs.tokens[: len(choice.text)]).startswith(choice.text[:4])
        assert all(2 <= len(top) <= 3 for top in choice.logprobs.top_logprobs)


@pytest.mark.anyio
async def test_many_streams_at_a_time(client: OpenAI, async_client: AsyncOpenAI) -> None:
    """Each stream is the greedy reply of its own adapter, whatever shares the batch; so are completions."""
    calls = [(model, question) for model in MODELS for question in QUESTIONS] * 2
    expected = {
        call: client.chat.completions.create(model=call[0], **chat(call[1])).choices[0]
        for call in set(calls)
    }
    assert len({choice.message.content for choice in expected.values()}) > 10

    async def stream(model: str, question: str) -> tuple[str, str | None]:
        text, reason = "", None
        async for chunk in await async_client.chat.completions.create(
            model=model, stream=True, **chat(question)
        ):
            assert chunk.model == model
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason
        return text, reason

    found = await asyncio.gather(*(stream(*call) for call in calls))
    for call, (text, reason) in zip(calls, found, strict=True):
        assert text == expected[call].message.content, call
        assert reason == expected[call].finish_reason


@pytest.mark.anyio
async def test_a_stream_that_is_left_early(async_client: AsyncOpenAI) -> None:
    stream = await async_client.chat.completions.create(model="sql", stream=True, **chat())
    async for _ in stream:
        break
    await stream.close()
    reply = await async_client.chat.completions.create(model="sql", **chat())
    assert reply.choices[0].finish_reason == "stop"


class Place(BaseModel):
    city: Literal["Oslo", "Rome"]
    is_capital: bool


class Answer(BaseModel):
    place: Place
    certain: bool | None


def test_a_parsed_chat(client: OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="pirate", response_format=Answer, max_tokens=200, **chat(QUESTIONS[1])
    )
    parsed = reply.choices[0].message.parsed
    assert isinstance(parsed, Answer)
    assert reply.choices[0].finish_reason == "stop"


@pytest.mark.anyio
async def test_a_parsed_stream(async_client: AsyncOpenAI) -> None:
    async with async_client.chat.completions.stream(
        model="json", response_format=Place, **chat()
    ) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    assert isinstance(final.choices[0].message.parsed, Place)


def test_a_parsed_chat_that_is_cut_short(client: OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="parrot", response_format=Answer, max_tokens=3, **chat()
        )


@pytest.mark.parametrize("name", ["parrot", *ADAPTERS])
def test_the_card_of_a_model(client: OpenAI, name: str) -> None:
    card = client.models.retrieve(name)
    assert card in client.models.list().data
    extra = card.model_extra or {}
    assert extra["parent"] == (None if name == "parrot" else "parrot")
    assert Path(extra["root"]).is_dir()


@pytest.mark.anyio
async def test_the_async_list_of_models(async_client: AsyncOpenAI) -> None:
    assert [card.id async for card in async_client.models.list()] == ["parrot", *ADAPTERS]


def test_errors_by_status(client: OpenAI, server: Server) -> None:
    with pytest.raises(openai.AuthenticationError) as wrong_key:
        client.with_options(api_key="wrong").models.list()
    assert wrong_key.value.type == "authentication_error"
    assert "Authorization: Bearer KEY" in wrong_key.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="a")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="there is no /v1/files"):
        client.files.list()
    with pytest.raises(openai.BadRequestError) as field:
        client.completions.create(model="parrot", prompt="a", top_p=3)
    assert field.value.param == "top_p"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model="parrot", prompt="a", extra_body={"temprature": 1})
    assert unknown.value.param == "temprature"
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model="parrot", prompt="a" * (33 << 20))
    assert (large.value.status_code, large.value.type) == (413, "request_too_large_error")


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_async_errors(async_client: AsyncOpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError):
        await async_client.chat.completions.create(model="parrot:x", stream=stream, **chat())
    with pytest.raises(openai.BadRequestError):
        await async_client.chat.completions.create(
            model="parrot", stream=stream, max_tokens=-1, **chat()
        )
    with pytest.raises(openai.AuthenticationError):
        await async_client.with_options(api_key="x").chat.completions.create(
            model="parrot", stream=stream, **chat()
        )


def test_each_key_opens_its_own(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:

        def status(key: str, method: str, path: str) -> int:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return http.request(method, path, headers=headers, json={}).status_code

        assert status("", "GET", "/health") == 200
        for key, code in ((KEY, 401), (ADMIN_KEY, 200), ("", 401)):
            assert status(key, "POST", "/flush_cache") == code
        for path in ("/load_lora_adapter", "/v1/unload_lora_adapter", "/abort_request"):
            assert status(KEY, "POST", path) == 401
            assert status(ADMIN_KEY, "POST", path) == 400
        for path in ("/v1/models", "/server_info", "/openapi.json", "/docs"):
            assert [status(key, "GET", path) for key in ("", ADMIN_KEY, KEY)] == [401, 401, 200]


def test_no_key_is_ever_shown(server: Server, client: OpenAI) -> None:
    """Neither by the log, which is at its most talkative here, nor by any reply."""
    replies: list[str] = []
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for key in (KEY, ADMIN_KEY, KEY + "x", "wrong"):
            for scheme in ("Bearer", "Basic", "bearer"):
                headers = {"Authorization": f"{scheme} {key}"}
                replies += [
                    http.request(method, path, headers=headers, json={"text": 5}).text
                    for method, path in (
                        ("GET", "/server_info"),
                        ("GET", "/openapi.json"),
                        ("GET", f"/v1/models?key={key}"),
                        ("POST", "/generate"),
                        ("POST", "/load_lora_adapter"),
                        ("POST", "/v1/completions"),
                    )
                ]
    assert '"api_key"' not in "".join(replies)
    text = server.output.read_text()
    assert "GET /server_info 200" in text
    for shown in (text, *replies):
        assert KEY not in shown
        assert ADMIN_KEY not in shown


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the standard library's function, with the whole of both."""
    seen: list[tuple[bytes, bytes]] = []

    class Watched:
        @staticmethod
        def compare_digest(given: bytes, key: bytes) -> bool:
            seen.append((given, key))
            return hmac.compare_digest(given, key)

    monkeypatch.setattr(middleware, "hmac", Watched)
    statuses: list[int] = []

    async def app(scope: object, receive: object, send: object) -> None:
        statuses.append(200)

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def ask(given: bytes) -> None:
        rules = middleware.KeyRules(api_key=KEY, admin_api_key=None, admin_paths=(), open_paths=())
        keys = middleware.Gate(app, refusal=rules.refusal)
        headers = [(b"authorization", b"Bearer " + given)]
        await keys({"type": "http", "path": "/v1/models", "headers": headers}, None, send)  # pyright: ignore[reportArgumentType]

    for given in (b"x", KEY[:-1].encode(), KEY.encode()):
        asyncio.run(ask(given))
    assert statuses == [401, 401, 200]
    assert seen == [(given, KEY.encode()) for given in (b"x", KEY[:-1].encode(), KEY.encode())]
