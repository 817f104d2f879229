"""The engine process's loop against a scripted socket: what is said in reply to what, and when it ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import pytest

from lorikeet.core.commands import (
    FindAdapter,
    FlushCache,
    ListAdapters,
    LoadAdapter,
    LoadOutcome,
    UnloadAdapter,
)
from lorikeet.core.failure import Failure
from lorikeet.core.messages import (
    Abort,
    Accepted,
    Ask,
    Cancel,
    Failed,
    Outputs,
    Reply,
    Shutdown,
    Stats,
    Submit,
    ToClient,
    ToEngine,
    Unreadable,
    decode_to_client,
    encode,
)
from lorikeet.core.plan import StepResult
from lorikeet.core.views import AdapterDetail
from lorikeet.engine import child
from lorikeet.engine.child import EngineLoop
from lorikeet.engine.core import EngineCore
from tests.engine.test_core import PAGE_SIZE, PAGES, make_core, request
from tests.support.adapter_rig import AdapterRig
from tests.support.fake_worker import FakeWorker


class Script:
    """An endpoint that hands out messages by turn and keeps what is sent."""

    def __init__(self, *turns: ToEngine | Unreadable | Callable[[], None] | None) -> None:
        self._turns = list(turns)
        self.sent: list[ToClient] = []
        self.patience: list[int] = []

    def recv(self, timeout_ms: int) -> list[ToEngine | Unreadable]:
        self.patience.append(timeout_ms)
        turn = self._turns.pop(0) if self._turns else None
        if callable(turn):
            turn()
            return []
        return [] if turn is None else [turn]

    def send(self, message: ToClient) -> None:
        decode = decode_to_client(encode(message))  # it can be sent, whatever it holds
        assert not isinstance(decode, Unreadable)
        self.sent.append(message)

    def start_pulse(self) -> None:
        pass

    def finishes(self) -> dict[int, str]:
        """Completion -> message or kind of its terminal output; each must have exactly one."""
        found: dict[int, str] = {}
        for message in self.sent:
            for output in message.outputs if isinstance(message, Outputs) else ():
                if output.finish:
                    assert output.id not in found
                    found[output.id] = output.finish.message or output.finish.kind
        return found


def serve(
    *turns: ToEngine | Unreadable | Callable[[], None] | None, parent: int | None = None
) -> Script:
    script = Script(*turns)
    core = make_core()
    assert EngineLoop(core, script, os.getppid() if parent is None else parent).run() == 0
    core.check_integrity()
    return script


class LostDevice(FakeWorker):
    """A worker whose device is gone when the second step is read."""

    def collect(self) -> StepResult:
        result = super().collect()
        if result.step == 1:
            raise RuntimeError("CUDA error: device-side failure")
        return result


def test_a_lost_device_ends_every_request_and_the_process(monkeypatch) -> None:
    worker = LostDevice(
        page_size=PAGE_SIZE, num_pages=PAGES, num_slots=1, vocab_size=100, max_ahead=1
    )
    core = make_core(worker=worker)
    monkeypatch.setattr(child, "build_engine", lambda config, report: core)
    monkeypatch.setattr(child.gc, "freeze", lambda: None)
    script = Script(Submit.of(0, [request(), request()]))
    config: Any = None
    assert child._serve(config, script, os.getppid()) == 1  # pyright: ignore[reportArgumentType]
    message = "the engine failed: RuntimeError: CUDA error: device-side failure"
    assert script.finishes() == {0: message, 1: message}
    assert isinstance(script.sent[-1], Failed)


def test_requests_are_accepted_answered_and_drained() -> None:
    script = serve(
        Submit.of(0, [request(n=2)]), Submit.of(2, [request()]), Shutdown(drain_seconds=30)
    )
    assert [m.ids for m in script.sent if isinstance(m, Accepted)] == [[0, 1], [2]]
    assert script.finishes() == {0: "length", 1: "length", 2: "length"}


def test_a_shutdown_without_patience_aborts() -> None:
    script = serve(Submit.of(0, [request(max_new_tokens=50)]), Shutdown())
    assert "shutting down" in script.finishes()[0]
    ends = [o.finish for m in script.sent if isinstance(m, Outputs) for o in m.outputs if o.finish]
    assert [end.status_code for end in ends] == [503], "its caller is told to try again"


def test_no_new_request_after_a_shutdown() -> None:
    script = serve(
        Submit.of(0, [request(max_new_tokens=20)]),
        Shutdown(drain_seconds=30),
        Submit.of(1, [request()]),
    )
    assert script.finishes()[0] == "length"
    assert "shutting down" in script.finishes()[1]


def test_a_full_queue_refuses_whole_calls_and_loses_nothing() -> None:
    core = make_core(max_running=1, max_queued=2)
    script = Script(
        Submit.of(0, [request(max_new_tokens=30)]),
        Submit.of(1, [request()]),
        Submit.of(2, [request()]),
        Submit.of(3, [request()]),  # 1 and 2 wait
        Abort([1]),
        Submit.of(4, [request(n=2)]),  # one place is free
        Submit.of(6, [request()]),
        Shutdown(drain_seconds=30),
    )
    assert EngineLoop(core, script, os.getppid()).run() == 0
    ends = script.finishes()
    refused = {number for number, text in ends.items() if "the queue is full" in text}
    assert refused == {3, 4, 5}
    assert {number for number, text in ends.items() if text == "length"} == {0, 2, 6}
    assert sorted(ends) == list(range(7))
    statuses = {
        output.finish.status_code
        for message in script.sent
        for output in (message.outputs if isinstance(message, Outputs) else ())
        if output.finish is not None and output.id in refused
    }
    assert statuses == {503}


def test_an_id_that_is_sent_twice_does_not_end_the_first(caplog: pytest.LogCaptureFixture) -> None:
    script = serve(Submit.of(0, [request()]), Submit.of(0, [request()]), Shutdown(drain_seconds=30))
    assert script.finishes() == {0: "length"}
    assert "request dropped" in caplog.text


def test_abort_and_commands() -> None:
    script = serve(
        Submit.of(0, [request(max_new_tokens=50)]),
        Abort([0]),
        Ask(7, FlushCache()),
        Ask(8, UnloadAdapter("nobody")),
        Shutdown(),
    )
    assert script.finishes() == {0: "aborted by the client"}
    replies = {m.id: m for m in script.sent if isinstance(m, Reply)}
    assert isinstance(replies[7].result, bool)
    assert replies[8].failure is not None
    assert replies[8].failure.status_code == 400
    assert any(isinstance(m, Stats) for m in script.sent)


def test_it_ends_when_its_parent_is_gone() -> None:
    script = serve(Submit.of(0, [request()]), parent=-1)
    assert script.sent == []


def serve_adapters(
    rig: AdapterRig, *turns: ToEngine | Unreadable | Callable[[], None] | None
) -> dict[int, Reply]:
    """Replies to the commands of a script, by their numbers; only one for each."""
    script = Script(*turns, Shutdown())
    assert EngineLoop(rig.core, script, os.getppid()).run() == 0
    replies = [message for message in script.sent if isinstance(message, Reply)]
    assert len({reply.id for reply in replies}) == len(replies)
    for reply in replies:
        decode_to_client(encode(reply))  # it can be sent
    rig.close()
    return {reply.id: reply for reply in replies}


def wait_for(rig: AdapterRig) -> Callable[[], None]:
    """A turn that lets threads finish what they do."""
    return lambda: wait(rig.store.pending(), 20) and None


def test_a_load_is_answered_when_it_is_done() -> None:
    rig = AdapterRig()
    rig.write("/a", "first")
    gate = rig.block("/a")  # the read takes longer than the turn that asks for something else
    replies = serve_adapters(
        rig,
        Ask(1, LoadAdapter("a", "/a")),
        Ask(2, FlushCache()),
        gate.set,
        wait_for(rig),
        Ask(3, UnloadAdapter("a")),
        Ask(4, UnloadAdapter("a")),
        Ask(5, LoadAdapter("b", "/b")),
        wait_for(rig),
        None,
    )
    assert list(replies) == [2, 1, 3, 4, 5]
    loaded = decode_to_client(encode(replies[1]))
    assert isinstance(loaded, Reply)
    assert isinstance(loaded.result, LoadOutcome)
    assert loaded.result.path == "/a"
    assert replies[3].failure is None
    assert replies[4].failure is not None
    assert replies[4].failure.status_code == 404
    assert replies[5].failure == Failure("refused", "adapter path /b does not exist")


def test_a_command_can_be_cancelled() -> None:
    rig = AdapterRig()
    rig.write("/a", "first")
    gate = rig.block("/a")
    replies = serve_adapters(
        rig,
        Ask(1, LoadAdapter("a", "/a")),
        Cancel(1),
        Cancel(1),
        gate.set,
        None,
    )
    assert replies == {1: Reply(1, failure=Failure("aborted", "cancelled by the client"))}
    assert rig.store.describe() == []


# Of the kinds that strangers' values have caused, and those that any code may.
ERRORS = [
    TypeError("unhashable type"),
    OverflowError("int too large"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    MemoryError(),
    RecursionError("too deep"),
    KeyError("name"),
]


def failing(core: EngineCore, name: str, error: Exception, *, times: int = 1) -> None:
    """The core's method fails as often."""
    method, left = getattr(core, name), [times]

    def fail(*args: object) -> object:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return method(*args)

    setattr(core, name, fail)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["check_queue", "submit"])
