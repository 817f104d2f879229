"""The engine: requests in, outputs out, one ``plan -> submit -> collect -> commit`` at a time.

With overlap, step n+1 is planned and submitted before step n is collected: the device always has the next step in its
queue while the host reads, commits and plans.

:class:`EngineCore` knows nothing of processes or sockets. ``engine/child.py`` runs it behind a socket for the HTTP
server; :class:`lorikeet.LLM` runs it in the caller's own process.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, assert_never, cast

import msgspec

from lorikeet.adapters.store import AdapterStore
from lorikeet.config import LoRAPath
from lorikeet.core.adapters import HostBytes
from lorikeet.core.commands import (
    AnyCommand,
    Command,
    FindAdapter,
    FlushCache,
    ListAdapters,
    LoadAdapter,
    LoadAdapterFromTensors,
    LoadOutcome,
    R,
    UnloadAdapter,
)
from lorikeet.core.failure import Failure, FailureKind
from lorikeet.core.plan import StepPlan, StepResult
from lorikeet.core.request import FinishReason, Request, RequestOutput, SamplingParams
from lorikeet.core.sequence import Sequence
from lorikeet.core.views import EngineInfo
from lorikeet.engine.step_log import StepLog
from lorikeet.errors import (
    AdapterNotFoundError,
    EngineFault,
    LorikeetError,
    OutOfMemoryError,
    RequestError,
    UnavailableError,
    UserError,
    full_queue,
)
from lorikeet.kv.manager import KVManager
from lorikeet.names import MAX_PATH, check_adapter_name, check_name
from lorikeet.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """One rank, as the loop sees it (tests put a double in its place)."""

    @property
    def max_ahead(self) -> int:
        """Steps that may be submitted before the oldest one is collected: 1 with overlap, else 0."""
        ...

    @property
    def host(self) -> HostBytes | None:
        """Adapters in host memory: what is read, kept and dropped there, beside the steps. None without LoRA."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Begin a step, behind those that were submitted before.

        Raises:
            OutOfMemoryError: nothing of it was computed or copied.
        """
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest step that was submitted."""
        ...


@dataclass(slots=True)
class _Open:
    """A completion between its submission and its terminal output."""

    request: Request  # shared with the others of its prompt
    sample: int
    version: int | None  # None while the resolver looks for its adapter
    call: int | None = None  # id of the first completion of its call
    grammar: object = None  # held, so that the worker finds it
    is_started: bool = False  # not while that happens or its grammar compiles


