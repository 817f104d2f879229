"""Requests in one line: ``generate(regex="a{9}")``, ``chats(template="{{ 1 }}")``, ``loads(config={"r": 0})``.

JSON is written with escapes, so a lone surrogate in a text reaches the server as one.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Callable
from typing import Any

from lorikeet import demo
from tests.support.hostile import Call
from tests.support.tool_templates import HERMES

Fields = dict[str, Any]

_numbers = itertools.count(1)
_STRANGER = demo.adapter_paths()["json"]
# Not those of tests.support.peft_adapters, which imports torch: it would be the test's own memory.
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def post(path: str, body: object) -> Call:
    """A JSON body, or one that is text or bytes already."""
    if isinstance(body, str):
        body = body.encode()
    return Call(path, body if isinstance(body, bytes) else json.dumps(body).encode())


def get(path: str) -> Call:
    return Call(path, method="GET")


def generate(text: Any = "Hi", fields: Fields | None = None, **sampling: Any) -> Call:
    """``/generate``: few tokens of ``text``, with other fields, and sampling parameters."""
    body = {"text": text, "sampling_params": {"max_new_tokens": 4} | sampling}
    return post("/generate", body | (fields or {}))


def tokens(input_ids: Any, fields: Fields | None = None, **sampling: Any) -> Call:
    """``/generate`` with token ids."""
    body = {"input_ids": input_ids, "sampling_params": {"max_new_tokens": 4} | sampling}
    return post("/generate", body | (fields or {}))


def completion(prompt: Any = "Hi", **fields: Any) -> Call:
    return post("/v1/completions", {"model": "demo", "prompt": prompt, "max_tokens": 4} | fields)


def chat(content: Any = "Hi", **fields: Any) -> Call:
    messages = [{"role": "user", "content": content}]
    body = {"model": "demo", "messages": messages, "max_tokens": 4}
    return post("/v1/chat/completions", body | fields)


def embed(text: Any = "Hi", **fields: Any) -> Call:
    return post("/v1/embeddings", {"model": "demo", "input": text} | fields)


def format_of(schema: object) -> Fields:
    """A ``response_format``."""
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


def tool(parameters: object, **fields: Any) -> Call:
    """A chat with a tool, by an adapter whose template knows tools."""
    function = {"name": "f", "strict": True, "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    return with_tools({"tools": tools} | fields)


def with_tools(fields: Fields) -> Call:
    """A chat of the adapter whose template knows tools."""
    call = chat(**{"model": "hermes"} | fields)
    return Call(call.path, call.body, adapters={"hermes": stranger(template=HERMES)})


def schema_in(place: str, schema: object) -> Call:
    """A request with a JSON schema in one of :data:`SCHEMA_PLACES`."""
    return SCHEMA_PLACES[place](schema)


SCHEMA_PLACES: dict[str, Callable[[Any], Call]] = {
    "native": lambda schema: generate(json_schema=json.dumps(schema)),
    "completions": lambda schema: completion(response_format=format_of(schema)),
    "chat": lambda schema: chat(response_format=format_of(schema)),
    "strict tool": lambda schema: tool(in_object(schema)),
    "required tool": lambda schema: tool(in_object(schema), tool_choice="required"),
    "structural tag": lambda schema: tagged({"type": "json_schema", "json_schema": schema}),
}


def in_object(schema: object) -> Fields:
    """Arguments of a tool are an object; definitions belong to its root."""
    found: Fields = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    if isinstance(schema, dict) and "$defs" in schema:
        found["$defs"] = schema["$defs"]
    return found


def tagged(form: object) -> Call:
    """A format of a structural tag."""
    return generate(structural_tag=json.dumps({"type": "structural_tag", "format": form}))


def nested(depth: int, opening: str, closing: str, inside: str = "1") -> str:
    """``opening`` and ``closing`` around each other."""
    return opening * depth + inside + closing * depth


def chain(number: int, link: Callable[[Fields], Fields]) -> Fields:
    """A schema whose ``number`` definitions each lead to the next one."""
    found = {f"D{i}": link({"$ref": f"#/$defs/D{i + 1}"}) for i in range(number)}
    return {"$ref": "#/$defs/D0", "$defs": found | {f"D{number}": {"type": "integer"}}}


# ---------------------------------------------------------------------------------------------------------------------
# Adapters of strangers.


def stranger(
    *,
    config: Fields | str | None = None,
    template: str | None = None,
    tokenizer_config: object = None,
    weights: bytes | None = None,
) -> dict[str, bytes]:
    """The files of the demo's adapter ``json``, with a part that differs.

    Args:
        config: fields that replace those of its configuration, or the whole text.
        template: ``chat_template.jinja``.
        tokenizer_config: as JSON.
        weights: the safetensors file.
    """
    original = json.loads((_STRANGER / CONFIG).read_text())
    text = config if isinstance(config, str) else json.dumps(original | (config or {}))
    files = {CONFIG: text.encode(), WEIGHTS: weights or (_STRANGER / WEIGHTS).read_bytes()}
    if template is not None:
        files["chat_template.jinja"] = template.encode("utf-8", "surrogatepass")
    if tokenizer_config is not None:
        files["tokenizer_config.json"] = json.dumps(tokenizer_config).encode()
    return files


def loads(name: str | None = None, **files: Any) -> Call:
    """An administrator's load of an adapter with these files."""
    directory = f"stranger-{next(_numbers)}"
    body = {"lora_name": name or directory, "lora_path": f"$DIR/{directory}"}
    call = post("/load_lora_adapter", body)
    return Call(call.path, call.body, adapters={directory: stranger(**files)})


def asks(**files: Any) -> Call:
    """Anybody's request that has an adapter with these files loaded."""
    name = f"stranger-{next(_numbers)}"
    call = generate(fields={"lora_path": name})
    return Call(call.path, call.body, adapters={name: stranger(**files)})


def chats(content: Any = "Hi", messages: Any = None, **files: Any) -> Call:
    """Anybody's chat that has an adapter with these files loaded."""
    name = f"stranger-{next(_numbers)}"
    given = {} if messages is None else {"messages": messages}
    call = chat(content, model=name, **given)
    return Call(call.path, call.body, adapters={name: stranger(**files)})


def safetensors(header: object, data: bytes = b"") -> bytes:
    """A file of weights from its header: an object, or text as it is."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape: list[int], dtype: str = "F32", place: tuple[int, int] = (0, 4)) -> Fields:
    """A header with one tensor of the right name."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": list(place)}}
