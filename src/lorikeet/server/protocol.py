"""The bodies of HTTP requests as pydantic models, and the one way to read them.

A body is checked strictly (``"true"`` is not a boolean) and what is wrong with it is a RequestError, which names the
field, the value and what is allowed. The description of a field is the text of what is allowed. Keys that a model does
not have are ignored: clients of the native API send many. (Those of ``openai/bodies.py`` are strict about that, too.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar, cast

import msgspec
import orjson
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import ErrorDetails

from lorikeet.core.sampling import PARAMS, Param
from lorikeet.errors import RequestError
from lorikeet.server.reading import check_values, run_sized

_Item = TypeVar("_Item")


class _FirstError(FailFast):
    """Pydantic's FailFast with a hash, which a part of a union needs."""

    def __hash__(self) -> int:
        return hash(type(self))


Many = Annotated[list[_Item], _FirstError()]
"""A list of which the first wrong entry is reported, and none of the millions that may follow."""

_Model = TypeVar("_Model", bound=BaseModel)
_Read = TypeVar("_Read")

# Longest quotation of a wrong value in a message.
MAX_QUOTE = 60
MAX_QUOTE_DEPTH = 8


def param_schema(param: Param) -> dict[str, Any]:
    """The JSON schema of a sampling parameter: null is allowed, and so is one entry in place of a list."""
    form = msgspec.json.schema(param.kind)
    if param.is_number:
        low = "exclusiveMinimum" if param.is_above else "minimum"
        bounds = {low: param.least, "maximum": param.most}
        form |= {word: value for word, value in bounds.items() if math.isfinite(value)}
    forms = [form, {"type": "null"}]
    if "items" in form:
        forms.append(form["items"])
    if param.is_json:
        forms.append({"type": "object"})
    if param.special is not None:
        forms.append({"const": param.special[0]})
    return {"description": param.about, "anyOf": forms}


_SAMPLING: dict[str, Any] = {
    "type": "object",
    "properties": {
        name: param_schema(param) | {"default": param.default} for name, param in PARAMS.items()
    },
    "additionalProperties": False,
}


