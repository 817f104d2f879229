"""The client against an engine double behind the real transport."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import zmq
from prometheus_client import CollectorRegistry

from lorikeet.core.messages import (
    Abort,
    Outputs,
    Ready,
    Stats,
    ToClient,
    ToEngine,
    Unreadable,
)
from lorikeet.core.request import FinishReason, Request, RequestOutput, SamplingParams
from lorikeet.engine import client as client_module
from lorikeet.engine.client import EngineClient
from lorikeet.engine.completion import Completion
from lorikeet.engine.stream import CompletionStream, finish_error
from lorikeet.engine.tokenizer import Tokenizer
from lorikeet.engine.transport import ClientTransport
from lorikeet.errors import (
    EngineDeadError,
    EngineFault,
    RequestError,
    UnavailableError,
    UserError,
)
from tests.support.byte_tokenizer import save_byte_tokenizer
from tests.support.fake_engine import FakeProcess, Knobs, ThreadEngine

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


class Session:
    """A started client, its engine and its registry."""

    def __init__(
        self, thread: ThreadEngine, tokenizer: Tokenizer, watchdog_timeout: float = 300.0
    ) -> None:
        self.thread = thread
        self.engine = thread.engine
        self.knobs = thread.knobs
        self.registry = CollectorRegistry()
        self.client = EngineClient(
            transport=ClientTransport(thread.address),
            process=thread.process,
            tokenizer=tokenizer,
            registry=self.registry,
            model_name="m",
            watchdog_timeout=watchdog_timeout,
        )

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"lorikeet_{name}", {"model_name": "m", **labels})


@asynccontextmanager
async def session(
    tokenizer: Tokenizer, watchdog_timeout: float = 300.0, **knobs: Any
) -> AsyncIterator[Session]:
    with ThreadEngine(Knobs(**knobs)) as thread:
        made = Session(thread, tokenizer, watchdog_timeout)
        try:
            await made.client.start()
            yield made
        finally:
            thread.knobs.is_stuck = thread.knobs.hold_accept = False
            await made.client.close()


def request(rid: str, text: str = "ab", **sampling: Any) -> Request:
    params: dict[str, Any] = {"max_new_tokens": 4} | sampling
    adapter = params.pop("adapter", None)
    return Request(
        rid=rid,
        prompt_token_ids=list(text.encode()),
        sampling=SamplingParams(**params),
        adapter=adapter,
    )


async def finish(stream: CompletionStream) -> dict[int, Completion]:
    return {index: completion async for index, completion in stream}


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


async def test_a_request_from_submission_to_its_end(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.01) as made:
        assert made.client.info["context_length"] == 512
        stream = await made.client.submit([request("r")])
        assert made.client.num_open == 1
        results = await finish(stream)
        snapshot = results[0].snapshot()
        assert snapshot.text == "abab"
        assert snapshot.finish is not None
        assert snapshot.finish.kind == "length"
        assert made.client.num_open == 0
        assert made.metric("requests_total", outcome="length") == 1
        assert made.metric("prompt_tokens_total") == 2
        assert made.metric("cached_prompt_tokens_total") == 1
        assert made.metric("generated_tokens_total") == 4
        assert made.metric("time_to_first_token_seconds_count") == 1
        assert made.metric("inter_token_latency_seconds_count") == 3
        await until(lambda: "num_running" in made.client.stats)


async def test_a_stream_grows_and_ends_with_the_finished_completion(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.01) as made:
        stream = await made.client.submit([request("r", max_new_tokens=6)])
        texts, finishes = [], []
        async for _, completion in stream:
            texts.append(completion.text)
            finishes.append(completion.finish is not None)
        assert texts[-1] == "ababab"
        assert len(texts) >= 4, "a prompt consumer sees almost every token"
        assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
        assert finishes == [False] * (len(texts) - 1) + [True]


async def test_updates_of_a_slow_consumer_are_merged(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.001) as made:
        stream = await made.client.submit([request("r", max_new_tokens=200)])
        lengths = []
        async for _, completion in stream:
            lengths.append(len(completion.text))
            await asyncio.sleep(0.1)
        assert lengths[-1] == 200
        assert len(lengths) < 20


async def test_a_batch_is_followed_together(tokenizer: Tokenizer) -> None:
    async with session(tokenizer) as made:
        requests = [request(f"r{n}", text=chr(97 + n), max_new_tokens=n + 1) for n in range(5)]
        results = await finish(await made.client.submit(requests))
        assert [results[n].text for n in range(5)] == ["a", "bb", "ccc", "dddd", "eeeee"]


async def test_a_hundred_requests_at_a_time(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.005) as made:

        async def one(number: int) -> str:
            stream = await made.client.submit(
                [request(f"r{number}", text=f"{number:03}", max_new_tokens=6)]
            )
            return (await finish(stream))[0].text

        texts = await asyncio.gather(*(one(number) for number in range(100)))
        assert texts == [f"{number:03}" * 2 for number in range(100)]
        assert made.engine.max_running > 50, "they ran together"
        assert made.client.num_open == 0


async def test_a_stop_string_ends_the_request_in_the_engine(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.002) as made:
        stream = await made.client.submit([request("r", "hello", max_new_tokens=500, stop=("lo",))])
        results = await finish(stream)
        assert results[0].text == "hel"
        ended = results[0].finish
        assert ended is not None
        assert (ended.kind, ended.matched) == ("stop", "lo")
        await until(lambda: made.client.num_open == 0)
        assert made.engine.aborted == ["r"]
        assert made.metric("requests_total", outcome="stop") == 1
        assert made.metric("requests_total", outcome="abort") == 0


async def test_an_id_is_free_again_after_its_end_even_if_the_engine_does_not_know_yet(
    tokenizer: Tokenizer,
) -> None:
    async with session(tokenizer, step_s=0.02) as made:
        for _ in range(3):  # the engine raises if a duplicate reaches it
            stream = await made.client.submit([request("r", max_new_tokens=100, stop=("b",))])
            assert (await finish(stream))[0].text == "a"
        assert made.engine.aborted == ["r", "r"] or made.engine.aborted == ["r"] * 3


async def test_an_id_in_use_is_refused_and_the_running_request_goes_on(
    tokenizer: Tokenizer,
) -> None:
    async with session(tokenizer, step_s=0.01) as made:
        first = await made.client.submit([request("r", max_new_tokens=10)])
        with pytest.raises(RequestError, match="'r' is already in use"):
            await made.client.submit([request("other"), request("r")])
        with pytest.raises(RequestError, match="different ids"):
            await made.client.submit([request("x"), request("x")])
        assert made.client.num_open == 1
        assert len((await finish(first))[0].text) == 10


async def test_a_refused_request_takes_its_batch_with_it(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.005) as made:
        batch = [
            request("good", max_new_tokens=500),
            request("bad", adapter="nobody"),
            request("also-good", max_new_tokens=500),
        ]
        with pytest.raises(RequestError, match="'nobody' has never been loaded; loaded: json, sql"):
            await made.client.submit(batch)
        await until(lambda: made.client.num_open == 0)
        assert sorted(made.engine.aborted) == ["also-good", "good"]
        assert made.metric("requests_total", outcome="error") == 1
        assert made.metric("requests_total", outcome="abort") == 2
        assert made.metric("requests_open") == 0


async def test_a_caller_cancelled_while_it_waits_aborts_its_requests(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, hold_accept=True) as made:
        waiting = asyncio.create_task(made.client.submit([request("a"), request("b")]))
        await until(lambda: made.engine.num_running == 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await until(lambda: made.client.num_open == 0)
        assert sorted(made.engine.aborted) == ["a", "b"]


async def test_closing_a_stream_aborts_what_still_runs(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.005) as made:
        stream = await made.client.submit(
            [request("short", max_new_tokens=1), request("long", max_new_tokens=500)]
        )
        async for index, completion in stream:
            if index == 0 and completion.finish is not None:
                break
        stream.close()
        stream.close()
        await until(lambda: made.client.num_open == 0)
        assert made.engine.aborted == ["long"]


async def test_abort_delivers_an_abort(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.005) as made:
        streams = [
            await made.client.submit([request(rid, max_new_tokens=500)]) for rid in ("a", "b", "c")
        ]
        assert made.client.abort("nobody") == 0
        assert made.client.abort("a") == 1
        ended = (await finish(streams[0]))[0].finish
        assert ended is not None
        assert (ended.kind, ended.status_code) == ("abort", None)
        assert made.client.num_open == 2
        assert made.client.abort() == 2
        for stream in streams[1:]:
            await finish(stream)
        assert made.client.num_open == 0


async def test_abort_knows_the_id_that_requests_were_expanded_from(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.005) as made:
        expanded = [request("a_0", max_new_tokens=500), request("a_1", max_new_tokens=500)]
        stream = await made.client.submit(expanded, {"a_0": "a", "a_1": "a"})
        await made.client.submit(
            [request("a_2", max_new_tokens=500)]
        )  # only looks like one of them
        assert made.client.abort("a") == 2
        await finish(stream)
        assert made.client.num_open == 1


async def test_a_request_that_fails_later_says_so_in_its_end(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, fail_token=ord("x")) as made:
        results = await finish(await made.client.submit([request("bad", "abx"), request("good")]))
        ended = results[0].finish
        assert ended is not None
        error = finish_error(ended)
        assert isinstance(error, EngineFault)
        assert error.status_code == 500
        assert str(error) == "out of memory"
        assert results[1].text == "abab", "the other one is not affected"


async def test_commands_are_answered_or_refused(tokenizer: Tokenizer) -> None:
    async with session(tokenizer) as made:
        answers = await asyncio.gather(*(made.client.command("info") for _ in range(5)))
        assert list(answers[4]["adapters"]) == list(made.client.adapters.paths()) == ["json", "sql"]
        with pytest.raises(RequestError, match="unknown command 'dance'"):
            await made.client.command("dance")


@pytest.mark.parametrize("last_words", [None, "it burns"])
async def test_death_is_an_error_for_everyone_once(
    tokenizer: Tokenizer, last_words: str | None
) -> None:
    async with session(tokenizer, step_s=0.005, last_words=last_words) as made:
        running = await made.client.submit(
            [request("a", max_new_tokens=500), request("b", max_new_tokens=500)]
        )
        made.knobs.is_stuck = True
        waiting = asyncio.create_task(made.client.submit([request("c")]))
        asking = asyncio.create_task(made.client.command("info"))
        await asyncio.sleep(0.05)
        made.engine.die()
        wanted = last_words or r"the engine process has ended \(exit code 3\)"
        with pytest.raises(EngineDeadError, match=wanted):
            await finish(running)
        for task in (waiting, asking):
            with pytest.raises(EngineDeadError, match=wanted):
                await task
        with pytest.raises(EngineDeadError, match=wanted):
            await made.client.submit([request("d")])
        with pytest.raises(EngineDeadError, match=wanted):
            await made.client.command("info")
        with pytest.raises(EngineDeadError):
            made.client.check_alive()
        assert isinstance(await made.client.died(), EngineDeadError)
        assert made.client.num_open == 0
        assert made.client.abort() == 0
        assert made.metric("requests_total", outcome="error") == 3
        assert made.metric("requests_open") == 0
        running.close()
        gc.collect()  # a future whose error nobody looked at warns when it is collected


async def test_a_message_that_cannot_be_read_is_the_end(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.01) as made:
        stream = await made.client.submit([request("r", max_new_tokens=500)])
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.connect(made.thread.address.to_client)
            socket.send(b"\x01")
            with pytest.raises(EngineDeadError, match="cannot be read"):
                await finish(stream)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(None, None), (200, None), (400, RequestError), (500, EngineFault), (503, UnavailableError)],
)
def test_which_ends_are_errors(status: int | None, kind: type[Exception] | None) -> None:
    error = finish_error(FinishReason(kind="abort", message="why", status_code=status))
    if kind is None:
        assert error is None
    else:
        assert error is not None
        assert type(error) is kind
        assert str(error) == "why"
        assert error.status_code == status


async def test_what_came_before_the_death_is_delivered(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, die_after=3) as made:
        stream = await made.client.submit([request("r", max_new_tokens=500)])
        await made.client.died()
        _, completion = await anext(stream)
        assert completion.text == "aba"
        with pytest.raises(EngineDeadError):
            await anext(stream)


@pytest.mark.parametrize(("is_user_error", "kind"), [(True, UserError), (False, EngineDeadError)])
async def test_an_engine_that_cannot_start(
    tokenizer: Tokenizer, is_user_error: bool, kind: type[Exception]
) -> None:
    knobs = Knobs(start_error="no such model", start_user_error=is_user_error)
    phases: list[str] = []
    with ThreadEngine(knobs) as thread:
        made = Session(thread, tokenizer)
        with pytest.raises(kind, match="no such model"):
            await made.client.start(phases.append)
        await made.client.close()
    assert phases == ["loading nothing"]


async def test_an_engine_that_dies_while_it_starts(tokenizer: Tokenizer) -> None:
    with ThreadEngine(Knobs(start_s=60)) as thread:
        made = Session(thread, tokenizer)
        starting = asyncio.create_task(made.client.start())
        await asyncio.sleep(0.05)
        thread.engine.die()
        with pytest.raises(EngineDeadError):
            await starting
        await made.client.close()


async def test_close_ends_the_engine_and_drains(tokenizer: Tokenizer) -> None:
    with ThreadEngine(Knobs(step_s=0.01)) as thread:
        made = Session(thread, tokenizer)
        await made.client.start()
        stream = await made.client.submit([request("r", max_new_tokens=10)])
        following = asyncio.create_task(finish(stream))
        await made.client.close(drain_seconds=10)
        assert (await following)[0].text == "ababababab"
        assert thread.process.exitcode == 0


class BusyTransport:
    """An engine that has always something to say, a thousand times."""

    def __init__(self) -> None:
        self.num_received = 0

    async def recv(self) -> list[ToClient]:
        self.num_received += 1
        if self.num_received == 1000:
            await asyncio.Event().wait()
        info: dict[str, object] = {"vocab_size": 257, "context_length": 64}
        return [Ready(info) if self.num_received == 1 else Stats({})]

    def send(self, message: ToEngine) -> None:
        pass

    def close(self) -> None:
        pass


async def test_an_engine_with_much_to_say_leaves_others_their_turn(tokenizer: Tokenizer) -> None:
    process = FakeProcess()
    transport: Any = BusyTransport()
    client = EngineClient(
        transport=transport,
        process=process,
        tokenizer=tokenizer,
        registry=CollectorRegistry(),
        model_name="base",
    )
    await client.start()
    assert transport.num_received < 10, "whoever waits goes on when there is something for it"
    process.end(0)
    await client.close()
    process.close()


async def test_a_silent_engine_is_given_up_when_somebody_waits(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TICK_S", 0.01)
    async with session(tokenizer, watchdog_timeout=0.2, hold_accept=True) as made:
        process = made.thread.process
        await asyncio.sleep(0.5)
        made.client.check_alive()  # nobody waits
        assert not process.was_killed
        call = asyncio.create_task(made.client.submit([request("r")]))
        load = asyncio.create_task(made.client.command("nothing answers this"))
        made.knobs.is_stuck = True
        await until(lambda: process.was_killed)
        for task in (call, load):
            with pytest.raises(EngineDeadError, match=r"has said nothing for 0\.2 s"):
                await task
        assert "said nothing" in str(await made.client.died())


async def test_an_engine_that_answers_is_never_given_up(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TICK_S", 0.01)
    async with session(tokenizer, watchdog_timeout=0.5, step_s=0.01) as made:
        stream = await made.client.submit([request("r", max_new_tokens=200)])
        assert (await finish(stream))[0].snapshot().finish is not None
        assert not made.thread.process.was_killed


async def test_a_process_without_a_pulse_is_not_awake(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TICK_S", 0.01)
    monkeypatch.setattr(client_module, "SILENCE_S", 0.2)
    monkeypatch.setattr(client_module, "LEAST_SILENCE_S", 0.0)
    async with session(tokenizer, has_pulse=False) as made:
        made.client.check_awake()
        await asyncio.sleep(1)
        with pytest.raises(UnavailableError, match=r"no sign of life for 0\.2 s"):
            made.client.check_awake()
        await made.client.command("info")
        made.client.check_awake()  # it was heard again


@pytest.mark.parametrize("error", [TypeError("odd"), MemoryError(), UnicodeError("odd")], ids=str)
async def test_an_output_that_cannot_be_taken_in_ends_its_request(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    add = Completion.add

    def fail(self: Completion, output: Any) -> bool:
        if output.rid == "bad":
            raise error
        return add(self, output)

    monkeypatch.setattr(Completion, "add", fail)
    async with session(tokenizer, step_s=0.01) as made:
        bad = await made.client.submit([request("bad", max_new_tokens=400)])
        good = await made.client.submit([request("good", max_new_tokens=10)])
        with pytest.raises(EngineFault, match=type(error).__name__):
            await finish(bad)
        assert (await finish(good))[0].text == "ab" * 5
        await until(lambda: "bad" in made.engine.aborted)


async def test_a_listener_that_fails_ends_everything(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with session(tokenizer, step_s=0.05) as made:
        stream = await made.client.submit([request("r", max_new_tokens=100)])

        def fail(*_: object) -> None:
            raise TypeError("a metric that is none")

        monkeypatch.setattr(made.client._engine_metrics, "update", fail)
        with pytest.raises(EngineDeadError, match="TypeError: a metric that is none"):
            await finish(stream)
        await made.client.died()
        assert "the server's side of the engine failed" in caplog.text


class OddTransport:
    """Hands on what a test puts in."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[ToClient | Unreadable] = asyncio.Queue()
        self.sent: list[ToEngine] = []

    async def recv(self) -> list[ToClient | Unreadable]:
        return [await self.queue.get()]

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)

    def close(self) -> None:
        pass