def test_an_error_in_one_request_is_its_own(place: str, error: Exception) -> None:
    core = make_core()
    failing(core, place, error)
    script = Script(
        Submit.of(0, [request(n=2)]), Submit.of(2, [request()]), Shutdown(drain_seconds=30)
    )
    assert EngineLoop(core, script, os.getppid()).run() == 0
    ends = script.finishes()
    assert type(error).__name__ in ends[0]
    assert ends == {0: ends[0], 1: ends[0], 2: "length"}
    core.check_integrity()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_behind_a_lease_ends_the_request_and_gives_the_lease_back(
    error: Exception,
) -> None:
    core = make_core()
    failing(core, "_prepare", error)
    script = Script(Submit.of(0, [request(n=2), request()]), Shutdown(drain_seconds=30))
    assert EngineLoop(core, script, os.getppid()).run() == 0
    ends = script.finishes()
    assert type(error).__name__ in ends[0]
    assert ends == {0: ends[0], 1: ends[0], 2: "length"}, "the samples of a prompt fail together"
    core.check_integrity()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_abort_that_fails_ends_nobody_else(error: Exception) -> None:
    core = make_core()
    failing(core, "abort", error)
    script = Script(Submit.of(0, [request(), request()]), Abort([0, 1]), Shutdown(drain_seconds=30))
    assert EngineLoop(core, script, os.getppid()).run() == 0
    assert script.finishes() == {0: "length", 1: "aborted by the client"}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_command_that_fails_is_answered(error: Exception) -> None:
    core = make_core()
    future: Future[None] = Future()
    future.set_exception(error)
    core._find_adapter = lambda name: future
    failing(core, "command", error)
    script = Script(
        Ask(1, FlushCache()), Ask(2, FindAdapter("later")), Ask(3, FlushCache()), Shutdown()
    )
    assert EngineLoop(core, script, os.getppid()).run() == 0
    replies = {m.id: m for m in script.sent if isinstance(m, Reply)}
    for number in (1, 2):
        failure = replies[number].failure
        assert failure is not None
        assert failure.status_code == 500
        assert type(error).__name__ in failure.message
    assert replies[3].failure is None


