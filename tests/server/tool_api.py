"""An application whose model reads tools, over an engine double that answers with scripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx

from lorikeet.config import ServerConfig, resolve
from lorikeet.text.tokenizer import Tokenizer
from tests.server.conftest import Api, open_api
from tests.server.test_native import events
from tests.support.byte_tokenizer import save_byte_tokenizer
from tests.support.fake_engine import Knobs

SPECIALS = ["[TOOL_CALLS]", "[ARGS]", "<tool_call>", "</tool_call>", "<|python_tag|>", "<|other|>"]

Reply = dict[str, Any]
OpenApi = Callable[..., AbstractAsyncContextManager[Api]]


def tool(name: str, strict: bool | None = None, **properties: Any) -> Reply:
    """A function with required parameters, as a body has it."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": f"does {name}", "parameters": parameters}
    return {
        "type": "function",
        "function": function | ({} if strict is None else {"strict": strict}),
    }


WEATHER = tool("weather", city={"type": "string"})
ADD = tool("add", a={"type": "integer"}, b={"type": "integer"})
TOOLS = [WEATHER, ADD]


def make_tokenizer(
    directory: Path, template: str | None, specials: Sequence[str] = SPECIALS
) -> Tokenizer:
    """One token per byte, the special tokens of tools, and a chat template."""
    save_byte_tokenizer(directory)
    settings: Reply = {"eos_token": "</s>", "additional_special_tokens": list(specials)}
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.load(directory)


def open_tools(
    directory: Path, template: str | None, *scripts: str, parser: str | None = None, **knobs: Any
) -> AbstractAsyncContextManager[Api]:
    """An application that renders with ``template``; the engine answers the requests with ``scripts`` in turn."""
    tokenizer = make_tokenizer(directory, template)
    tokens = [tokenizer.encode(script, add_special_tokens=False) for script in scripts]
    config = ServerConfig(
        model_path=str(directory), served_model_name="base", tool_call_parser=parser
    )
    return open_api(
        resolve(config),
        tokenizer,
        Knobs(scripts=tokens, context_length=4096, vocab_size=300, **knobs),
    )


async def ask(api: Api, content: str = "?", **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": content}]
    body = {"model": "base", "messages": messages, "tools": TOOLS, "max_tokens": 400} | body
    return await api.http.post("/v1/chat/completions", json=body)


def prompt(api: Api) -> str:
    """What the newest request was rendered to."""
    return api.client.tokenizer.decode(
        api.engine.seen[-1].prompt_token_ids, skip_special_tokens=False
    )


def calls_of(message: Reply) -> list[tuple[str, str]]:
    """Name and arguments of the calls of a message."""
    return [
        (call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls") or []
    ]


def added_up(chunks: list[Reply]) -> dict[int, Reply]:
    """The messages that the chunks of a stream tell, by choice, checking the form of each chunk."""
    choices: dict[int, Reply] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            known = {"content": "", "tool_calls": [], "finish_reason": None, "logprobs": []}
            choice = choices.setdefault(piece["index"], known)
            assert choice["finish_reason"] is None
            choice["finish_reason"] = piece["finish_reason"]
            choice["content"] += piece["delta"].get("content") or ""
            choice["logprobs"] += (piece["logprobs"] or {}).get("content") or []
            for call in piece["delta"].get("tool_calls", []):
                _add_call(choice["tool_calls"], call)
    return choices


def _add_call(calls: list[Reply], delta: Reply) -> None:
    index, function = delta["index"], delta["function"]
    if index == len(calls):
        assert set(delta) == {"index", "id", "type", "function"}
        assert function["arguments"] == ""
        calls.append({"id": delta["id"], "type": delta["type"], "function": dict(function)})
        return
    # Only the newest call goes on.
    assert index == len(calls) - 1
    assert set(delta) == {"index", "function"}
    assert set(function) == {"arguments"}
    assert function["arguments"]
    calls[index]["function"]["arguments"] += function["arguments"]


async def ask_both(api: Api, **body: Any) -> tuple[Reply, Reply]:
    """The choice of a whole reply, and what a stream of the same script adds up to."""
    whole = (await ask(api, **body)).json()["choices"][0]
    return whole, added_up(events(await ask(api, stream=True, **body)))[0]
