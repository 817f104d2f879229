"""Errors of requests: fields are facts, and the sentence has the names of the API that is used."""

from __future__ import annotations

import msgspec

from lorikeet.core.failure import Failure
from lorikeet.errors import ContextLengthError, RequestError

NAMES = {"max_new_tokens": "max_tokens", "text": "prompt"}
TOO_MANY = (("sampling_params", 2, "max_new_tokens"), " is 'sampling_params.text'")


def test_a_sentence_begins_with_the_path_of_its_field() -> None:
    error = RequestError.about(*TOO_MANY)
    assert str(error) == "sampling_params[2].max_new_tokens is 'sampling_params.text'"
    assert error.param == "max_new_tokens"
    assert RequestError.about(("text", 3), " is 3").param == "text"
    assert RequestError.about(("sampling_params", 1), " is 3").param == "sampling_params"
    assert RequestError("the body is empty").param is None


def test_only_fields_are_renamed() -> None:
    error = RequestError.about(("sampling_params", "max_new_tokens"), " is 'sampling_params.text'")
    error.rename(NAMES)
    assert str(error) == "max_tokens is 'sampling_params.text'"
    assert error.param == "max_tokens"
    error = RequestError.about("the prompt is larger than ", ("max_new_tokens",), param="text")
    error.prefix("prompt 3: ")
    error.rename(NAMES)
    assert str(error) == "prompt 3: the prompt is larger than max_tokens"
    assert error.param == "prompt"
    error = RequestError.about(("text", 1), " is empty")
    error.rename(NAMES)
    assert str(error) == "prompt[1] is empty"


def test_fields_cross_the_process_boundary() -> None:
    sent = Failure.of(RequestError.about(("sampling_params", "max_new_tokens"), ": too many"))
    assert sent.message == "sampling_params.max_new_tokens: too many"
    error = msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=Failure).error()
    assert isinstance(error, RequestError)
    error.rename(NAMES)
    assert (str(error), error.param) == ("max_tokens: too many", "max_tokens")
    assert Failure.of(ContextLengthError("too long")).words is None
