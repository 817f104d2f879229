"""A body that is read in pieces gives what ``orjson`` and ``base64`` make of the whole."""

from __future__ import annotations

import base64
import io
import itertools
import json
import struct

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorikeet.errors import RequestError
from lorikeet.server import tensors_body
from lorikeet.server.tensors_body import TensorsBody


def weights(size: int) -> bytes:
    return struct.pack("<Q", 2) + b"{}" + bytes(index * 7 % 256 for index in range(size))


def read(data: bytes, cuts: list[int] | None = None) -> tuple[dict[str, object], bytes]:
    """The rest, parsed, and the tensors."""
    file = io.BytesIO()
    body = TensorsBody(file)
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts or []), len(data)]
    for begin, end in itertools.pairwise(places):
        body.feed(data[begin:end])
    return orjson.loads(body.finish()), file.getvalue()


texts = st.text(st.sampled_from('ab"\\{}[]:, \n/é') | st.characters(codec="utf-8"), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | texts | st.just("tensors"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts | st.just("tensors"), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    before=st.dictionaries(texts.filter(lambda key: key != "tensors"), values, max_size=3),
    after=st.dictionaries(texts.map("z{}".format), values, max_size=3),
    size=st.integers(0, 40),
    ascii_only=st.booleans(),
    spaces=st.sampled_from(["", " ", "\n\t "]),
    slashes=st.booleans(),
    cuts=st.lists(st.integers(0, 10_000), max_size=9),
)
def test_any_body_in_any_pieces(
    before: dict[str, object],
    after: dict[str, object],
    size: int,
    ascii_only: bool,
    spaces: str,
    slashes: bool,
    cuts: list[int],
) -> None:
    sent = weights(size)
    value = {**before, "tensors": "HERE", **after}
    separators = (f"{spaces},{spaces}", f"{spaces}:{spaces}")
    text = json.dumps(value, ensure_ascii=ascii_only, separators=separators)
    encoded = base64.b64encode(sent).decode()
    encoded = encoded.replace("/", "\\/") if slashes else encoded
    text = text.replace('"HERE"', f'"{encoded}"')
    rest, found = read(text.encode(), cuts)
    assert found == sent
    assert rest == {**before, "tensors": "-", **after}


@pytest.mark.parametrize("key", ['"tensors"', '"t\\u0065nsors"', '"\\u0074\\u0065nsors"'])
def test_escapes_of_json(key: str) -> None:
    sent = weights(9)
    encoded = "".join(f"\\u{ord(c):04x}" for c in base64.b64encode(sent).decode())
    data = f'{{"a": "\\\\", {key} : "{encoded}"}}'.encode()
    for cut in range(len(data)):
        assert read(data, [cut, cut + 3])[1] == sent


@pytest.mark.parametrize("value", ["null", "7", "[]", '{"a": "b"}', '""'])
def test_what_is_no_text_is_left_to_the_parser(value: str) -> None:
    rest, found = read(f'{{"tensors": {value}, "x": {{"tensors": "AAAA"}}}}'.encode(), [5, 13, 20])
    assert (rest["tensors"], found) == (json.loads(value), b"")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("AA==AAAA", "is not valid base64: "),
        ("AAA", "is not valid base64: "),
        ("A A=", "is not valid base64: "),
        ("AAAA\\", "is not valid base64: it is no JSON string"),
        ("AAAA\\x41", "is not valid base64: it is no JSON string"),
        ("\\ud800AAA", "is not valid base64: "),
        ("AAAA", "is not a safetensors file"),
        (base64.b64encode(b"PK\x03\x04" + bytes(20)).decode(), "is a pickle"),
        (base64.b64encode(weights(5)[:-6]).decode(), "is not a safetensors file"),
    ],
)
@pytest.mark.parametrize("step", [1, 1000])
def test_what_is_refused(text: str, says: str, step: int) -> None:
    data = f'{{"tensors":"{text}"}}'.encode()
    with pytest.raises(RequestError, match=f"tensors: {says}") as caught:
        read(data, list(range(0, len(data), step)))
    assert caught.value.param == "tensors"


def test_padding_before_the_end_of_the_pieces() -> None:
    data = b'{"tensors":"' + base64.b64encode(weights(0)) + b'AAAA"}'
    assert data.count(b"=")
    with pytest.raises(RequestError, match="is not valid base64"):
        read(data, list(range(len(data))))


def test_tensors_that_are_there_twice() -> None:
    text = base64.b64encode(weights(1)).decode()
    with pytest.raises(RequestError, match="tensors: is there twice"):
        read(f'{{"tensors":"{text}","tensors":"{text}"}}'.encode())


@pytest.mark.parametrize("piece", [b'{"a":"' + b"x" * 999, b"[" * 999, b" " * 999, b"\\" * 999])
@pytest.mark.parametrize("begin", [b"", b'{"a":"'])
def test_everything_else_has_a_limit(
    monkeypatch: pytest.MonkeyPatch, begin: bytes, piece: bytes
) -> None:
    monkeypatch.setattr(tensors_body, "MAX_REST", 10_000)
    body = TensorsBody(io.BytesIO())
    with pytest.raises(RequestError, match="has more than 10000 bytes, the limit"):
        body.feed(begin + piece * 20)


@pytest.mark.parametrize("data", [b"", b"{", b'{"tensors":"AAAA', b'"tensors', b'{"tensors"'])
def test_a_body_that_ends_too_early_is_no_json(data: bytes) -> None:
    body = TensorsBody(io.BytesIO())
    body.feed(data)
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(body.finish())
