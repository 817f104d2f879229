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
from typing import Literal, Self

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

    Args:
        message: what is wrong and what is allowed. Fields stand in it as paths, so that it can be shown with the names of
            whichever API the client uses, and nobody has to look for them in a text.
        param: the field's name as the client wrote it, if one field is to blame.
    """

    def __init__(self, message: str | Words, param: str | None = None) -> None:
        super().__init__(message)
        # What has crossed a process boundary may have lists in place of tuples.
        pieces = (message,) if isinstance(message, str) else message
        self.words: Words = tuple(item if isinstance(item, str) else tuple(item) for item in pieces)
        self.param = param

    @classmethod
    def about(cls, *words: str | Field, param: str | None = None) -> Self:
        """An error whose message is in pieces; ``param`` is the field with which it begins, unless it is given."""
        if param is None and not isinstance(words[0], str):
            names = [part for part in words[0] if isinstance(part, str)]
            param = names[1] if names[0] == SAMPLING and len(names) > 1 else names[0]
        return cls(words, param)

    def __str__(self) -> str:
        return "".join(item if isinstance(item, str) else field_name(item) for item in self.words)

    @property
    def names_fields(self) -> bool:
        return any(not isinstance(item, str) for item in self.words)

    def prefix(self, text: str) -> None:
        """Say first what else it is about: "prompt 3: "."""
        self.words = (text, *self.words)

    def rename(self, names: Mapping[str, str]) -> None:
        """Use the names of an API in which sampling parameters are fields of the body: native name -> its own."""

        def renamed(field: Field) -> Field:
            start = 1 if field[0] == SAMPLING and field[1:] else 0
            return names.get(str(field[start]), field[start]), *field[start + 1 :]

        self.words = tuple(item if isinstance(item, str) else renamed(item) for item in self.words)
        self.param = None if self.param is None else names.get(self.param, self.param)


def field_name(field: Field) -> str:
    """A path as text: ``sampling_params[2].stop``."""
    names = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in field)
    return "".join(names).removeprefix(".")


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
