"""Tools and adapters' chat templates by the ``openai`` client, against a live server on the demo model.

The model knows no tools, so its template is replaced by one that shows them, and calls are asked for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest
from openai import OpenAI

from lorikeet import demo
from tests.support.served import served
from tests.support.tool_templates import HERMES

QUESTION = "What is the capital of France?"
# A template that asks something else, so that its answer is another one.
OTHER_QUESTIONS = {"own": "List 3 countries.", "other": "What is the capital of Peru?"}
ASKED = "<|user|>\n%s<|end|>\n<|assistant|>\n"


def function(name: str, **properties: Any) -> Any:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


PLACES = {"type": "string", "enum": ["Paris", "東京", "Lima"]}
TOOLS = [
    function("weather", city=PLACES, days={"type": "integer", "minimum": 0, "maximum": 9}),
    function("note", text={"type": "string", "maxLength": 12}),
]
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
WEATHER: Any = {"type": "function", "function": {"name": "weather"}}


def copy_adapter(directory: Path, name: str, template: str) -> Path:
    shutil.copytree(demo.adapter_paths()[name], directory)
    (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that reads tools, and adapters that bring templates."""
    root = tmp_path_factory.mktemp("tools")
    shutil.copytree(demo.model_path(), root / "base")
    path = root / "base" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": HERMES}))
    for name, question in OTHER_QUESTIONS.items():
        copy_adapter(root / name, "pirate", ASKED % question + "\n")  # Jinja drops the last one
    copy_adapter(root / "broken", "pirate", "{% for")
    return root


@pytest.fixture(scope="module")
def url(world: Path) -> Iterator[str]:
    with served(
        f"--model-path {world}/base --served-model-name parrot"
        f" --lora-paths pirate={demo.adapter_paths()['pirate']} own={world}/own --max-total-tokens 8192"
    ) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def check_arguments(name: str, arguments: str) -> None:
    value = json.loads(arguments)
    if name == "weather":
        assert value["city"] in PLACES["enum"]
        assert 0 <= value["days"] <= 9
    else:
        assert name == "note"
        assert len(value["text"]) <= 12


@pytest.mark.parametrize("choice", ["required", WEATHER], ids=["required", "named"])
@pytest.mark.parametrize("model", ["parrot", "pirate"])
def test_calls(client: OpenAI, choice: Any, model: str) -> None:
    body = {**CHAT, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    reply = client.chat.completions.create(model=model, max_tokens=200, **body)
    whole = reply.choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    [call] = cast(Any, whole.message.tool_calls)
    assert call.id.startswith("call_")
    check_arguments(call.function.name, call.function.arguments)
    assert choice == "required" or call.function.name == "weather"

    chunks = list(client.chat.completions.create(model=model, max_tokens=200, stream=True, **body))
    deltas = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].function is not None
    assert deltas[0].function.name == call.function.name
    told = "".join(piece.function.arguments or "" for piece in deltas if piece.function)
    assert told == call.function.arguments
    assert len(deltas) > 2
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_several_calls_and_choices(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="parrot",
        messages=CHAT["messages"],
        tools=TOOLS,
        tool_choice="required",
        temperature=1.3,
        seed=1,
        n=3,
        max_tokens=300,
    )
    ids: list[str] = []
    for choice in reply.choices:
        calls = cast(Any, choice.message.tool_calls)
        assert calls
        complete = calls if choice.finish_reason == "tool_calls" else calls[:-1]
        for call in complete:
            check_arguments(call.function.name, call.function.arguments)
        ids += [call.id for call in calls]
    assert len(set(ids)) == len(ids)


def test_a_whole_conversation(client: OpenAI) -> None:
    """The message of a call goes back as the client has it, with the result."""
    asked = client.chat.completions.create(
        model="parrot", tools=TOOLS, tool_choice=WEATHER, max_tokens=200, **CHAT
    )
    message = asked.choices[0].message
    [call] = cast(Any, message.tool_calls)
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "22 degrees"}
    history: Any = [*CHAT["messages"], message, result]
    reply = client.chat.completions.create(
        model="parrot", messages=history, tools=TOOLS, temperature=0, max_tokens=20
    )
    assert reply.choices[0].message.tool_calls is None
    assert reply.usage is not None
    assert asked.usage is not None
    assert reply.usage.prompt_tokens > asked.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="tool_calls before it"):
        client.chat.completions.create(
            model="parrot", messages=[*CHAT["messages"], result], tools=TOOLS
        )


def test_strict_tools_may_be_left_alone(client: OpenAI) -> None:
    """The model answers in words, as it has learnt, though a grammar looks on."""
    tools: Any = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    reply = client.chat.completions.create(model="parrot", tools=tools, max_tokens=40, **CHAT)
    plain = client.chat.completions.create(
        model="parrot", tools=tools, tool_choice="none", max_tokens=40, **CHAT
    )
    assert reply.choices[0].message.tool_calls is None
    assert reply.choices[0].message.content
    assert "Paris" in (plain.choices[0].message.content or "")


def test_a_schema_that_cannot_be_obeyed(client: OpenAI) -> None:
    tools: Any = [function("f", a={"not": {"type": "string"}})]
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="parrot", tools=tools, tool_choice="required", **CHAT)
    assert raised.value.param == "tools"
    assert "not is not supported" in str(raised.value)


def content(client: OpenAI, model: str) -> str:
    reply = client.chat.completions.create(model=model, max_tokens=40, **CHAT)
    return reply.choices[0].message.content or ""


def generated(url: str, prompt: str) -> str:
    """What the pirate says after a prompt as it is."""
    sampling = {"temperature": 0, "max_new_tokens": 40}
    body = {"text": prompt, "lora_path": "pirate", "sampling_params": sampling}
    return httpx.post(f"{url}/generate", json=body, timeout=60).json()["text"]


def test_an_adapter_with_a_template(client: OpenAI, url: str, world: Path) -> None:
    assert content(client, "pirate") == generated(url, ASKED % QUESTION)
    assert content(client, "own") == generated(url, ASKED % OTHER_QUESTIONS["own"])
    assert content(client, "own") != content(client, "pirate")
    # The template of the adapter reads no tools, that of the base does.
    with pytest.raises(openai.BadRequestError, match="tool-call-parser"):
        client.chat.completions.create(model="own", tools=TOOLS, **CHAT)

    def load(path: str) -> httpx.Response:
        body = {"lora_name": "late", "lora_path": str(world / path)}
        return httpx.post(f"{url}/load_lora_adapter", json=body, timeout=60)

    for path, question in OTHER_QUESTIONS.items():
        assert load(path).status_code == 200
        assert content(client, "late") == generated(url, ASKED % question)
        body = {"lora_name": "late"}
        assert httpx.post(f"{url}/unload_lora_adapter", json=body, timeout=60).status_code == 200
    refused = load("broken")
    assert refused.status_code == 400
    assert f"{world}/broken/chat_template.jinja" in refused.json()["error_message"]
    with pytest.raises(openai.NotFoundError):
        content(client, "late")
