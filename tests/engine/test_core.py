"""The engine's loop with a worker that computes hashes: acceptance, refusals, aborts, commands, a worker that fails."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from lorikeet.adapters.residency import Residency
from lorikeet.adapters.store import AdapterStore
from lorikeet.core.commands import FlushCache
from lorikeet.core.plan import StepPlan, StepResult
from lorikeet.core.request import Request, RequestOutput, SamplingParams
from lorikeet.engine.core import EngineCore, Executor
from lorikeet.errors import EngineFault, RequestError, UnavailableError
from lorikeet.kv.manager import KVManager
from lorikeet.scheduler.scheduler import Scheduler, SchedulerLimits
from tests.support.engine_info import engine_info
from tests.support.fake_worker import FakeWorker

PAGES, PAGE_SIZE = 32, 4
GRAMMAR_THREADS = ThreadPoolExecutor(4)


def make_core(
    *,
    compile_grammar: Callable[[SamplingParams], None] = lambda sampling: None,
    worker: Executor | None = None,
    max_running: int = 8,
    max_queued: int | None = None,
) -> EngineCore:
    kv = KVManager(PAGE_SIZE, PAGES, radix=True)
    limits = SchedulerLimits(
        max_running=max_running,
        max_step_tokens=32,
        max_prefill_tokens=64,
        context_length=64,
        max_loras_per_batch=1,
        eos_token_ids=frozenset({0}),
        max_queued=max_queued,
    )
    seeds = iter(range(1000))
    store = AdapterStore(Residency.of_pool(None), None)
    return EngineCore(
        scheduler=Scheduler(limits, kv, store.residency),
        kv=kv,
        worker=worker
        or FakeWorker(page_size=PAGE_SIZE, num_pages=PAGES, num_slots=1, vocab_size=100),
        adapters=store,
        compile_grammar=lambda sampling: GRAMMAR_THREADS.submit(compile_grammar, sampling),
        seeds=lambda: next(seeds),
        info=engine_info(),
    )


def request(**fields: object) -> Request:
    sampling = SamplingParams(**{"max_new_tokens": 5, "ignore_eos": True} | fields)
    return Request(prompt_token_ids=[1, 2, 3], sampling=sampling)


def run(core: EngineCore) -> list[RequestOutput]:
    outputs: list[RequestOutput] = []
    while not core.is_idle:
        outputs += core.step()
        core.wait_for_threads()
    core.check_integrity()
    return outputs


def test_a_request_is_accepted_and_ends_once() -> None:
    core = make_core()
    core.submit(request())
    assert core.take_accepted() == [0]
    outputs = run(core)
    assert [len(o.token_ids) for o in outputs] == [1] * 5
    assert [o.finish is not None for o in outputs] == [False] * 4 + [True]
    assert core.take_accepted() == []


def test_an_id_is_never_used_again() -> None:
    core = make_core()
    assert core.submit(request(n=3)) == 0
    for number in (0, 2):
        with pytest.raises(EngineFault, match="ids below 3 have been used"):
            core.submit(request(), number)
    assert core.submit(request(), 7) == 7
    assert sum(o.finish is not None for o in run(core)) == 4
    with pytest.raises(EngineFault):
        core.submit(request(), 7)  # not after its end either
    assert core.submit(request()) == 8


def test_samples_are_one_request_with_seeds_that_follow_each_other() -> None:
    core = make_core()
    sampled = request(n=3, sampling_seed=41)
    core.submit(sampled)
    alone = make_core()
    for seed in (41, 42, 43):
        alone.submit(request(sampling_seed=seed))

    def tokens(core: EngineCore) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for output in run(core):
            found.setdefault(output.id, []).extend(output.token_ids)
        return found

    sequences = [core._scheduler._sequences[number] for number in range(3)]
    assert all(seq.tokens is sampled.prompt_token_ids for seq in sequences)
    assert all(seq.sampling is sampled.sampling for seq in sequences)
    assert tokens(core) == tokens(alone)
    assert sampled.prompt_token_ids == [1, 2, 3]


def test_an_adapter_without_lora_is_refused() -> None:
    core = make_core()
    bad = request()
    bad.adapter = "sql"
    core.submit(bad)
    (output,) = core.step()
    assert output.finish is not None
    assert output.finish.status_code == 400
    assert "--enable-lora" in (output.finish.message or "")
    assert core.take_accepted() == []


def test_a_slow_grammar_lets_others_pass() -> None:
    gate = threading.Event()
    core = make_core(compile_grammar=lambda sampling: gate.wait(20) and None)
    slow = core.submit(request(regex="a"))
    quick = core.submit(request())
    outputs: list[RequestOutput] = []
    while not any(o.finish for o in outputs):
        outputs += core.step()
    assert {o.id for o in outputs} == {quick}
    assert core.take_accepted() == [quick]
    gate.set()
    assert {o.id for o in run(core)} == {slow}


def test_a_bad_grammar_refuses_its_request_alone() -> None:
    def refuse(sampling: SamplingParams) -> None:
        raise RequestError("sampling_params.regex does not compile", "regex")

    core = make_core(compile_grammar=refuse)
    bad = core.submit(request(regex="(("))
    good = core.submit(request())
    last = {o.id: o.finish for o in run(core)}
    assert last[bad] is not None
    assert last[bad].status_code == 400
    assert last[good] is not None
    assert last[good].kind == "length"


@pytest.mark.parametrize("error", [TypeError("no such thing"), MemoryError(), EngineFault("gone")])
def test_whatever_compiling_raises_is_its_request_s_error(error: Exception) -> None:
    def fail(sampling: SamplingParams) -> None:
        raise error

    core = make_core(compile_grammar=fail)
    bad = core.submit(request(regex="a"))
    good = core.submit(request())
    last = {o.id: o.finish for o in run(core)}
    assert last[bad] is not None
    assert (last[bad].kind, last[bad].status_code) == ("abort", 500)
    assert last[good] is not None
    assert last[good].kind == "length"


def test_an_abort_cancels_the_compilation() -> None:
    future: Future[None] = Future()
    core = make_core()
    core._compile_grammar = lambda sampling: future
    core.abort(core.submit(request(regex="a")), "enough")
    assert future.cancelled()


def test_a_request_holds_its_grammar_until_it_ends() -> None:
    class Grammar:
        pass

    held = Grammar()
    name = weakref.ref(held)
    future: Future[object] = Future()
    future.set_result(held)
    futures = [future]
    core = make_core()
    core._compile_grammar = lambda sampling: futures.pop()
    core.submit(request(regex="a"))
    del held, future
    core.step()
    assert name() is not None
    run(core)
    assert name() is None


def test_a_request_is_aborted_while_its_grammar_compiles() -> None:
    gate = threading.Event()
    core = make_core(compile_grammar=lambda sampling: gate.wait(20) and None)
    core.abort(core.submit(request(regex="a")), "enough")
    (output,) = core.step()
    assert output.finish is not None
    assert (output.finish.kind, output.finish.message) == ("abort", "enough")
    gate.set()
    assert run(core) == []


def test_abort_ends_one_or_all() -> None:
    core = make_core()
    core.submit(request(max_new_tokens=50, n=3))
    core.step()
    core.abort(1, "no")
    core.abort(99, "no")
    core.abort(None, "all")
    ended = {o.id: o.finish.message for o in run(core) if o.finish}
    assert ended == {0: "all", 1: "no", 2: "all"}


def test_commands() -> None:
    core = make_core()
    assert core.command(FlushCache()) is True
    core.submit(request())
    assert core.command(FlushCache()) is False
    assert core.stats()["num_waiting"] == 1


def test_what_waits_for_its_grammar_is_in_the_queue() -> None:
    gate = threading.Event()
    core = make_core(compile_grammar=lambda sampling: gate.wait(20) and None, max_queued=2)
    core.check_queue(5)  # nobody waits: a call of any size
    for _ in range(2):
        core.check_queue(1)
        core.submit(request(regex="a"))
    with pytest.raises(UnavailableError, match=r"2 sequences wait.*--max-queued-requests is 2"):
        core.check_queue(1)
    core.abort(0, "enough")
    core.check_queue(1)
    with pytest.raises(UnavailableError):
        core.check_queue(2)
    gate.set()
    run(core)


class BrokenWorker:
    max_ahead = 1

    def submit(self, plan: StepPlan) -> None:
        raise RuntimeError("the device is lost")

    def collect(self) -> StepResult:
        raise AssertionError("nothing was submitted")


def test_a_failing_step_leaves_every_open_request_to_be_told() -> None:
    core = make_core(worker=BrokenWorker())
    core.submit(request(n=2))
    with pytest.raises(EngineFault, match=r"RuntimeError.*lost"):
        core.step()
    outputs = core.fail_all("the engine failed: the device is lost")
    assert {o.id for o in outputs} == {0, 1}
    assert all(o.finish and o.finish.status_code == 500 for o in outputs)
    assert core.num_open == 0