class EngineCore:
    """One scheduler, one worker, and the completions that are open, by their ids.

    Args:
        adapters: which there are; also what has changed about them, for whoever tells it on.
        compile_grammar: begins to check and compile a request's grammar, elsewhere, since a large schema takes longer
            than a step. Cancelling the future ends that, unless others wait for the same.
        seeds: gives the sampling seed of a request that brings none.
        info: what was decided at the start.
        on_close: ends what the worker has started.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        kv: KVManager,
        worker: Executor,
        adapters: AdapterStore,
        compile_grammar: Callable[[SamplingParams], Future[Any]],
        seeds: Callable[[], int],
        info: EngineInfo,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._scheduler = scheduler
        self._kv = kv
        self._worker = worker
        self.adapters = adapters
        self._compile_grammar = compile_grammar
        self._seeds = seeds
        self.info = info
        self._on_close = on_close
        self._in_flight: deque[StepPlan] = deque()
        self._open: dict[int, _Open] = {}
        self._compiling: dict[int, Future[Any]] = {}
        self._finding: dict[int, Future[None]] = {}
        self._accepted: list[int] = []
        self._outputs: list[RequestOutput] = []
        self._next_id = 0
        self._log = StepLog(logger, scheduler.stats)

    @property
    def num_open(self) -> int:
        return len(self._open)

    def is_open(self, number: int) -> bool:
        """True between a completion's submission and its terminal output."""
        return number in self._open

    @property
    def has_steps(self) -> bool:
        """True if a step may have something to compute or to release."""
        return self._scheduler.has_work or bool(self._outputs or self._in_flight)

    @property
    def is_idle(self) -> bool:
        """True if nothing is open, no step runs and every output has been collected."""
        return not (self._open or self._outputs or self._in_flight)

    @property
    def waits_for_threads(self) -> bool:
        """True if a step may find something that a thread has finished: a grammar, an adapter."""
        return bool(self._compiling or self._finding) or self.adapters.is_waiting

    def check_queue(self, num_new: int) -> None:
        """Ask whether the requests of one call may wait, all of them.

        Those that wait for room, for their adapter or for their grammar count, preempted ones too. A call that finds
        nobody waiting is always taken, or one larger than the limit would never be.

        Raises:
            UnavailableError: too many wait already.
        """
        limit = self._scheduler.limits.max_queued
        waiting = self._scheduler.num_waiting + len(self._finding) + len(self._compiling)
        if limit is not None and waiting and waiting + num_new > limit:
            raise UnavailableError(full_queue(waiting, num_new, limit))

    def submit(self, request: Request, first_id: int | None = None, call: int | None = None) -> int:
        """Take a request. Each completion ends in exactly one terminal output; a refusal is one with a status of 400.

        Args:
            first_id: of its completions, which are numbered from there on; above every id so far. None is the next one.
            call: id of the first completion of the call that the request is part of, which then leaves room for others
                (``scheduler/queue.py``). None: each of its completions counts as a call of its own.

        Returns:
            the first id.

        Raises:
            EngineFault: an id has been used.
        """
        if first_id is None:
            first_id = self._next_id
        if first_id < self._next_id:
            # Whoever has the id keeps it: a refusal under it would be delivered to somebody else.
            raise EngineFault(
                f"completion {first_id} comes too late: ids below {self._next_id} have been used"
            )
        self._next_id = first_id + request.num_samples
        for sample in range(request.num_samples):
            self._take(first_id + sample, request, sample, call)
        return first_id

    def _take(self, number: int, request: Request, sample: int, call: int | None) -> None:
        try:
            version = self.adapters.lease(request.adapter, number)
        except AdapterNotFoundError as error:
            found = self._find(request.adapter)
            if found is None:
                self._outputs.append(_refusal(number, error))
            else:
                self._open[number] = _Open(request, sample, None, call)
                self._finding[number] = found
            return
        except UserError as error:
            self._outputs.append(_refusal(number, error))
            return
        self._open[number] = _Open(request, sample, version, call)
        self._prepare(number)

    def abort(self, number: int | None, message: str, kind: FailureKind = "aborted") -> None:
        """End one completion (or all, for None) with an ``abort``; unknown ids are too late and mean nothing.

        Args:
            kind: of the failure; ``aborted`` is an end that was asked for.
        """
        reason = FinishReason(kind="abort", failure=Failure(kind, message))
        for key in list(self._open) if number is None else [number]:
            entry = self._open.get(key)
            if entry is None:
                continue
            if entry.is_started:
                self._scheduler.abort(key, reason)
                continue
            future = self._finding.pop(key, None) or self._compiling.pop(key, None)
            if future is not None:
                future.cancel()
            self._finish_unstarted(RequestOutput(id=key, token_ids=[], finish=reason))

    def command(self, command: Command[R]) -> R | Future[R]:
        """Run one of the engine's commands.

        Returns:
            its answer, or a ``Future`` of it that a later step resolves; cancel that to drop what is not done yet.

        Raises:
            UserError: it cannot be done.
        """
        return cast("R | Future[R]", self._command(cast("AnyCommand", command)))

    def _command(self, command: AnyCommand) -> object:
        match command:
            case FlushCache():
                return self._flush_cache()
            case ListAdapters(name):
                return self.adapters.describe(name)
            case FindAdapter(name):
                return self._find_adapter(name)
            case LoadAdapter():
                return self._load_adapter(command)
            case LoadAdapterFromTensors():
                return self._load_adapter_from_tensors(command)
            case UnloadAdapter(name, timeout):
                return self.adapters.start_unload(name, timeout=timeout)
            case _:
                assert_never(command)

    def step(self) -> list[RequestOutput]:
        """Submit the next step, commit the oldest one that is due, and return what is new.

        With overlap the first of a row of steps returns nothing yet.

        Raises:
            EngineFault: something failed that was not one request's work alone. Pages, slots, leases and what the device
                computes may disagree from now on: this is where the engine ends. Whatever fails for one request (its
                adapter, its grammar) ends that request in place of this.
        """
        try:
            return self._step()
        except EngineFault:
            raise
        except Exception as error:
            raise EngineFault(f"{type(error).__name__}: {error}") from error

    def _step(self) -> list[RequestOutput]:
        self.adapters.poll()
        self._collect_found()
        self._collect_compiled()
        plan = self._scheduler.plan()
        if plan is not None:
            self._submit(plan)
        if self._in_flight and (plan is None or len(self._in_flight) > self._worker.max_ahead):
            self._commit_oldest()
        return self.drain()

    def take_accepted(self) -> list[int]:
        """Ids of completions that passed every check since the last call."""
        accepted, self._accepted = self._accepted, []
        return accepted

    def wait_for_threads(self) -> None:
        """Block until a thread has finished something, if nothing else can be done meanwhile (offline use)."""
        futures = [*self._compiling.values(), *self.adapters.pending()]
        if futures and not self.has_steps:
            wait(futures, return_when=FIRST_COMPLETED)

    def stats(self) -> dict[str, float]:
        """Gauges and counters of scheduler and adapters by name, as numbers."""
        stats = self._scheduler.stats()
        numbers = {k: float(v) for k, v in asdict(stats).items() if isinstance(v, int | float)}
        return numbers | {"token_usage": stats.token_usage} | self.adapters.stats()

    def labels(self) -> dict[str, list[str]]:
        """Names of the adapters that run, and of those that requests wait for."""
        stats = self._scheduler.stats()
        return {
            "running_lora_adapters": self.adapters.names(stats.running_versions),
            "waiting_lora_adapters": self.adapters.names(stats.waiting_versions),
        }

    def close(self) -> None:
        """End all threads and remove temporary files."""
        self._on_close()

    def fail_all(self, message: str) -> list[RequestOutput]:
        """The engine is lost: a terminal output for every open completion."""
        reason = FinishReason(kind="abort", failure=Failure("failed", message))
        outputs = [RequestOutput(id=key, token_ids=[], finish=reason) for key in self._open]
        self._open.clear()
        return outputs

    def check_integrity(self) -> None:
        """Raise AssertionError if pages, slots, leases or states disagree (tests; and when idle)."""
        self._scheduler.check_integrity()
        self.adapters.check_integrity(
            {key: entry.version for key, entry in self._open.items() if entry.version is not None}
        )

    def _submit(self, plan: StepPlan) -> None:
        try:
            self._worker.submit(plan)
        except OutOfMemoryError as error:
            logger.exception("a step had no memory; as few requests as possible are aborted")
            while self._in_flight:
                self._commit_oldest()
            self._scheduler.fail(plan, str(error))
        else:
            self._in_flight.append(plan)

    def _commit_oldest(self) -> None:
        result = self._worker.collect()
        plan = self._in_flight.popleft()
        self._scheduler.commit(plan, result)
        self.adapters.note_copied(result.copied)
        self._log.step(plan)

    def _prepare(self, number: int) -> None:
        """A completion has its adapter; next comes its grammar, if it has one."""
        sampling = self._open[number].request.sampling
        if sampling.grammar is None:
            self._start(number)
        else:
            self._compiling[number] = self._compile_grammar(sampling)

    def _start(self, number: int) -> None:
        entry = self._open[number]
        assert entry.version is not None
        seed = entry.request.seed(entry.sample)
        sequence = Sequence(
            id=number,
            request=entry.request,
            version=entry.version,
            seed=self._seeds() if seed is None else seed,
            call=entry.call,
        )
        try:
            self._scheduler.add(sequence)
        except RequestError as error:
            self._finish_unstarted(_refusal(number, error))
            return
        entry.is_started = True
        self._accepted.append(number)

    def _collect_found(self) -> None:
        """Completions whose adapter the resolver has found, or has not."""
        for number in [number for number, future in self._finding.items() if future.done()]:
            entry, found = self._open[number], self._finding.pop(number)
            error = None if found.cancelled() else found.exception()
            try:
                if error is not None and not isinstance(error, AdapterNotFoundError):
                    raise error
                # Not found: the same words as without a resolver.
                entry.version = self.adapters.lease(entry.request.adapter, number)
            except Exception as refusal:
                if not isinstance(refusal, LorikeetError):
                    logger.exception("the adapter of a request could not be found")
                self._finish_unstarted(_refusal(number, refusal))
            else:
                self._prepare(number)

    def _collect_compiled(self) -> None:
        for number in [number for number, future in self._compiling.items() if future.done()]:
            entry, future = self._open[number], self._compiling.pop(number)
            error = future.exception()
            if error is None:
                entry.grammar = future.result()
                self._start(number)
                continue
            if not isinstance(error, LorikeetError):
                logger.error("completion %d: compiling its grammar failed", number, exc_info=error)
                error = EngineFault(f"compiling a grammar failed: {error}")
            self._finish_unstarted(_refusal(number, error))

    def _finish_unstarted(self, output: RequestOutput) -> None:
        self._forget(output.id)
        self._outputs.append(output)

    def drain(self) -> list[RequestOutput]:
        """Outputs that need no step: refusals and aborts. Ends worker state with the next step."""
        outputs, self._outputs = self._outputs, []
        for output in self._scheduler.drain():
            if output.finish is not None:
                self._forget(output.id)
            outputs.append(output)
        return outputs

    def _forget(self, number: int) -> None:
        version = self._open.pop(number).version
        if version is not None:
            self.adapters.release(version, number)

    def _load_adapter(self, command: LoadAdapter) -> Future[LoadOutcome]:
        self._check_name(command.name)
        check_name(command.path, "lora_path", most=MAX_PATH)
        source = LoRAPath(command.name, command.path, pinned=command.pinned)
        return self.adapters.start_load(source, replace=command.replace)

    def _load_adapter_from_tensors(self, command: LoadAdapterFromTensors) -> Future[LoadOutcome]:
        self._check_name(command.name)
        weights = Path(command.weights)
        return self.adapters.load_tensors(
            command.name, command.config, weights, pinned=command.pinned
        )

    def _check_name(self, name: str) -> None:
        """Refuse a name that requests could not use, or that means something else to them."""
        check_adapter_name(name, self.info.served_model_name)

    def _find(self, name: str | None) -> Future[None] | None:
        """Let the resolver look for a name, if it may be an adapter's."""
        try:
            self._check_name(name or "")
        except RequestError:
            return None
        return self.adapters.find(name)

    def _find_adapter(self, name: str) -> Future[None] | None:
        """Let the resolver look for a name that is not loaded."""
        found = self._find(name)
        if found is None:
            return None
        # Whether it was found is seen by asking for the name again; why it was not, as well.
        reply: Future[None] = Future()

        def finish(_: Future[None]) -> None:
            if reply.set_running_or_notify_cancel():
                reply.set_result(None)

        found.add_done_callback(finish)
        reply.add_done_callback(lambda reply: reply.cancelled() and found.cancel())
        return reply

    def _flush_cache(self) -> bool:
        """Forget every cached prefix; only when nothing runs, since running sequences read those pages."""
        is_idle = not (self._scheduler.num_waiting or self._scheduler.num_running)
        if is_idle:
            self._kv.flush()
        return is_idle


def _refusal(number: int, error: BaseException) -> RequestOutput:
    failure = Failure.of(error)
    if failure.kind == "not_found":
        # The adapter's name is a field of the request, and is refused like the value of any other.
        failure = msgspec.structs.replace(failure, kind="refused")
    reason = FinishReason(kind="abort", failure=failure)
    return RequestOutput(id=number, token_ids=[], finish=reason)
