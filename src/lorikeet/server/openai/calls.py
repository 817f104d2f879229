"""Turns bodies of the OpenAI API into requests, by way of the native API's fields, and names fields in errors as the client did."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import orjson

from lorikeet.client.client import EngineClient
from lorikeet.client.intake import MAX_TEXT, RequestBatch
from lorikeet.client.stream import CompletionStream
from lorikeet.core.request import FinishReason, Pooling
from lorikeet.errors import LorikeetError, RequestError
from lorikeet.names import check_name
from lorikeet.server.errors import ModelNotFoundError
from lorikeet.server.openai.bodies import (
    OPENAI_PARAMS,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    OpenAIBody,
    check_keys,
    read_field,
    refusal,
)
from lorikeet.server.openai.messages import plain_messages
from lorikeet.server.openai.tools import ToolUse, read_tools
from lorikeet.server.protocol import parse_body
from lorikeet.server.reading import LARGE, run_sized
from lorikeet.text.chat import ChatTemplates, TemplateFacts, find_facts, render_template

# OpenAI's default for completions; a chat goes on to the end of the context.
COMPLETION_MAX_TOKENS = 16

# Native names that a client of this API does not know -> its own.
_NAMES = {param.name: str(param.openai) for param in OPENAI_PARAMS} | {"structural_tag": "tools"}
_COMPLETION_NAMES = _NAMES | {
    "text": "prompt",
    "input_ids": "prompt",
    "top_logprobs_num": "logprobs",
}
_CHAT_NAMES = _NAMES | {
    "text": "messages",
    "input_ids": "messages",
    "top_logprobs_num": "top_logprobs",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call for a model, checked.

    Attributes:
        id: of the reply; ``POST /abort_request`` takes it.
        model: as the client wrote it.
        adapter: the adapter of every request; None is the base.
        named_by_model: ``model`` names the adapter, not ``lora_path``.
        names: native name of a field -> the client's.
        is_stream: the reply comes in chunks; ``has_usage``: of which the last one counts tokens.
        echo: the text of each prompt, if the choices begin with it.
        tools: what the choices may call.
    """

    id: str
    model: str
    batch: RequestBatch
    adapter: str | None
    named_by_model: bool
    names: Mapping[str, str]
    is_stream: bool = False
    has_usage: bool = False
    echo: list[str] | None = None
    tools: ToolUse | None = None

    @property
    def num_samples(self) -> int:
        """Choices for each prompt."""
        return self.batch.requests[0].num_samples


def prompt_field(value: str | list[Any]) -> str:
    """The native API's field for prompts that may be text or token ids."""
    is_text = isinstance(value, str) or any(isinstance(item, str) for item in value)
    return "text" if is_text else "input_ids"


def find_adapter(base: str, body: OpenAIBody | EmbeddingBody) -> tuple[str | None, bool]:
    """The adapter that a body names, None if it is the base, and whether it is ``model`` that names it.

    Whether the adapter exists is the engine's to say.

    Raises:
        RequestError: ``model`` is empty, or no name.
    """
    if not body.model:
        raise RequestError("model is empty; allowed: the name of a model", "model")
    name = "" if body.model == base else body.model.removeprefix(f"{base}:")
    return (check_name(name, "model"), True) if name else (body.lora_path, False)


def make_call(
    base: str,
    client: EngineClient,
    body: OpenAIBody | EmbeddingBody,
    kind: str,
    native: Mapping[str, Any],
    names: Mapping[str, str],
    pooling: Pooling | None = None,
) -> Call:
    """The call of a body.

    Args:
        base: the base's name.
        kind: what the id of the reply begins with.
        native: fields of the native API.
        names: native name of a field -> the client's.

    Raises:
        RequestError: names the field as the client does.
    """
    adapter, named_by_model = find_adapter(base, body)
    call_id = f"{kind}-{uuid.uuid4().hex}"
    with named(names):
        fields = {"lora_path": adapter, "rid": call_id, **native}
        batch = client.intake.make_requests(fields, pooling)
    return Call(
        id=call_id,
        model=body.model,
        batch=batch,
        adapter=adapter,
        named_by_model=named_by_model,
        names=names,
    )


