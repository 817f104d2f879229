"""What went wrong, in the form that crosses the process boundary.

An exception becomes a :class:`Failure` in :meth:`Failure.of` and an exception again in :meth:`Failure.error`. The HTTP
status of either is looked up in :data:`STATUS_CODES` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from lorikeet.errors import (
    AdapterNotFoundError,
    EngineDeadError,
    EngineFault,
    ErrorKind,
    LorikeetError,
    RequestError,
    UnavailableError,
    UserError,
    Words,
)

STATUS_CODES: dict[ErrorKind, int] = {
    "refused": 400,
    "not_found": 404,
    "too_slow": 408,
    "too_large": 413,
    "failed": 500,
    "dead": 503,
    "unavailable": 503,
}
"""Kind of an error -> HTTP status. It stands here and not in the server, since replies of :class:`lorikeet.LLM` have it too."""

_FAULTS: dict[str, Callable[[str], EngineFault]] = {
    "failed": EngineFault,
    "dead": EngineDeadError,
    "unavailable": UnavailableError,
}


FailureKind = ErrorKind | Literal["aborted"]


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a completion or a command did not come to its end.

    Attributes:
        kind: of the error; ``aborted`` is no error: somebody asked for the end.
        param: the field that is to blame, if a single one is.
        code: tells this error from others of its kind, for clients that look for it.
        words: the message in pieces, if it names fields of the request: an API may have other names for them.
    """

    kind: FailureKind
    message: str
    param: str | None = None
    code: str | None = None
    words: Words | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """An exception, which is a fault of ours unless it was raised on purpose."""
        if isinstance(error, LorikeetError):
            words = error.words if isinstance(error, RequestError) and error.names_fields else None
            return cls(error.kind, str(error), error.param, error.code, words)
        return cls("failed", f"{type(error).__name__}: {error}")

    @property
    def status_code(self) -> int | None:
        """The HTTP status; None if it is no error."""
        return None if self.kind == "aborted" else STATUS_CODES[self.kind]

    def error(self) -> UserError | EngineFault:
        """The exception to raise for it."""
        if self.kind in _FAULTS:
            return _FAULTS[self.kind](self.message)
        kind = AdapterNotFoundError if self.kind == "not_found" else RequestError
        error = kind(self.words or self.message, self.param)
        error.code = self.code
        return error