def test_what_cannot_be_read_is_answered_too() -> None:
    script = serve(
        Unreadable("odd", ids=[0], command=None),
        Unreadable("odd", ids=[], command=4),
        Unreadable("odd", ids=[], command=None),
        Submit.of(1, [request()]),
        Unreadable("odd", ids=[1], command=None),  # it runs already: its one end is this one
        Shutdown(drain_seconds=30),
    )
    assert script.finishes() == dict.fromkeys((0, 1), "a message to the engine cannot be read: odd")
    assert [m.id for m in script.sent if isinstance(m, Reply)] == [4]


def test_results_of_strangers_values_can_be_sent() -> None:
    core = make_core()
    odd = AdapterDetail(
        name="\ud800",
        path="",
        state="loaded",
        pinned=False,
        report={"\ud800": [2**80, {1, 2}, object()]},
    )
    core.adapters.describe = lambda name: [odd]
    script = Script(Ask(1, ListAdapters()), Shutdown())  # its send() encodes
    assert EngineLoop(core, script, os.getppid()).run() == 0


def test_a_loop_that_waits_long_for_a_thread_looks_less_often() -> None:
    core = make_core()
    script = Script(None)
    loop = EngineLoop(core, script, os.getppid())
    assert loop._patience_ms() == child.IDLE_MS
    core._compiling[0] = Future()
    assert loop._patience_ms() == child.THREADS_MS
    loop._quiet_since -= 0.2
    assert 20 <= loop._patience_ms() < child.MAX_THREADS_MS
    loop._quiet_since -= 3600
    assert loop._patience_ms() == child.MAX_THREADS_MS