class CallReader:
    """Reads bodies.

    Args:
        base: the base's name.
        client: knows the tokenizer and the limits of the engine.
        tool_call_parser: the value of ``--tool-call-parser``.
    """

    def __init__(self, base: str, client: EngineClient, tool_call_parser: str | None) -> None:
        self._base = base
        self._client = client
        self._tool_call_parser = tool_call_parser

    def completion(self, data: bytes) -> Call:
        """Read the body of ``POST /v1/completions``.

        Raises:
            RequestError: names the field, its value and what is allowed.
        """
        body = parse_body(CompletionBody, data)
        native: dict[str, Any] = {prompt_field(body.prompt): body.prompt}
        if body.logprobs is not None:
            native |= {"return_logprob": True, "top_logprobs_num": body.logprobs}
            native |= {"logprob_start_len": 0} if body.echo else {}
        sampling = {"max_new_tokens": COMPLETION_MAX_TOKENS} | given_sampling(body)
        call = self._call(body, "cmpl", native, sampling, _COMPLETION_NAMES)
        return self._with_echo(call, body) if body.echo else call

    async def chat(self, body: ChatBody, size: int) -> Call:
        """Read the body of ``POST /v1/chat/completions``, which had ``size`` bytes.

        Raises:
            RequestError: names the field, its value and what is allowed.
        """
        text, tools = await self._render(body, size)
        return await run_sized(max(size, len(text)), partial(self._read_chat, body, text, tools))

    def _read_chat(self, body: ChatBody, text: str, tools: ToolUse | None) -> Call:
        """The call for a rendered conversation."""
        native: dict[str, Any] = {"input_ids": self._encode(text)}
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError("top_logprobs: is only allowed with logprobs: true", "top_logprobs")
        if body.logprobs:
            native |= {"return_logprob": True, "top_logprobs_num": body.top_logprobs}
        sampling: dict[str, Any] = {"structural_tag": None if tools is None else tools.grammar}
        sampling |= {"max_new_tokens": None} | given_sampling(body)
        limit, other = body.max_completion_tokens, sampling["max_new_tokens"]
        if limit is not None and other is not None and limit != other:
            raise RequestError(
                f"max_tokens is {other} and max_completion_tokens {limit}; give one of them",
                "max_tokens",
            )
        names = _CHAT_NAMES
        if other is None:
            names = names | {"max_new_tokens": "max_completion_tokens"}
            sampling["max_new_tokens"] = limit
        call = self._call(body, "chatcmpl", native, sampling, names)
        return replace(call, tools=tools)

    async def _render(self, body: ChatBody, size: int) -> tuple[str, ToolUse | None]:
        """Render the messages and the tools as text."""
        adapter, _ = find_adapter(self._base, body)
        own = None if adapter is None else self._client.adapter_templates.get(adapter)
        templates = self._client.tokenizer.chat_templates(own)
        source = templates.pick(has_tools=bool(body.tools))
        whose = f"the chat template of the adapter {adapter!r}" if own else "the chat template"
        sandbox = self._client.templates
        # Who started the server has chosen the base's template.
        facts = await sandbox.facts(source, whose) if own else find_facts(source)
        work = partial(self._prepare, body, templates, source, facts)
        context, tools = await run_sized(size, work)
        if own or size > LARGE:
            text = await sandbox.render(source, context, whose=whose, most=MAX_TEXT)
        else:
            text = render_template(source, context)
        return text, tools

    def _prepare(
        self, body: ChatBody, templates: ChatTemplates, source: str, facts: TemplateFacts
    ) -> tuple[dict[str, Any], ToolUse | None]:
        """What the template sees, and what the model may call."""
        tools = read_tools(body, self._tool_call_parser, source)
        if tools is not None and not facts.reads_tools:
            raise RequestError("tools: the model's chat template does not read tools", "tools")
        context = templates.context(
            plain_messages(body.messages, facts),
            add_generation_prompt=True,
            tools=None if tools is None else tools.prompt,
        )
        return context, tools

    def _encode(self, text: str) -> list[int]:
        with named(_CHAT_NAMES):
            token_ids = self._client.intake.encode_rendered(text)
        if not token_ids:
            raise RequestError("messages: the chat template makes no token of them", "messages")
        return token_ids

    def _call(
        self,
        body: OpenAIBody,
        kind: str,
        native: dict[str, Any],
        sampling: dict[str, Any],
        names: Mapping[str, str],
    ) -> Call:
        num_samples = sampling.get("n", 1)
        if body.best_of is not None and body.best_of != num_samples:
            raise RequestError(f"best_of is {body.best_of}; allowed: n ({num_samples})", "best_of")
        sampling = {**self._client.info.sampling_defaults, **sampling}
        sampling |= read_response_format(sampling.pop("json_schema", None))
        native = {"sampling_params": sampling, **native}
        call = make_call(self._base, self._client, body, kind, native, names)
        options = body.stream_options
        has_usage = bool(options and options.include_usage)
        return replace(call, is_stream=bool(body.stream), has_usage=has_usage)

    def _with_echo(self, call: Call, body: CompletionBody) -> Call:
        if isinstance(body.prompt, str):
            texts = [body.prompt]
        elif isinstance(body.prompt[0], str):
            texts = cast(list[str], body.prompt)
        else:
            texts = [
                self._client.tokenizer.decode(
                    request.prompt_token_ids,
                    skip_special_tokens=request.sampling.skip_special_tokens,
                )
                for request in call.batch.requests
            ]
        return replace(call, echo=texts)


