"""The engine: requests in, outputs out, one ``plan -> execute -> commit`` at a time.

:class:`EngineCore` knows nothing of processes or sockets. ``engine/child.py`` runs it behind a socket for the HTTP
server; :class:`lorikeet.LLM` runs it in the caller's own process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Protocol

from lorikeet.core.plan import StepPlan, StepResult
from lorikeet.core.request import FinishReason, Request, RequestOutput, SamplingParams
from lorikeet.core.sequence import Sequence
from lorikeet.engine.adapters import AdapterStore
from lorikeet.engine.step_log import StepLog
from lorikeet.errors import EngineFault, RequestError, UserError
from lorikeet.kv.manager import KVManager
from lorikeet.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """What the loop needs of a worker (tests put a double in its place)."""

    def execute(self, plan: StepPlan) -> StepResult: ...


@dataclass(slots=True)
class _Open:
    """A request between its submission and its terminal output."""

    request: Request
    version: int
    seq: int | None = None  # None while its grammar compiles


class EngineCore:
    """One scheduler, one worker, and the requests that are open.

    Args:
        compile_grammar: checks and compiles a request's grammar; runs on a thread of its own, since a large schema
            takes longer than a step.
        seeds: gives the sampling seed of a request that brings none.
        info: what ``Ready.info`` and the ``info`` command report.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        kv: KVManager,
        worker: Executor,
        adapters: AdapterStore,
        compile_grammar: Callable[[SamplingParams], None],
        seeds: Callable[[], int],
        info: dict[str, object],
    ) -> None:
        self._scheduler = scheduler
        self._kv = kv
        self._worker = worker
        self._adapters = adapters
        self._compile_grammar = compile_grammar
        self._seeds = seeds
        self._info = info
        self._open: dict[str, _Open] = {}
        self._compiling: dict[str, Future[None]] = {}
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._accepted: list[str] = []
        self._outputs: list[RequestOutput] = []
        self._next_seq = 0
        self._log = StepLog(logger)
        self._commands: dict[str, Callable[..., object]] = {
            "flush_cache": self._flush_cache,
            "info": lambda: self._info | self.stats(),
            "adapters": adapters.describe,
        }

    @property
    def info(self) -> dict[str, object]:
        return self._info

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def has_steps(self) -> bool:
        """True if a step may have something to compute or to release."""
        return self._scheduler.has_work or bool(self._outputs)

    @property
    def is_idle(self) -> bool:
        """True if nothing is open and every output has been collected."""
        return not (self._open or self._outputs)

    @property
    def is_compiling(self) -> bool:
        return bool(self._compiling)

    def submit(self, request: Request) -> None:
        """Take a request. It ends in exactly one terminal output; a refusal is one with a status of 400."""
        if request.rid in self._open:
            # The one already open keeps the id, so this refusal cannot be delivered under it to anybody else's
            # stream: the client refuses duplicates before they get here.
            raise RequestError(f"rid {request.rid!r} is already in use by a running request", "rid")
        try:
            version = self._adapters.lease(request.adapter)
        except UserError as error:
            self._outputs.append(_refusal(request, error))
            return
        self._open[request.rid] = _Open(request, version)
        if request.sampling.grammar is None:
            self._start(request.rid)
        else:
            self._compiling[request.rid] = self._threads.submit(
                self._compile_grammar, request.sampling
            )

    def abort(self, rid: str | None, message: str) -> None:
        """End one request (or all, for None) with an ``abort``; unknown ids are too late and mean nothing."""
        reason = FinishReason(kind="abort", message=message)
        for key in list(self._open) if rid is None else [rid]:
            entry = self._open.get(key)
            if entry is None:
                continue
            if entry.seq is None:
                future = self._compiling.pop(key, None)
                if future is not None:
                    future.cancel()
                self._finish_unstarted(key, RequestOutput(rid=key, token_ids=[], finish=reason))
            else:
                self._scheduler.abort(entry.seq, reason)

    def command(self, name: str, args: dict[str, object]) -> object:
        """Run one of the engine's commands.

        Raises:
            RequestError: there is no such command.
        """
        handler = self._commands.get(name)
        if handler is None:
            raise RequestError(f"unknown command {name!r}; known: {', '.join(self._commands)}")
        return handler(**args)

    def step(self) -> list[RequestOutput]:
        """Advance every running sequence by one step and return what is new."""
        self._collect_compiled()
        plan = self._scheduler.plan()
        if plan is not None:
            result = self._worker.execute(plan)
            self._scheduler.commit(plan, result)
            self._log.step(plan, self._scheduler.stats())
        return self._collect()

    def take_accepted(self) -> list[str]:
        """Ids of requests that passed every check since the last call."""
        accepted, self._accepted = self._accepted, []
        return accepted

    def drain(self) -> list[RequestOutput]:
        """Outputs that need no step: refusals and aborts. Ends worker state with the next step."""
        return self._collect()

    def wait_for_grammars(self) -> None:
        """Block until a grammar has compiled, if nothing else can be done meanwhile (offline use)."""
        if self._compiling and not self.has_steps:
            wait(self._compiling.values(), return_when=FIRST_COMPLETED)

    def stats(self) -> dict[str, float]:
        """Gauges and counters of the scheduler by name, as numbers."""
        stats = self._scheduler.stats()
        return {name: float(value) for name, value in asdict(stats).items()} | {
            "token_usage": stats.token_usage
        }

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def fail_all(self, message: str) -> list[RequestOutput]:
        """The engine is lost: a terminal output for every open request."""
        reason = FinishReason(kind="abort", message=message, status_code=500)
        outputs = [RequestOutput(rid=rid, token_ids=[], finish=reason) for rid in self._open]
        self._open.clear()
        return outputs

    def check_integrity(self) -> None:
        """Raise AssertionError if pages, slots, leases or states disagree (tests; and when idle)."""
        self._scheduler.check_integrity()
        self._adapters.check_integrity({rid: entry.version for rid, entry in self._open.items()})

    def _start(self, rid: str) -> None:
        entry = self._open[rid]
        seed = entry.request.sampling.sampling_seed
        sequence = Sequence(
            id=self._next_seq,
            request=entry.request,
            version=entry.version,
            seed=self._seeds() if seed is None else seed,
        )
        try:
            self._scheduler.add(sequence)
        except RequestError as error:
            self._finish_unstarted(rid, _refusal(entry.request, error))
            return
        entry.seq = sequence.id
        self._next_seq += 1
        self._accepted.append(rid)

    def _collect_compiled(self) -> None:
        for rid in [rid for rid, future in self._compiling.items() if future.done()]:
            error = self._compiling.pop(rid).exception()
            if error is None:
                self._start(rid)
            elif isinstance(error, UserError):
                self._finish_unstarted(rid, _refusal(self._open[rid].request, error))
            else:
                raise EngineFault("compiling a grammar failed") from error

    def _finish_unstarted(self, rid: str, output: RequestOutput) -> None:
        self._adapters.release(self._open.pop(rid).version)
        self._outputs.append(output)

    def _collect(self) -> list[RequestOutput]:
        outputs, self._outputs = self._outputs, []
        for output in self._scheduler.drain():
            if output.finish is not None:
                self._adapters.release(self._open.pop(output.rid).version)
            outputs.append(output)
        return outputs

    def _flush_cache(self) -> dict[str, object]:
        """Forget every cached prefix; only when nothing runs, since running sequences read those pages."""
        idle = not (self._scheduler.num_waiting or self._scheduler.num_running)
        if idle:
            self._kv.flush()
        return {"success": idle}


def _refusal(request: Request, error: UserError) -> RequestOutput:
    reason = FinishReason(kind="abort", message=str(error), status_code=error.status_code)
    return RequestOutput(rid=request.rid, token_ids=[], finish=reason)
