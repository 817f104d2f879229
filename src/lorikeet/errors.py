"""Every exception that Lorikeet raises on purpose.

    LorikeetError
    ├── UserError               somebody asked for what cannot be done; the message says what is allowed
    │   ├── ConfigError         a flag, an environment variable or a combination of them
    │   ├── ModelError          a base model that cannot be served: files, architecture, tensors
    │   ├── AdapterError        an adapter that cannot be served exactly
    │   └── RequestError        a field of one request
    │       ├── AdapterNotFoundError   the request names an adapter that is not loaded
    │       ├── ContextLengthError     the prompt does not fit into the context
    │       └── LoRADisabledError      the request names an adapter and LoRA is off
    └── EngineFault             our side failed; not the fault of any request
        ├── EngineDeadError     the engine process is gone
        ├── UnavailableError    no room in the queue, or the server is shutting down: try again later
        └── OutOfMemoryError    an allocation failed in a step

Each class has a ``kind``, and the one table that gives each kind its HTTP status is ``core/failure.py``.
"""

from __future__ import annotations

from typing import Literal

__all__ = [
    "AdapterError",
    "AdapterNotFoundError",
    "ConfigError",
    "ContextLengthError",
    "EngineDeadError",
    "EngineFault",
    "LoRADisabledError",
    "LorikeetError",
    "ModelError",
    "OutOfMemoryError",
    "RequestError",
    "UnavailableError",
    "UserError",
]


ErrorKind = Literal[
    "refused", "not_found", "too_slow", "too_large", "failed", "dead", "unavailable"
]
"""``refused`` cannot be done as it was asked, ``not_found`` names what is not there, and ``too_slow`` and ``too_large`` are
bodies that are not read to their end. ``failed`` is a fault of ours, ``dead`` says that the engine is gone, and what is
``unavailable`` may be tried again."""


class LorikeetError(Exception):
    """Base of every error raised on purpose.

    Attributes:
        kind: what sort of error it is, by which its HTTP status is chosen.
        param: the field that is to blame, as the client wrote it; None if no single one is.
        code: what clients look for to tell this error from others of its kind (OpenAI's name for it, if there is one).
    """

    kind: ErrorKind = "failed"
    param: str | None = None
    code: str | None = None


class UserError(LorikeetError):
    """What was asked for cannot be done; the message names what is wrong and what is allowed."""

    kind = "refused"


class ConfigError(UserError):
    """A flag, a configuration file or an environment variable is wrong."""


class ModelError(UserError):
    """The base model cannot be served: a file is missing, an architecture or tensor is not supported."""


# Code of the error that a name of an adapter is taken.
ALREADY_LOADED = "already_loaded"


class AdapterError(UserError):
    """The adapter cannot be served exactly, so it is not served at all."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class RequestError(UserError):
    """A field of one request is wrong.

    Args:
        message: what is wrong and what is allowed.
        param: the field's name as the client wrote it, if one field is to blame.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class AdapterNotFoundError(RequestError):
    """The request names an adapter that is not loaded."""

    kind = "not_found"


class ContextLengthError(RequestError):
    """The prompt has more tokens than the context."""

    code = "context_length_exceeded"


class LoRADisabledError(RequestError):
    """The request names an adapter, but the server runs without LoRA."""


class EngineFault(LorikeetError):
    """Something on our side failed."""


class EngineDeadError(EngineFault):
    """The engine process has ended; nothing that needs it can succeed."""

    kind = "dead"


class UnavailableError(EngineFault):
    """The request is not taken, or cut off, for a reason that passes: a full queue, a server that shuts down."""

    kind = "unavailable"


def full_queue(num_waiting: int, num_new: int, limit: int) -> str:
    """What a call is told that the queue has no room for, by whichever process notices first."""
    return (
        f"the queue is full: {num_waiting} sequences wait, this request has {num_new}, and "
        f"--max-queued-requests is {limit}; try again later"
    )


class OutOfMemoryError(EngineFault):
    """An allocation failed while a step ran."""