def given_sampling(body: OpenAIBody) -> dict[str, Any]:
    """The sampling parameters of a body under their native names, and ``response_format`` as ``json_schema``."""
    fields = ((param.name, getattr(body, str(param.openai))) for param in OPENAI_PARAMS)
    return {name: value for name, value in fields if value is not None}


@contextmanager
def named(names: Mapping[str, str]) -> Generator[None]:
    """Name fields as the client does in errors that are raised inside: native name -> the client's."""
    try:
        yield
    except RequestError as error:
        error.rename(names)
        raise


def read_response_format(value: Mapping[str, Any] | None) -> dict[str, Any]:
    """``response_format`` as sampling parameters of the native API.

    Raises:
        RequestError: it has none of the three forms.
    """
    if value is None:
        return {}
    where, kind = "response_format", value.get("type")
    wanted = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    if kind not in ("text", "json_object", "json_schema"):
        raise refusal(f"{where}.type", kind, "text, json_object, json_schema")
    check_keys(value, wanted, where)
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    form = read_field(value, "json_schema", where, dict, "an object with name and schema")
    where += ".json_schema"
    # A name and a description are for the model's eyes elsewhere; strict or not, the schema is always obeyed.
    check_keys(form, {"name", "description", "schema", "strict"}, where)
    schema = read_field(form, "schema", where, dict, "a JSON schema")
    try:
        return {"json_schema": orjson.dumps(schema).decode()}
    except orjson.JSONEncodeError as error:
        raise RequestError(f"{where}.schema cannot be used: {error}", f"{where}.schema") from error


async def submit(client: EngineClient, call: Call) -> CompletionStream:
    """Start the requests of a call, all of them or none. The caller closes the stream.

    Raises:
        ModelNotFoundError: ``model`` names an adapter that is not there.
        RequestError: the engine refused a request, in the client's own words.
        EngineFault: the engine failed, or has no room.
    """
    # Special tokens that are seen in the text although those are skipped.
    markers = client.tokenizer.ids_of(call.tools.form.markers if call.tools else ())
    try:
        return await client.submit(call.batch, markers=markers)
    except RequestError as error:
        # Whatever the engine says of an adapter that is not there: ``model`` names no model then.
        if call.adapter is None or client.adapters.path(call.adapter) is not None:
            error.rename(call.names)
            raise
        if not call.named_by_model:
            raise RequestError(f"lora_path: {error}", "lora_path") from error
        raise ModelNotFoundError(
            f"the model {call.model!r} does not exist: {error}", "model"
        ) from error


def check_finish(finish: FinishReason) -> None:
    """Raise an error if a completion failed or was aborted: no choice of a reply can say so."""
    error: LorikeetError | None = finish.error()
    if error is None and finish.kind == "abort":
        error = RequestError(f"the request was aborted: {finish.message or 'no reason given'}")
    if error is not None:
        raise error