@asynccontextmanager
async def odd_client(tokenizer: Tokenizer) -> AsyncIterator[tuple[EngineClient, OddTransport]]:
    process, transport = FakeProcess(), OddTransport()
    client = EngineClient(
        transport=transport,  # pyright: ignore[reportArgumentType]
        process=process,
        tokenizer=tokenizer,
        registry=CollectorRegistry(),
        model_name="m",
    )
    transport.queue.put_nowait(Ready({"vocab_size": 257, "context_length": 64}))
    await client.start()
    yield client, transport
    process.end(0)
    await client.close()
    process.close()


async def test_an_answer_that_cannot_be_read_is_a_fault_for_whom_it_was(
    tokenizer: Tokenizer,
) -> None:
    async with odd_client(tokenizer) as (client, transport):
        submits = [asyncio.create_task(client.submit([request(rid)])) for rid in "ab"]
        command = asyncio.create_task(client.command("load_adapter"))
        await asyncio.sleep(0)
        transport.queue.put_nowait(Unreadable("odd", rids=["a"], command=None))
        transport.queue.put_nowait(Unreadable("odd", rids=[], command=1))
        for task in (submits[0], command):
            with pytest.raises(EngineFault, match="cannot be read: odd"):
                await task
        assert Abort("a") in transport.sent
        client.check_alive()
        assert not submits[1].done()
        transport.queue.put_nowait(Unreadable("odd", rids=[], command=None))
        with pytest.raises(EngineDeadError, match="cannot be read: odd"):
            await submits[1]  # whose answer was it?


