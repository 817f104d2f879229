"""Messages hold values of strangers: each can be sent, and what cannot be read says for whom it was."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikeet.core.commands import LoadAdapterFromTensors, UnloadAdapter
from lorikeet.core.failure import Failure
from lorikeet.core.messages import (
    AdapterTemplates,
    Ask,
    Outputs,
    Reply,
    Submit,
    Unreadable,
    decode_to_client,
    decode_to_engine,
    encode,
)
from lorikeet.core.request import FinishReason, Request, RequestOutput, SamplingParams
from lorikeet.core.views import AdapterDetail


def load(value: object) -> Ask:
    return Ask(1, LoadAdapterFromTensors("x", config={"value": value}, weights="/x"))


def arrived(value: object) -> Any:
    """What arrives of a value in an adapter's configuration."""
    message = decode_to_engine(encode(load(value)))
    assert isinstance(message, Ask)
    assert isinstance(message.command, LoadAdapterFromTensors)
    return message.command.config["value"]


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        ("a\ud800b", "a\ufffdb"),
        ("\ud83d\ude00", "\U0001f600"),  # JSON's way to write one character
        ({"\udfff": ["\ud800"]}, {"\ufffd": ["\ufffd"]}),
        (2**64 - 1, 2**64 - 1),
        (10**59, str(10**59)),
        (-(2**63) - 1, str(-(2**63) - 1)),
        ([2**99999], ["<an integer of 100000 bits>"]),
        ({2**70: 1}, {str(2**70): 1}),
        ({1, 2}, [1, 2]),
        (object(), "<object>"),
        ({("a", "\ud800"): 1}, {"<tuple>": 1}),
        ([None, True, 1.5, b"\xff", ("\ud800",)], [None, True, 1.5, b"\xff", ["\ufffd"]]),
    ],
)
def test_every_value_has_a_form(value: object, arrives: object) -> None:
    assert arrived(value) == arrives


def test_nesting_is_cut_off_where_it_cannot_be_followed() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    found = arrived(deep)
    depth = 0
    while isinstance(found, list):
        found, depth = found[0], depth + 1
    assert (found, depth > 100) == ("…", True)


def test_the_other_parts_of_a_message_stay_what_they_are() -> None:
    sampling = SamplingParams(json_schema='{"\ud800": 1}', stop=("a",), logit_bias={3: 1.0})
    request = Request(prompt_token_ids=[1, 2], sampling=sampling)
    submit = decode_to_engine(encode(Submit.of(5, [request])))
    assert isinstance(submit, Submit)
    assert submit.ids == range(5, 6)
    (found,) = submit.requests()
    assert found.sampling.json_schema == '{"\ufffd": 1}'
    assert found.sampling.logit_bias == {3: 1.0}
    assert found.prompt_token_ids == [1, 2]
    finish = FinishReason(kind="abort", failure=Failure("refused", "\ud800"))
    ends = Outputs([RequestOutput(id=number, token_ids=[7], finish=finish) for number in (3, 4)])
    back = decode_to_client(encode(ends))
    assert isinstance(back, Outputs)
    assert [(o.id, o.token_ids, o.finish and o.finish.message) for o in back.outputs] == [
        (3, [7], "\ufffd"),
        (4, [7], "\ufffd"),
    ]
    news = decode_to_client(encode(AdapterTemplates({"a": {"\ud800": "x"}, "b": None})))
    assert news == AdapterTemplates({"a": {"\ufffd": "x"}, "b": None})


plain = st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.binary()
texts = st.text(st.characters(codec=None))  # lone surrogates, too
values = st.recursive(
    plain | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts | st.integers(), inner),
    max_leaves=20,
)


@given(values)
def test_any_value_can_be_sent_in_both_directions(value: object) -> None:
    view = AdapterDetail(name="x", path="/x", state="loaded", pinned=False, report={"value": value})
    assert isinstance(decode_to_client(encode(Reply(1, [view]))), Reply)
    assert isinstance(decode_to_engine(encode(load(value))), Ask)


def test_what_cannot_be_read_says_for_whom_it_was() -> None:
    wrong: Any = "no tokens"
    wrong_name: Any = 5
    request = Request(prompt_token_ids=wrong, sampling=SamplingParams(n=2))
    found = decode_to_engine(encode(Submit.of(5, [request])))
    assert isinstance(found, Unreadable)
    assert (found.ids, found.command) == ([5, 6], None)
    assert "prompt_token_ids" in found.reason
    found = decode_to_engine(encode(Ask(7, UnloadAdapter(name=wrong_name))))
    assert isinstance(found, Unreadable)
    assert (found.ids, found.command) == ([], 7)
    dance = msgspec.msgpack.encode({"type": "Ask", "id": 7, "command": {"type": "Dance"}})
    found = decode_to_engine(dance)
    assert isinstance(found, Unreadable)
    assert (found.ids, found.command) == ([], 7)
    assert "Dance" in found.reason
    found = decode_to_client(encode(Outputs([RequestOutput(id=8, token_ids=wrong)])))
    assert isinstance(found, Unreadable)
    assert found.ids == [8]


@pytest.mark.parametrize(
    "data", [b"", b"\x01", b"\xc1", b"\x91" * 100_000, b"\x80", b"\x81\xa2id\xc0"]
)
def test_bytes_that_are_no_message_tell_nothing(data: bytes) -> None:
    for decode in (decode_to_engine, decode_to_client):
        found = decode(data)
        assert isinstance(found, Unreadable)
        assert (found.ids, found.command) == ([], None)
