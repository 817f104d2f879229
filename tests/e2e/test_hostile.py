"""Hostile requests, and merely large ones, beside a neighbour who asks for one token again and again.

Whatever comes, the server lives, the neighbour's slowest answer and the stream's longest pause are below two seconds on
two cores, all processes together stay below a gigabyte, nothing strange is in the log, and a refusal has a reason. A case
is one line of a list in ``tests/e2e/hostile``: a name, the request, what the reason says, and the statuses of right
answers (400 unless given).

    pytest tests/e2e/test_hostile.py -k ebnf            # some cases
    pytest tests/e2e/test_hostile.py -m slow            # those that take long also if all is well
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.e2e.hostile import adapters, grammars, requests
from tests.support.hostile import SERVED, Case, HostileServer, Reply, send
from tests.support.hostile_calls import chat, format_of, generate, tokens

CASES = [
    *(grammars.EBNF + grammars.REGEX + grammars.SCHEMAS),
    *(requests.MANY + requests.TEXTS + requests.VALUES + requests.NAMES),
    *(adapters.TEMPLATES + adapters.CONFIGS + adapters.WEIGHTS),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostileServer]:
    with HostileServer(tmp_path_factory.mktemp("hostile")) as server:
        yield server


def test_names_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else [])
        for case in CASES
    ],
)
def test_nobody_else_notices(server: HostileServer, case: Case) -> None:
    assert server.problems_of(case) == []


def test_a_caller_gets_their_own_answer_whatever_ids_others_choose(server: HostileServer) -> None:
    """An id that another call has just left, and one that is taken while a call waits for it."""

    def ask(token: int, rid: str | list[str]) -> Reply:
        prompts = [token] if isinstance(rid, str) else [[token]] * len(rid)
        return send(server.port, tokens(prompts, {"rid": rid}, temperature=0), 20)

    found: list[str] = []
    with server.watched(found):
        right = {token: answers(ask(token, f"own-{token}")) for token in (500, 700, 900)}
        for number in range(20):
            gone = {"rid": f"gone-{number}"}
            body = generate("word " * 1000, gone, max_new_tokens=900, ignore_eos=True)
            send(server.port, body, 0.1)
            with ThreadPoolExecutor(3) as pool:
                ids: dict[int, str | list[str]] = {
                    500: [f"a-{number}", f"gone-{number}"],
                    700: f"a-{number}",
                    900: [f"gone-{number}"],
                }
                replies = {token: pool.submit(ask, token, rid) for token, rid in ids.items()}
            for token, future in replies.items():
                reply = future.result()
                # An id that is taken may be refused; what is answered has to be one's own.
                if reply.status not in (200, 400) or (
                    reply.status == 200 and set(answers(reply)) != set(right[token])
                ):
                    found.append(f"{token} got {reply.status}: {reply.text[:200]}")
    assert found == []


def answers(reply: Reply) -> list[tuple[int, ...]]:
    """The tokens of each answer."""
    value = json.loads(reply.body)
    return [tuple(item["output_ids"]) for item in (value if isinstance(value, list) else [value])]


@pytest.mark.slow
def test_new_schemas_do_not_fill_the_memory(server: HostileServer) -> None:
    def schema(number: int) -> object:
        names = [f"field_{number}_{i}" for i in range(60)]
        properties = {name: {"type": "string", "maxLength": 20} for name in names}
        return {"type": "object", "properties": properties, "required": names}

    found: list[str] = []
    end = time.monotonic() + 200
    with server.watched(found):
        for number in range(3000):
            call = chat(response_format=format_of(schema(number)), max_tokens=1)
            reply = send(server.port, call, 30)
            if reply.status != 200:
                found.append(f"schema {number} got {reply.status}: {reply.text[:200]}")
            if found or time.monotonic() > end:
                break
    assert found == []


def test_the_harness_sees_what_goes_wrong(server: HostileServer) -> None:
    """A status, a reason, a client that waits in vain: each is told."""
    unknown = Case("unknown", lambda: generate(fields={"lora_path": "nobody"}), "xyz", SERVED)
    problems = server.problems_of(unknown)
    assert len(problems) == 1
    assert "got 400" in problems[0]
    other = Case("unknown", lambda: generate(fields={"lora_path": "nobody"}), "xyz")
    assert "does not say 'xyz'" in server.problems_of(other)[0]
    endless = partial(generate, max_new_tokens=2000, ignore_eos=True)
    late = Case("late", endless, "", SERVED, seconds=0.05)
    assert "no answer within" in server.problems_of(late)[0]
