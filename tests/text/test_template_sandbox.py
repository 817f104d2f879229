"""Templates of strangers: what they may take, and that none sees anything of another."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorikeet.errors import AdapterError, RequestError
from lorikeet.text.template_sandbox import LIMITS, MAX_TEMPLATE, NUM_WORKERS, TemplateSandbox

pytestmark = pytest.mark.anyio

# Busy machines are slow: what fails here fails for its processor time or its memory, not for the time on the wall.
PATIENT = replace(LIMITS, wall_seconds=60.0)
SPIN = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
FILE = Path("/adapter/chat_template.jinja")


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def sandbox() -> AsyncIterator[TemplateSandbox]:
    made = TemplateSandbox(PATIENT)
    yield made
    made.close()


async def render(sandbox: TemplateSandbox, source: str, most: int = 10_000, **context: Any) -> str:
    return await sandbox.render(source, context, whose="the chat template of 'x'", most=most)


def pids(sandbox: TemplateSandbox) -> set[int]:
    return {worker.pid for worker in sandbox._sandbox._idle}


async def test_renders(sandbox: TemplateSandbox) -> None:
    source = "{% for m in messages %}[{{ m.content | upper }}]{% endfor %}{{ n }}"
    messages = [{"content": "é"}, {"content": "b"}]
    assert await render(sandbox, source, messages=messages, n=None) == "[É][B]None"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (SPIN, "it takes more than 1 s of processor time"),
        ("{{ 3**(10**7*2) }}", "it takes more than 1 s of processor time"),
        ("{{ lipsum(n=200000) | length }}", "it takes more than 1 s of processor time"),
        ("{{ 'a' * 2000000000 }}", "it takes more than 256 MB of memory"),
        ("{{ 'x' | center(2000000000) }}", "it takes more than 256 MB of memory"),
        ("{{ '%1000000000d' | format(1) }}", "it takes more than 256 MB of memory"),
        ("{{ 'x' * n * n }}", "makes 90,000 characters of these messages; allowed: 10,000"),
        ("{{ '\\ud800' }}", "holds half of a surrogate pair"),
        ("{{ '\\ud800'.nothing.at_all }}", "cannot render"),
        ("{% for %}", "cannot render"),
        ("{{" * 50_000, "recursion depth"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
async def test_what_takes_too_much_is_an_error_of_the_request(
    sandbox: TemplateSandbox, source: str, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        await render(sandbox, source, n=300)
    assert caught.value.param == "messages"
    if "takes" in words:
        assert str(caught.value).startswith("the chat template of 'x' cannot be used: ")
    assert await render(sandbox, "{{ n }}", n=1) == "1"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ 3**(10**7*2) }}", "cannot be used: it takes more than 1 s of processor time"),
        ("{{ 'a' * 100000000 }}", "cannot be used: it takes more than 256 MB of memory"),
        ("a\n{% for %}", "cannot be used: line 2"),
        ("(" * (MAX_TEMPLATE + 1), "have 262,152 characters; allowed: 262,144"),
        ("{{" * 50_000, "cannot be used: maximum recursion depth"),
    ],
)
async def test_what_does_not_compile(sandbox: TemplateSandbox, source: str, words: str) -> None:
    with pytest.raises(AdapterError, match=words) as caught:
        await asyncio.to_thread(sandbox.read, FILE, source.encode(), is_config=False)
    assert str(caught.value).startswith(f"{FILE}: the chat template")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"chat_template": "\ud800"}, "the chat template holds half of a surrogate pair"),
        (
            {"chat_template": [{"name": "\ud800", "template": "x"}]},
            "the name of a chat template holds half of a surrogate pair",
        ),
        ({"chat_template": 5}, "chat_template should be a string or a list"),
        ([], "should hold a JSON object"),
    ],
)
async def test_configurations(sandbox: TemplateSandbox, config: object, words: str) -> None:
    data = json.dumps(config).encode()
    with pytest.raises(AdapterError, match=words) as caught:
        await asyncio.to_thread(sandbox.read, FILE, data, is_config=True)
    str(caught.value).encode()
    assert str(caught.value).startswith(f"{FILE}")


async def test_deep_json_is_refused(sandbox: TemplateSandbox) -> None:
    with pytest.raises(AdapterError, match="is not valid JSON"):
        await asyncio.to_thread(sandbox.read, FILE, b"[" * 10**6, is_config=True)


async def test_refusals_do_not_cost_a_worker(sandbox: TemplateSandbox) -> None:
    await render(sandbox, "x")
    known = pids(sandbox)
    with pytest.raises(RequestError):
        await render(sandbox, "{{ raise_exception('no') }}")
    assert pids(sandbox) == known


async def test_nothing_is_left_for_the_next_template(sandbox: TemplateSandbox) -> None:
    """Whatever a template can set or change: the next one, in the same worker, sees what a fresh one would."""
    mark = [
        "{% set leak = 1 %}{% set range = 2 %}{% set dict = 3 %}{{ leak }}",
        "{% macro leak() %}x{% endmacro %}{{ leak() }}",
        "{% set ns = namespace(leak=1) %}{% set ns.leak = 2 %}{{ ns.leak }}",
        "{% set c = cycler('a', 'b') %}{{ c.next() }}",
        "{% set j = joiner() %}{{ j() }}",
        "{{ messages[0].pop('content') if false else '' }}",
        "{% set dict.leak = 1 %}",
        "{% set cycler.leak = 1 %}",
        "{% set namespace.leak = 1 %}",
        "{% set lipsum.leak = 1 %}",
        "{{ namespace.__init__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ dict.update({}) }}",
        "{{ ({}).update({1: 2}) }}",
        "{% do messages.append(1) %}",
    ]
    look = (
        "{{ leak is defined }}{{ ns is defined }}{{ range(2) | list }}{{ dict(a=1) }}{{ messages }}"
        "{% set c = cycler('a', 'b') %}{{ c.next() }}{% set j = joiner() %}{{ j() }}"
        "{{ dict.leak is defined }}{{ cycler.leak is defined }}{{ namespace.leak is defined }}{{ lipsum.leak is defined }}"
    )
    fresh = await render(sandbox, look, messages=[{"content": "hi"}])
    assert fresh == "FalseFalse[0, 1]{'a': 1}[{'content': 'hi'}]aFalseFalseFalseFalse"
    for source in mark:
        known = pids(sandbox)
        with contextlib.suppress(RequestError):
            await render(sandbox, source, messages=[{"content": "secret"}])
        assert await render(sandbox, look, messages=[{"content": "hi"}]) == fresh
        assert pids(sandbox) == known


async def test_a_slow_template_delays_no_other(sandbox: TemplateSandbox) -> None:
    slow = TemplateSandbox(replace(LIMITS, wall_seconds=120, cpu_seconds=100))
    try:
        jobs = [asyncio.create_task(render(slow, SPIN)) for _ in range(2 * NUM_WORKERS)]
        assert await render(slow, "quick") == "quick"
        assert not any(job.done() for job in jobs)
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        # Their workers are free again: as many other slow ones begin, and one more waits for none of them.
        others = [asyncio.create_task(render(slow, SPIN + "x")) for _ in range(2)]
        async with asyncio.timeout(60):
            assert await render(slow, SPIN.replace("99999", "9")) == ""
        for job in others:
            job.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    finally:
        slow.close()


async def test_facts(sandbox: TemplateSandbox) -> None:
    source = (
        "{% if tools %}{{ message.role == 'tool' }}{% endif %}{{ 'a' * 0 }}{{ '"
        + "w" * 500
        + "' }}"
    )
    facts = await sandbox.facts(source, "x")
    assert facts.reads_tools
    assert facts.knows("tool")
    assert not facts.joins_arguments
    assert max(map(len, facts.words)) <= 100
    assert await sandbox.facts(source, "x") is facts
    assert not (await sandbox.facts("{{" * 50_000, "x")).reads_tools
