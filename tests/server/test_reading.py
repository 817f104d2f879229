"""How much a body may hold, and where it is read."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import orjson
import pytest

from lorikeet.errors import RequestError
from lorikeet.server.reading import HUGE, LARGE, MAX_CONTAINERS, MAX_VALUES, check_values, run_sized
from tests.server.conftest import Api
from tests.server.test_native import message

pytestmark = pytest.mark.anyio

MANY_VALUES = f"the body has more than {MAX_VALUES:,} values; allowed: {MAX_VALUES:,}"
MANY_CONTAINERS = f"more than {MAX_CONTAINERS:,} lists and objects; allowed: {MAX_CONTAINERS:,}"


def listed(items: bytes) -> bytes:
    return b'{"a": [' + items + b"0]}"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        listed(b"1," * (MAX_VALUES - 1)),
        listed(b"[]," * (MAX_CONTAINERS - 2)),
        listed(b'"' + b"," * (2 * MAX_VALUES) + b'",'),
        listed(b'"' + b"[" * (2 * MAX_CONTAINERS) + b'",'),
        listed(b'"' + b'\\",' * MAX_VALUES + b'",' + b'"\\\\",' * 1000),
        listed(b'"' + b"[,x\\\\" * MAX_VALUES + b'",'),
        listed(b'"\xff\xfe' + b"," * (2 * MAX_VALUES) + b'",'),
        b'"' + b"," * (2 * MAX_VALUES),  # what is no JSON is the parser's to refuse
        b'"' + b"," * (2 * MAX_VALUES) + b"\\",
    ],
)
def test_bodies_that_may_be_parsed(data: bytes) -> None:
    check_values(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (listed(b"1," * (MAX_VALUES + 1)), MANY_VALUES),
        (listed(b'"",' * (MAX_VALUES + 1)), MANY_VALUES),
        (listed(b'"\\"[",' * (MAX_VALUES + 1)), MANY_VALUES),
        (b"{" + b'"a":1,' * (MAX_VALUES + 1) + b'"a":1}', MANY_VALUES),
        (listed(b'"' + b",\\\\" * MAX_VALUES + b'",' + b"1," * (MAX_VALUES + 1)), MANY_VALUES),
        (listed(b"[]," * MAX_CONTAINERS), MANY_CONTAINERS),
        (listed(b"{}," * MAX_CONTAINERS), MANY_CONTAINERS),
        (b"[" * (MAX_CONTAINERS + 1), MANY_CONTAINERS),
    ],
)
def test_bodies_of_too_many_values(data: bytes, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        check_values(data)


async def test_a_body_of_too_many_values_is_a_400(api: Api) -> None:
    reply = await api.http.post("/generate", content=b'{"input_ids":[' + b"1," * 2_000_000 + b"1]}")
    assert reply.status_code == 400
    assert MANY_VALUES in message(reply)


async def test_deep_bodies_are_a_400(api: Api) -> None:
    for path in ("/generate", "/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
            for depth in (900, 5_000, 90_000):
                deep = opening * depth + b"1" + closing * depth
                content = (
                    b'{"text":"a","model":"base","prompt":"a","input":"a","messages":' + deep + b"}"
                )
                reply = await api.http.post(path, content=content)
                assert reply.status_code in (200, 400), (path, depth, reply.text[:200])


async def test_what_is_small_is_read_at_once_and_the_rest_on_threads() -> None:
    here = threading.get_ident()
    assert await run_sized(LARGE, threading.get_ident) == here
    large, huge = LARGE + 1, HUGE + 1
    assert await run_sized(large, threading.get_ident) != here
    assert await run_sized(huge, threading.get_ident) != here


async def test_huge_bodies_delay_no_others() -> None:
    gate = threading.Event()
    begun: list[int] = []

    def work(number: int) -> Callable[[], int]:
        def wait() -> int:
            begun.append(number)
            gate.wait(60)
            return number

        return wait

    jobs = [asyncio.create_task(run_sized(HUGE + 1, work(number))) for number in range(5)]
    try:
        for size in (LARGE, HUGE):
            assert await run_sized(size, lambda: "done") == "done"
        assert len(begun) <= 1  # one at a time
        jobs[3].cancel()  # its client has left
        await asyncio.sleep(0)
    finally:
        gate.set()
    results = await asyncio.gather(*jobs, return_exceptions=True)
    assert isinstance(results[3], asyncio.CancelledError)
    assert begun == [0, 1, 2, 4]


def test_the_parser_has_a_bound_on_depth() -> None:
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(b"[" * 5000 + b"]" * 5000)