async def test_thousands_of_ends_leave_others_their_turn(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_OUTPUTS", 10)
    async with odd_client(tokenizer) as (client, transport):
        requests = [request(str(number)) for number in range(100)]
        call = asyncio.create_task(client.submit(requests))
        await asyncio.sleep(0)
        reason = FinishReason(kind="abort", message="all of them")
        ends = [RequestOutput(rid=r.rid, token_ids=[], finish=reason) for r in requests]
        transport.queue.put_nowait(Outputs(ends))
        seen = []
        while client.num_open:
            seen.append(client.num_open)
            await asyncio.sleep(0)
        assert max(a - b for a, b in itertools.pairwise(seen)) <= 10
        (await call).close()


async def test_aborting_all_is_one_message(tokenizer: Tokenizer) -> None:
    async with odd_client(tokenizer) as (client, transport):
        call = asyncio.create_task(client.submit([request(str(number)) for number in range(5)]))
        await asyncio.sleep(0)
        assert client.abort() == 5
        assert [m for m in transport.sent if isinstance(m, Abort)] == [Abort(None)]
        call.cancel()


async def test_a_question_has_a_deadline(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "QUERY_TIMEOUT_S", 0.05)
    async with session(tokenizer, is_stuck=True) as made:
        for name in client_module.QUERIES:
            with pytest.raises(UnavailableError, match=r"not answered within 0\.05 seconds"):
                await made.client.command(name)
