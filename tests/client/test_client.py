"""The client against an engine double behind the real transport."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import zmq
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from lorikeet.client.client import EngineClient
from lorikeet.client.intake import RequestBatch
from lorikeet.client.stream import CompletionStream
from lorikeet.client.transport import ClientTransport
from lorikeet.core.commands import FlushCache, UnloadAdapter
from lorikeet.core.failure import Failure, FailureKind
from lorikeet.core.messages import Ready, Stats, Submit, ToClient, ToEngine, encode
from lorikeet.core.request import FinishReason, Request, SamplingParams
from lorikeet.errors import (
    AdapterNotFoundError,
    EngineDeadError,
    EngineFault,
    RequestError,
    UnavailableError,
    UserError,
)
from lorikeet.text.completion import Completion
from lorikeet.text.stop import StopRules
from lorikeet.text.tokenizer import Tokenizer
from tests.support.engine_info import engine_info
from tests.support.fake_engine import FakeProcess, Knobs, ThreadEngine

pytestmark = pytest.mark.anyio


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


def request(text: str = "ab", **sampling: Any) -> Request:
    params: dict[str, Any] = {"max_new_tokens": 4} | sampling
    adapter = params.pop("adapter", None)
    return Request(
        prompt_token_ids=list(text.encode()),
        sampling=SamplingParams(**params),
        adapter=adapter,
    )


def batch(**requests: Request) -> RequestBatch:
    """A call of requests by their rids."""
    labels = {rid: [index] for index, rid in enumerate(requests)}
    return RequestBatch(
        requests=list(requests.values()),
        stops=[StopRules(item.sampling.stop) for item in requests.values()],
        rids=list(requests),
        labels=labels,
        is_list=True,
    )


def one(rid: str, text: str = "ab", **sampling: Any) -> RequestBatch:
    return batch(**{rid: request(text, **sampling)})


def group(rid: str, num_samples: int, **sampling: Any) -> RequestBatch:
    """A call for samples of one prompt."""
    rids = [f"{rid}_{sample}" for sample in range(num_samples)]
    labels = {name: [index] for index, name in enumerate(rids)}
    return RequestBatch(
        requests=[request(n=num_samples, **sampling)],
        stops=[StopRules()],
        rids=rids,
        labels=labels | {rid: list(range(num_samples))},
        is_list=True,
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
        assert made.client.info.context_length == 512
        stream = await made.client.submit(one("r"))
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
    steps = threading.Semaphore(1)
    async with session(tokenizer, steps=steps) as made:
        stream = await made.client.submit(one("r", max_new_tokens=6))
        texts, finishes = [], []
        async for _, completion in stream:
            steps.release()  # the next token comes when this one was seen
            texts.append(completion.text)
            finishes.append(completion.finish is not None)
        assert texts[-1] == "ababab"
        assert len(texts) >= 4, "a prompt consumer sees almost every token"
        assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
        assert finishes == [False] * (len(texts) - 1) + [True]


async def test_updates_of_a_slow_consumer_are_merged(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.001) as made:
        stream = await made.client.submit(one("r", max_new_tokens=200))
        lengths = []
        async for _, completion in stream:
            lengths.append(len(completion.text))
            await asyncio.sleep(0.1)
        assert lengths[-1] == 200
        assert len(lengths) < 20


async def test_a_batch_is_followed_together(tokenizer: Tokenizer) -> None:
    async with session(tokenizer) as made:
        calls = {f"r{n}": request(chr(97 + n), max_new_tokens=n + 1) for n in range(5)}
        results = await finish(await made.client.submit(batch(**calls)))
        assert [results[n].text for n in range(5)] == ["a", "bb", "ccc", "dddd", "eeeee"]


async def test_a_hundred_requests_at_a_time(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.005) as made:

        async def ask(number: int) -> str:
            call = one(f"r{number}", text=f"{number:03}", max_new_tokens=6)
            stream = await made.client.submit(call)
            return (await finish(stream))[0].text

        texts = await asyncio.gather(*(ask(number) for number in range(100)))
        assert texts == [f"{number:03}" * 2 for number in range(100)]
        assert made.engine.max_running > 50, "they ran together"
        assert made.client.num_open == 0


async def test_a_stop_string_ends_the_request_in_the_engine(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.002) as made:
        stream = await made.client.submit(one("r", "hello", max_new_tokens=500, stop=("lo",)))
        results = await finish(stream)
        assert results[0].text == "hel"
        ended = results[0].finish
        assert ended is not None
        assert (ended.kind, ended.matched) == ("stop", "lo")
        await until(lambda: made.client.num_open == 0)
        assert made.engine.aborted == [0]
        assert made.metric("requests_total", outcome="stop") == 1
        assert made.metric("requests_total", outcome="abort") == 0


async def test_a_rid_is_free_again_after_its_end_even_if_the_engine_does_not_know_yet(
    tokenizer: Tokenizer,
) -> None:
    async with session(tokenizer, step_s=0.02) as made:
        for _ in range(3):
            stream = await made.client.submit(one("r", max_new_tokens=100, stop=("b",)))
            assert (await finish(stream))[0].text == "a"
        await until(lambda: made.client.num_open == 0)
        assert made.engine.aborted == [0, 1, 2], "each had an id of its own"


async def test_a_rid_in_use_is_refused_and_the_running_request_goes_on(
    tokenizer: Tokenizer,
) -> None:
    async with session(tokenizer, step_s=0.01) as made:
        first = await made.client.submit(one("r", max_new_tokens=10))
        with pytest.raises(RequestError, match="'r' is already in use"):
            await made.client.submit(batch(other=request(), r=request()))
        assert made.client.num_open == 1
        assert len((await finish(first))[0].text) == 10
        again = await made.client.submit(batch(other=request(), r=request()))
        assert set(await finish(again)) == {0, 1}, "the refusal has claimed nothing"


async def test_two_callers_of_one_rid_never_read_each_other(tokenizer: Tokenizer) -> None:
    """One waits for the engine with a rid of which another is just being aborted; a third takes its other rid."""
    async with session(tokenizer, step_s=0.001) as made:
        left = await made.client.submit(one("B", "xx", max_new_tokens=400))
        made.knobs.is_stuck = True
        left.close()
        first = asyncio.create_task(
            made.client.submit(batch(A=request("first"), B=request("other")))
        )
        await asyncio.sleep(0)
        for rid in ("A", "B"):
            with pytest.raises(RequestError, match=f"{rid!r} is already in use"):
                await made.client.submit(one(rid, "secret"))
        # Whoever waits leaves, and the rids are free at once, while the engine has heard nothing of it.
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        second = asyncio.create_task(
            made.client.submit(batch(B=request("beta"), A=request("zeta")))
        )
        await asyncio.sleep(0)
        made.knobs.is_stuck = False
        texts = {
            completion.rid: completion.text for completion in (await finish(await second)).values()
        }
        assert texts == {"B": "beta", "A": "zeta"}
        await until(lambda: made.client.num_open == 0 or bool(made.engine.num_running))


async def test_names_of_groups_are_claimed_too(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.005) as made:
        stream = await made.client.submit(group("a", 2, max_new_tokens=300))
        for taken in ("a", "a_0", "a_1"):
            with pytest.raises(RequestError, match=f"{taken!r} is already in use"):
                await made.client.submit(one(taken))
        stream.close()
        await finish(await made.client.submit(one("a")))


class CountingDict(dict[int, Any]):
    """A dict that counts who walks over it."""

    num_walks = 0

    def items(self) -> Any:
        self.num_walks += 1
        return super().items()

    def values(self) -> Any:
        self.num_walks += 1
        return super().values()

    def __iter__(self) -> Any:
        self.num_walks += 1
        return super().__iter__()


async def test_the_end_of_a_call_looks_at_nobody_elses(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.002) as made:
        counting = made.client._open = CountingDict()
        others = await made.client.submit(group("others", 100, max_new_tokens=500))
        await finish(await made.client.submit(one("a")))
        left = await made.client.submit(one("b", max_new_tokens=500))
        left.close()
        assert made.client.abort("others_7") == 1
        await until(lambda: made.client.num_open == 99)
        assert counting.num_walks == 0
        others.close()


async def test_a_full_queue_is_known_before_anything_is_made(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, hold_accept=True) as made:
        made.client.info = replace(made.client.info, max_running_requests=2, max_queued_requests=5)
        many = {"text": "a", "sampling_params": {"n": 30}}
        made.client.intake.make_requests(many)  # nobody waits: a call of any size
        waiting = asyncio.create_task(made.client.submit(group("a", 4)))
        await until(lambda: made.engine.num_running == 4)
        two_wait = {"text": ["a"] * 3}
        assert made.client.intake.make_requests(two_wait).num_completions == 3
        with pytest.raises(UnavailableError, match="2 sequences wait, this request has 30"):
            made.client.intake.make_requests(many)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_nothing_of_a_rid_crosses_to_the_engine(tokenizer: Tokenizer) -> None:
    async with session(tokenizer) as made:
        sent: list[bytes] = []
        send = made.client._transport.send

        def watch(message: ToEngine) -> None:
            sent.append(encode(message))
            send(message)

        made.client._transport.send = watch
        await finish(await made.client.submit(group("a-rid-that-is-seen", 64, max_new_tokens=1)))
        assert len(sent) == 1
        assert b"a-rid-that" not in sent[0]
        alone = encode(Submit.of(0, [request(max_new_tokens=1)]))
        assert len(sent[0]) < len(alone) + 8, "64 samples cross once"


async def test_a_refused_request_takes_its_batch_with_it(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.005) as made:
        call = batch(
            good=request(max_new_tokens=500),
            bad=request(adapter="nobody"),
            also_good=request(max_new_tokens=500),
        )
        with pytest.raises(RequestError, match="'nobody' has never been loaded; loaded: json, sql"):
            await made.client.submit(call)
        await until(lambda: made.client.num_open == 0)
        assert sorted(made.engine.aborted) == [0, 2]
        assert made.metric("requests_total", outcome="error") == 1
        assert made.metric("requests_total", outcome="abort") == 2
        assert made.metric("requests_open") == 0


async def test_a_caller_cancelled_while_it_waits_aborts_its_requests(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, hold_accept=True) as made:
        waiting = asyncio.create_task(made.client.submit(batch(a=request(), b=request())))
        await until(lambda: made.engine.num_running == 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await until(lambda: made.client.num_open == 0)
        assert sorted(made.engine.aborted) == [0, 1]


async def test_closing_a_stream_aborts_what_still_runs(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.005) as made:
        stream = await made.client.submit(
            batch(short=request(max_new_tokens=1), long=request(max_new_tokens=500))
        )
        async for index, completion in stream:
            if index == 0 and completion.finish is not None:
                break
        stream.close()
        stream.close()
        await until(lambda: made.client.num_open == 0)
        assert made.engine.aborted == [1]


async def test_abort_delivers_an_abort(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, step_s=0.005) as made:
        streams = [
            await made.client.submit(one(rid, max_new_tokens=500)) for rid in ("a", "b", "c")
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
        stream = await made.client.submit(group("a", 2, max_new_tokens=500))
        await made.client.submit(one("a_2", max_new_tokens=500))  # only looks like one of them
        assert made.client.abort("a") == 2
        await finish(stream)
        assert made.client.num_open == 1


async def test_a_request_that_fails_later_says_so_in_its_end(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, fail_token=ord("x")) as made:
        results = await finish(await made.client.submit(batch(bad=request("abx"), good=request())))
        ended = results[0].finish
        assert ended is not None
        error = ended.error()
        assert isinstance(error, EngineFault)
        assert ended.status_code == 500
        assert str(error) == "out of memory"
        assert results[1].text == "abab", "the other one is not affected"


async def test_commands_are_answered_or_refused(tokenizer: Tokenizer) -> None:
    async with session(tokenizer) as made:
        answers = await asyncio.gather(*(made.client.command(FlushCache()) for _ in range(5)))
        assert answers == [True] * 5
        assert list(made.client.adapters.paths()) == ["json", "sql"]
        with pytest.raises(AdapterNotFoundError, match="'dance' has never been loaded"):
            await made.client.command(UnloadAdapter("dance"))


@pytest.mark.parametrize("last_words", [None, "it burns"])
async def test_death_is_an_error_for_everyone_once(
    tokenizer: Tokenizer, last_words: str | None
) -> None:
    async with session(tokenizer, step_s=0.005, last_words=last_words) as made:
        running = await made.client.submit(
            batch(a=request(max_new_tokens=500), b=request(max_new_tokens=500))
        )
        made.knobs.is_stuck = True
        waiting = asyncio.create_task(made.client.submit(one("c")))
        asking = asyncio.create_task(made.client.command(FlushCache()))
        await asyncio.sleep(0.05)
        made.engine.die()
        wanted = last_words or r"the engine process has ended \(exit code 3\)"
        with pytest.raises(EngineDeadError, match=wanted):
            await finish(running)
        for task in (waiting, asking):
            with pytest.raises(EngineDeadError, match=wanted):
                await task
        with pytest.raises(EngineDeadError, match=wanted):
            await made.client.submit(one("d"))
        with pytest.raises(EngineDeadError, match=wanted):
            await made.client.command(FlushCache())
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
        stream = await made.client.submit(one("r", max_new_tokens=500))
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.connect(made.thread.address.to_client)
            socket.send(b"\x01")
            with pytest.raises(EngineDeadError, match="cannot be read"):
                await finish(stream)


@pytest.mark.parametrize(
    ("kind", "error_type", "status"),
    [
        ("aborted", None, None),
        ("refused", RequestError, 400),
        ("failed", EngineFault, 500),
        ("unavailable", UnavailableError, 503),
    ],
)
def test_which_ends_are_errors(
    kind: FailureKind, error_type: type[Exception] | None, status: int | None
) -> None:
    reason = FinishReason(kind="abort", failure=Failure(kind, "why"))
    error = reason.error()
    assert reason.status_code == status
    if error_type is None:
        assert error is None
    else:
        assert error is not None
        assert type(error) is error_type
        assert str(error) == "why"


async def test_what_came_before_the_death_is_delivered(tokenizer: Tokenizer) -> None:
    async with session(tokenizer, die_after=3) as made:
        stream = await made.client.submit(one("r", max_new_tokens=500))
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
        stream = await made.client.submit(one("r", max_new_tokens=10))
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
        return [Ready(engine_info()) if self.num_received == 1 else Stats({})]

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
