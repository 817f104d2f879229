"""From an exception to what crosses the process boundary, and back."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from lorikeet import errors
from lorikeet.core.failure import STATUS_CODES, Failure
from lorikeet.errors import (
    AdapterError,
    AdapterNotFoundError,
    ContextLengthError,
    EngineFault,
    ErrorKind,
    LorikeetError,
    UserError,
)

KINDS: list[type[LorikeetError]] = [getattr(errors, name) for name in errors.__all__]


def test_every_kind_has_a_status() -> None:
    assert set(STATUS_CODES) == set(get_args(ErrorKind))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_is_the_same_for_whoever_hears_of_it(kind: type[LorikeetError]) -> None:
    failure = Failure.of(kind("why"))
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(failure), type=Failure)
    error = arrived.error()
    assert str(error) == "why"
    assert isinstance(error, UserError) == issubclass(kind, UserError)
    assert Failure.of(error) == failure


def test_what_it_is_about_comes_along() -> None:
    error = Failure.of(AdapterNotFoundError("no x", "lora_path")).error()
    assert (type(error), error.param) == (AdapterNotFoundError, "lora_path")
    assert Failure.of(ContextLengthError("long")).error().code == "context_length_exceeded"
    assert Failure.of(AdapterError("taken", code="odd")).error().code == "odd"


def test_what_nobody_raised_on_purpose_is_a_fault_of_ours() -> None:
    failure = Failure.of(KeyError("x"))
    assert failure == Failure("failed", "KeyError: 'x'")
    assert type(failure.error()) is EngineFault
    assert failure.status_code == 500
