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

from collections.abc import Mapping
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
    """The adapter cannot be served exactly, so it is not served at all.

    Args:
        code: ``ALREADY_LOADED``, or None.
    """

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


Field = tuple[str | int, ...]
"""Path to a field of a request, by its names in the native API: ``("sampling_params", 2, "stop")``."""

Words = tuple[str | Field, ...]
"""A message in pieces. A path among them is shown as the field's name, which depends on the API that the client uses."""

SAMPLING = "sampling_params"


class RequestError(UserError):
    """A field of one request is wrong.

    Fields stand in the message as paths; the sentence is made of it when it is shown (``str``), so that :meth:`rename`
    never has to look into a text.

    Args:
        message: what is wrong and what is allowed.
        param: the field's name as the client wrote it, if one field is to blame; unless given, that with which the
            message begins, if it begins with one.
    """

    def __init__(self, message: str | Words, param: str | None = None) -> None:
        super().__init__(message)
        pieces = (message,) if isinstance(message, str) else message
        # What has crossed a process boundary has lists in place of tuples.
        self.words: Words = tuple(
            piece if isinstance(piece, str) else tuple(piece) for piece in pieces
        )
        if param is None and not isinstance(self.words[0], str):
            param = _param(self.words[0])
        self.param = param

    def __str__(self) -> str:
        return "".join(
            piece if isinstance(piece, str) else field_name(piece) for piece in self.words
        )

    @property
    def fields(self) -> list[Field]:
        """The fields that the message names."""
        return [piece for piece in self.words if not isinstance(piece, str)]

    def prefix(self, text: str) -> None:
        """Say first what else it is about: "prompt 3: "."""
        self.words = (text, *self.words)

    def rename(self, names: Mapping[str, str]) -> None:
        """Call the fields as an API does in which sampling parameters are fields of the body.

        Args:
            names: a field's name in the native API -> in that one; a name that is not there is the same.
        """

        def renamed(field: Field) -> Field:
            name, *rest = field[1:] if field[0] == SAMPLING and len(field) > 1 else field
            return names.get(str(name), name), *rest

        self.words = tuple(
            piece if isinstance(piece, str) else renamed(piece) for piece in self.words
        )
        if self.param is not None:
            self.param = names.get(self.param, self.param)


def field_name(field: Field) -> str:
    """A path as text: ``sampling_params[2].stop``."""
    names = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in field)
    return "".join(names).removeprefix(".")


def _param(field: Field) -> str:
    """The name of a path that clients know a field by: without ``sampling_params``, and without places in lists."""
    names = [part for part in field if isinstance(part, str)]
    return names[1] if names[0] == SAMPLING and len(names) > 1 else names[0]


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
