"""From exceptions to HTTP errors, whose statuses are in the table of ``core/failure.py``, and the body that every error has.

The body is OpenAI's (``{"error": {"message", "type", "param", "code"}}``); clients of the native API read ``message``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lorikeet.core.failure import STATUS_CODES
from lorikeet.errors import EngineFault, RequestError, UnavailableError, UserError
from lorikeet.masking import shortened
from lorikeet.server.replies import JSONReply

ErrorBody = dict[str, dict[str, Any]]

# What nginx logs for a client that left before its answer; nobody receives it.
CLIENT_CLOSED_REQUEST = 499
# Seconds, for refusals whose reason passes. Clients of the field wait that long and try again, up to their own limit.
RETRY_AFTER = {"Retry-After": "1"}

# Characters of a path that an error repeats.
MAX_SHOWN_PATH = 200

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "method_not_allowed_error",
    408: "request_timeout_error",
    413: "request_too_large_error",
    415: "unsupported_media_type_error",
}


class ModelNotFoundError(RequestError):
    """A model's id that is neither the base nor an adapter."""

    kind = "not_found"
    code = "model_not_found"


def error_body(
    message: str, status: int, *, param: str | None = None, code: str | None = None
) -> ErrorBody:
    """The body of an error with the HTTP status ``status``."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: UserError | EngineFault) -> tuple[int, ErrorBody]:
    """Status and body of an exception raised on purpose."""
    status = STATUS_CODES[error.kind]
    return status, error_body(str(error), status, param=error.param, code=error.code)


def error_response(
    message: str, status: int, *, headers: Mapping[str, str] | None = None
) -> JSONReply:
    return JSONReply(error_body(message, status), status_code=status, headers=headers)


def install(app: FastAPI) -> None:
    """Answer every exception of a route with the body above.

    The handlers are coroutines, or Starlette would give each refusal to its pool of threads.
    """
    app.exception_handler(UserError)(_on_own)
    app.exception_handler(EngineFault)(_on_own)
    app.exception_handler(HTTPException)(_on_http)
    app.exception_handler(RecursionError)(_on_recursion)
    app.exception_handler(ClientDisconnect)(_on_disconnect)
    # Starlette's outermost layer calls this one and then raises the exception again, so uvicorn logs its traceback.
    app.exception_handler(Exception)(_on_unexpected)


async def _on_own(request: Request, error: UserError | EngineFault) -> Response:
    status, body = describe(error)
    headers = RETRY_AFTER if isinstance(error, UnavailableError) else None
    return JSONReply(body, status_code=status, headers=headers)


async def _on_http(request: Request, error: HTTPException) -> Response:
    message, headers = error.detail, error.headers
    if error.status_code == 404:
        message = f"there is no {shortened(request.url.path, MAX_SHOWN_PATH)}"
    elif error.status_code == 405:
        # A route keeps its methods in a set.
        allowed = ", ".join(sorted((headers or {}).get("Allow", "another method").split(", ")))
        headers = {"Allow": allowed}
        path = request.url.path[:MAX_SHOWN_PATH]
        message = f"{request.method} {path} is not allowed; allowed: {allowed}"
    return error_response(message, error.status_code, headers=headers)


async def _on_recursion(request: Request, error: Exception) -> Response:
    """Nothing here calls itself but what walks over a body."""
    return error_response(
        "the body is nested too deeply; allowed: a few hundred levels in any field", 400
    )


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_unexpected(request: Request, error: Exception) -> Response:
    return error_response("an error inside the server; its log has the details", 500)
