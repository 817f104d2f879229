"""``/openapi.json``: the routes, the bodies that they take and the replies that they give.

Routes read and write bodies by themselves, so FastAPI cannot know their replies; this module is the one place that says.
The schema of a reply that is a Struct follows from the Struct. An endpoint that is not in :data:`REPLIES` promises
nothing about its reply.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from lorikeet.core.views import AdapterDetail, AdapterView, EngineInfo
from lorikeet.server.adapters import Loaded
from lorikeet.server.health import Flushed, ModelInfo, Status

Schema = dict[str, Any]

_JSON, _EVENTS, _TEXT = "application/json", "text/event-stream", "text/plain"


def _schema(kind: str) -> Schema:
    """A type's name, with ``?`` behind it if the value may be null."""
    name = kind.removesuffix("?")
    return {"type": [name, "null"]} if kind != name else {"type": name}


def _object(plain: str = "", **others: Schema) -> Schema:
    """An object that has at least these fields: ``name:type`` in ``plain``, where a name alone is a string."""
    pairs = [field.partition(":") for field in plain.split()]
    properties = {name: _schema(kind or "string") for name, _, kind in pairs} | others
    return {"type": "object", "properties": properties, "required": list(properties)}


def _ref(name: str | type[msgspec.Struct]) -> Schema:
    """The schema of a Struct, which stands among the document's components."""
    return {"$ref": f"#/components/schemas/{name if isinstance(name, str) else name.__name__}"}


def _components() -> dict[str, Schema]:
    """Schemas of the Structs that replies are made of, all of whose fields are always there."""
    structs = (AdapterView, AdapterDetail, EngineInfo, ModelInfo, Status, Flushed, Loaded)
    _, schemas = msgspec.json.schema_components(structs, ref_template=_ref("{name}")["$ref"])
    for schema in schemas.values():
        schema["description"] = schema["description"].partition("\n")[0]
        schema["required"] = list(schema["properties"])
    return {"Error": ERROR, **schemas}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


ERROR = _object(error=_object("message type param:string? code:string?"))
_VLLM_ERROR = _object(error=_object("message type param:string? code:integer"))
_LOADED = _ref(Loaded)
_META = _object(
    "id finish_reason:object? prompt_tokens:integer completion_tokens:integer cached_tokens:integer"
    " e2e_latency:number? lora_name:string?"
)
_COMPLETION = _object("text", output_ids=_list(_schema("integer")), meta_info=_META)
_USAGE = _object("prompt_tokens:integer completion_tokens:integer total_tokens:integer")
_CHOICE = "index:integer logprobs:object? finish_reason"
_MESSAGE = _object("role content:string?")
_CARD = _object("id object created:integer owned_by root parent:string? max_model_len:integer")
_SERVER = {
    "allOf": [
        _ref(EngineInfo),
        _object("adapters:object", internal_states=_list(_schema("object"))),
    ]
}
# Of each event: OpenAPI before 3.2 has no word for what a stream consists of, and readers take the schema for that.
_EVENT = _object("data")


def _openai(choice: Schema) -> Schema:
    return _object("id object created:integer model", choices=_list(choice), usage=_USAGE)


_VECTOR = _object(
    "object index:integer",
    embedding={"oneOf": [_list(_schema("number")), _schema("string")]},
)
REPLIES: dict[str, Schema] = {
    "/generate": {"oneOf": [_COMPLETION, _list(_COMPLETION)]},
    "/abort_request": _object("aborted:integer"),
    "/load_lora_adapter": _LOADED,
    "/unload_lora_adapter": _LOADED,
    "/load_lora_adapter_from_tensors": _LOADED,
    "/v1/load_lora_adapter": _schema("string"),
    "/v1/unload_lora_adapter": _schema("string"),
    "/v1/adapters": _object("object", data=_list(_ref(AdapterView))),
    "/v1/adapters/{name}": _ref(AdapterDetail),
    "/v1/completions": _openai(_object(f"text {_CHOICE}")),
    "/v1/chat/completions": _openai(_object(_CHOICE, message=_MESSAGE)),
    "/v1/embeddings": _object("id object model", data=_list(_VECTOR), usage=_schema("object")),
    "/v1/models": _object("object", data=_list(_CARD)),
    "/v1/models/{model_id}": _CARD,
    "/health": _ref(Status),
    "/health_generate": _ref(Status),
    "/model_info": _ref(ModelInfo),
    "/get_model_info": _ref(ModelInfo),
    "/server_info": _SERVER,
    "/get_server_info": _SERVER,
    "/flush_cache": _ref(Flushed),
    "/metrics": _schema("string"),
}
"""Path -> body of a 200."""

_STREAMS = ("/generate", "/v1/completions", "/v1/chat/completions")
_TEXTS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/metrics")
# What each refusal means; its body is ERROR, unless the endpoint has a form of its own.
_REFUSALS = {
    "400": "The request cannot be done as it is; the message says what is allowed",
    "401": "The key is missing or wrong",
    "403": "A web page of another origin, or a Host that is not this server",
    "404": "No such model or adapter",
    "408": "The body came too slowly",
    "413": "The body is too large",
    "415": "The body does not say that it is application/json",
    "500": "An error of the server",
    "503": "The engine is gone or does not answer, its queue is full, or the server shuts down",
}
_OF_BODIES = {"400", "408", "413"}
_NOT_FOUND = (
    *_STREAMS[1:],
    "/v1/embeddings",
    "/v1/models/{model_id}",
    "/v1/adapters/{name}",
    _TEXTS[1],
)
_OWN_FORMS = {path: _LOADED for path, reply in REPLIES.items() if reply is _LOADED} | dict.fromkeys(
    _TEXTS[:2], _VLLM_ERROR
)


def install(
    app: FastAPI, *, needs_key: Callable[[str], bool], changing_paths: Collection[str]
) -> None:
    """Let the application describe itself; call it when every route is there.

    Args:
        needs_key: whether a path may answer 401.
        changing_paths: whose bodies have to say that they are JSON.
    """

    def describe() -> Schema:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            # No route has FastAPI check its bodies: what it says of 422 is not so.
            document["components"] = {"schemas": _components()}
            for path, methods in document["paths"].items():
                for method, operation in methods.items():
                    refusals = _refusals(path, operation)
                    if needs_key(path):
                        refusals.add("401")
                    if method == "post":
                        refusals |= {"403", "415"} if path in changing_paths else {"403"}
                    operation["responses"] = _responses(path, refusals)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = describe


def _refusals(path: str, operation: Schema) -> set[str]:
    """The statuses of errors that the operation may answer."""
    found = {"500", "503"}
    if "requestBody" in operation:
        found |= _OF_BODIES
    if path in _NOT_FOUND:
        found.add("404")
    if path in ("/flush_cache", "/v1/adapters/{name}"):
        found.add("400")
    return found


def _responses(path: str, refusals: set[str]) -> Schema:
    kinds = [_TEXT if path in _TEXTS else _JSON, *([_EVENTS] if path in _STREAMS else [])]
    reply = REPLIES.get(path, {})
    success = {kind: {"schema": _EVENT if kind == _EVENTS else reply} for kind in kinds}
    responses: Schema = {"200": {"description": "Done", "content": success}}
    for status in sorted(refusals):
        form = _ref("Error")
        if status in _OF_BODIES or status == "404":
            form = _OWN_FORMS.get(path, form)
        content = {_JSON: {"schema": form}}
        responses[status] = {"description": _REFUSALS[status], "content": content}
    return responses