class Body(BaseModel):
    """Base of every body."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class GenerateBody(Body):
    """``POST /generate``. Null is the same as not given. The values are checked by ``client/intake.py``."""

    text: str | Many[str] | None = Field(None, description="a string or a list of strings")
    input_ids: Many[int] | Many[Many[int]] | None = Field(
        None, description="a list of token ids or a list of such lists"
    )
    sampling_params: dict[str, Any] | Many[dict[str, Any]] | None = Field(
        None,
        description="an object or a list of objects, one per prompt",
        json_schema_extra={
            "anyOf": [_SAMPLING, {"type": "array", "items": _SAMPLING}, {"type": "null"}]
        },
    )
    lora_path: str | Many[str | None] | None = Field(
        None,
        description="an adapter's name, null (the base model) or a list of them, one per prompt",
    )
    stream: bool | None = Field(None, description="true or false")
    rid: str | Many[str] | None = Field(
        None, description="a string or a list of strings, one per prompt"
    )
    return_logprob: bool | Many[bool | None] | None = Field(
        None, description="true, false or a list of them, one per prompt"
    )
    logprob_start_len: int | Many[int | None] | None = Field(
        None, description="an integer or a list of integers, one per prompt"
    )
    top_logprobs_num: int | Many[int | None] | None = Field(
        None, description="an integer or a list of integers, one per prompt"
    )
    return_text_in_logprobs: bool | None = Field(None, description="true or false")


class AbortBody(Body):
    """``POST /abort_request``."""

    rid: str | None = Field(None, description="a string")
    abort_all: bool = Field(default=False, description="true or false")


class NamedAdapterBody(Body):
    """``POST /v1/unload_lora_adapter``, as vLLM has it."""

    lora_name: str = Field(min_length=1, description="a string that is not empty")


class LoadAdapterBody(NamedAdapterBody):
    """``POST /load_lora_adapter``."""

    lora_path: str = Field(min_length=1, description="a directory, a hub id or a URL")
    pinned: bool = Field(default=False, description="true or false")


class UnloadAdapterBody(NamedAdapterBody):
    """``POST /unload_lora_adapter``."""

    timeout: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="a number of seconds, at least 0"
    )


class LoadTensorsBody(NamedAdapterBody):
    """``POST /load_lora_adapter_from_tensors``."""

    config_dict: dict[str, Any] = Field(description="the object of an adapter_config.json")
    tensors: str = Field(
        min_length=1,
        description="a safetensors file in base64 (serialized_tensors, a pickle, is never read)",
    )
    pinned: bool = Field(default=False, description="true or false")
    added_tokens_config: None = Field(
        None, description="null or left out: added tokens are not supported"
    )


class InplaceLoadBody(NamedAdapterBody):
    """``POST /v1/load_lora_adapter``, as vLLM has it."""

    lora_path: str = Field(min_length=1, description="a directory, a hub id or a URL")
    load_inplace: bool = Field(default=False, description="true or false")
    is_3d_lora_weight: Literal[False] | None = Field(
        None, description="false or left out: such weights are not supported"
    )


def parse_body(model: type[_Model], data: bytes) -> _Model:
    """Read a JSON body.

    Raises:
        RequestError: it is not JSON, not an object, has too many values, or a field has the wrong type.
    """
    check_values(data)
    try:
        value: object = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object; got {quote(value)}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        # A union reports each of its members; the deepest report is about the member that the client meant.
        raise _refusal(model, max(error.errors(include_url=False), key=_depth)) from None


async def read_large(data: bytes, read: Callable[[bytes], _Read]) -> _Read:
    """Call ``read(data)``, for a large body on a thread, so that other requests need not wait for it."""
    return await run_sized(len(data), partial(read, data))


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The ``openapi_extra`` of a route whose body :func:`parse_body` reads."""
    schema = model.model_json_schema()
    schema = _inline(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    """Replace references by what they point to: inside an OpenAPI document they would point to nowhere."""
    if isinstance(schema, list):
        return [_inline(item, definitions) for item in cast(list[Any], schema)]
    if not isinstance(schema, dict):
        return schema
    parts = cast(dict[str, Any], schema)
    if "$ref" in parts:
        return _inline(definitions[parts["$ref"].rpartition("/")[2]], definitions)
    return {name: _inline(item, definitions) for name, item in parts.items()}


def _depth(error: ErrorDetails) -> int:
    return len(error["loc"])


def _refusal(model: type[BaseModel], error: ErrorDetails) -> RequestError:
    if error["type"] == "extra_forbidden":
        path = ".".join(map(str, error["loc"]))[:MAX_QUOTE]
        return RequestError(f"{path}: there is no such field here; remove it", path)
    name = str(error["loc"][0])
    field = model.model_fields.get(name)
    allowed = field.description if field else None
    # Integers of the path are positions in lists; its strings after the first name members of unions.
    where = (name, *(part for part in error["loc"][1:] if isinstance(part, int)))
    if error["type"] == "missing":
        return RequestError.about(where, f": is required; it must be {allowed}")
    return RequestError.about(where, f": must be {allowed}; got {quote(error['input'])}")


def quote(value: object) -> str:
    """A value of a body as a message shows it: the beginning of its JSON, whatever its size."""
    text = orjson.dumps(_beginning(value, MAX_QUOTE_DEPTH)).decode()
    return text if len(text) <= MAX_QUOTE else text[:MAX_QUOTE] + "…"


def _beginning(value: object, depth: int) -> object:
    """As much of a value as a message can show."""
    if isinstance(value, str):
        return value[: MAX_QUOTE + 1]
    if not isinstance(value, list | dict):
        return value
    if not depth:
        return "…"
    if isinstance(value, list):
        items = cast(list[object], value)
        return [_beginning(item, depth - 1) for item in islice(items, MAX_QUOTE)]
    fields = islice(cast(dict[str, object], value).items(), MAX_QUOTE)
    return {name[:MAX_QUOTE]: _beginning(item, depth - 1) for name, item in fields}
