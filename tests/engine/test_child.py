"""The engine process's loop against a scripted socket: what is said in reply to what, and when it ends."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from lorikeet.core.messages import (
    Abort,
    Accepted,
    Command,
    Outputs,
    Reply,
    Shutdown,
    Stats,
    Submit,
    ToClient,
    ToEngine,
)
from lorikeet.engine.child import EngineLoop
from tests.engine.test_core import make_core, request


class Script:
    """An endpoint that hands out messages by turn and keeps what is sent."""

    def __init__(self, *turns: ToEngine | Callable[[], None] | None) -> None:
        self._turns = list(turns)
        self.sent: list[ToClient] = []

    def recv(self, timeout_ms: int) -> list[ToEngine]:
        turn = self._turns.pop(0) if self._turns else None
        if callable(turn):
            turn()
            return []
        return [] if turn is None else [turn]

    def send(self, message: ToClient) -> None:
        self.sent.append(message)

    def finishes(self) -> dict[str, str]:
        """Request -> message or kind of its terminal output; each must have exactly one."""
        found: dict[str, str] = {}
        for message in self.sent:
            for output in message.outputs if isinstance(message, Outputs) else ():
                if output.finish:
                    assert output.rid not in found
                    found[output.rid] = output.finish.message or output.finish.kind
        return found


def serve(*turns: ToEngine | Callable[[], None] | None, parent: int | None = None) -> Script:
    script = Script(*turns)
    core = make_core()
    assert EngineLoop(core, script, os.getppid() if parent is None else parent).run() == 0
    core.check_integrity()
    return script


def test_requests_are_accepted_answered_and_drained() -> None:
    script = serve(Submit([request("a")]), Submit([request("b")]), Shutdown(drain_seconds=30))
    assert [m.rid for m in script.sent if isinstance(m, Accepted)] == ["a", "b"]
    assert script.finishes() == {"a": "length", "b": "length"}


def test_a_shutdown_without_patience_aborts() -> None:
    script = serve(Submit([request("a", max_new_tokens=50)]), Shutdown())
    assert "shutting down" in script.finishes()["a"]


def test_no_new_request_after_a_shutdown() -> None:
    script = serve(
        Submit([request("a", max_new_tokens=20)]),
        Shutdown(drain_seconds=30),
        Submit([request("b")]),
    )
    assert script.finishes()["a"] == "length"
    assert "shutting down" in script.finishes()["b"]


def test_an_id_that_is_sent_twice_does_not_end_the_first(caplog: pytest.LogCaptureFixture) -> None:
    script = serve(Submit([request("a")]), Submit([request("a")]), Shutdown(drain_seconds=30))
    assert script.finishes() == {"a": "length"}
    assert "request dropped" in caplog.text


def test_abort_and_commands() -> None:
    script = serve(
        Submit([request("a", max_new_tokens=50)]),
        Abort("a"),
        Command(7, "info"),
        Command(8, "nonsense"),
        Shutdown(),
    )
    assert script.finishes() == {"a": "aborted by the client"}
    replies = {m.id: m for m in script.sent if isinstance(m, Reply)}
    assert isinstance(replies[7].result, dict)
    assert replies[8].error is not None
    assert replies[8].status_code == 400
    assert any(isinstance(m, Stats) for m in script.sent)


def test_it_ends_when_its_parent_is_gone() -> None:
    script = serve(Submit([request("a")]), parent=-1)
    assert script.sent == []
