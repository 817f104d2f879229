"""The HTTP process's view of the engine: submit requests, follow their completions, run commands, notice its death.

Everything here belongs to one asyncio loop. A completion is *open* from :meth:`EngineClient.submit` until its terminal
output arrives, also if nobody waits for it any more.

The engine knows completions by integers, which are handed out here and never again. What callers call them (``rid``)
stays in this process: it is a label of a call, claimed while somebody follows it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from lorikeet.adapters.views import AdapterViews
from lorikeet.client.intake import Intake, RequestBatch
from lorikeet.client.stream import CompletionStream, OpenCall, OpenRequest
from lorikeet.client.transport import ClientTransport, Commands, ProcessHandle, Silence
from lorikeet.client.turns import TURN_S
from lorikeet.core.commands import Command, R
from lorikeet.core.failure import Failure
from lorikeet.core.messages import (
    Abort,
    Accepted,
    AdaptersChanged,
    AdapterTemplates,
    Failed,
    Outputs,
    Progress,
    Pulse,
    Ready,
    Reply,
    Shutdown,
    Stats,
    Submit,
    ToClient,
    Unreadable,
)
from lorikeet.core.request import RequestOutput
from lorikeet.core.views import EngineInfo
from lorikeet.errors import (
    EngineDeadError,
    EngineFault,
    LorikeetError,
    RequestError,
    UnavailableError,
    UserError,
    full_queue,
)
from lorikeet.metrics import EngineMetrics, Outcome, RequestMetrics
from lorikeet.text.template_sandbox import TemplateSandbox
from lorikeet.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# How often the silence of the engine is looked at.
TICK_S = 0.5
# An engine that gives no sign of life for so long, or half of the time of the watchdog, is not healthy. It may still
# come back. A pulse may be late.
SILENCE_S = 15.0
LEAST_SILENCE_S = 3.0
# How long a question waits that the engine answers between two steps.
QUERY_TIMEOUT_S = 20.0
# The end of the process may be seen before its last messages are read; if somebody waits, they get this long.
LAST_WORDS_S = 0.2


class EngineClient:
    """Speaks to one engine process.

    Args:
        transport: this side's end of the sockets; closed by :meth:`close`.
        process: the engine, watched for its end.
        tokenizer: turns text into tokens and back.
        registry: where the metrics of requests and engine are registered.
        model_name: label of those metrics.
        max_lora: adapters that fit into one batch; None if LoRA is off.
        watchdog_timeout: seconds of silence after which an engine that somebody waits for is given up.

    Attributes:
        info: what the engine says of itself; only after :meth:`start`.
        intake: makes requests of prompts, with the limits of this engine; only after :meth:`start`.
    """

    info: EngineInfo
    intake: Intake

    def __init__(
        self,
        *,
        transport: ClientTransport,
        process: ProcessHandle,
        tokenizer: Tokenizer,
        registry: CollectorRegistry,
        model_name: str,
        max_lora: int | None = None,
        watchdog_timeout: float = 300.0,
    ) -> None:
        self._silence = Silence(TICK_S)
        self._silence_limit = watchdog_timeout
        self._transport = transport
        self._process = process
        self.tokenizer = tokenizer
        self._metrics = RequestMetrics(registry, model_name=model_name)
        self._engine_metrics = EngineMetrics(registry, model_name=model_name, max_lora=max_lora)
        self.adapters = AdapterViews()
        # Names that are loaded -> chat templates that they bring.
        self.adapter_templates: dict[str, dict[str, str]] = {}
        self.templates = TemplateSandbox()
        self._open: dict[int, OpenRequest] = {}
        self._labels: dict[str, OpenCall] = {}
        self._next_id = 0
        self._commands = Commands(transport)
        self._fault: LorikeetError | None = None
        self._started = asyncio.Event()
        self._died = asyncio.Event()  # nothing more is expected of the engine
        self._ended = asyncio.Event()  # its process is gone
        self._on_progress: Callable[[str], None] = logger.info
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, on_progress: Callable[[str], None] = logger.info) -> EngineInfo:
        """Listen to the engine and wait until it serves.

        Args:
            on_progress: told each phase of the engine's start.

        Returns:
            What the engine says of itself.

        Raises:
            UserError: the engine refused its flags or files.
            EngineDeadError: it failed or died.
        """
        self._on_progress = on_progress
        work = (self._listen(), self._watch(), self._watch_silence())
        self._tasks = [asyncio.create_task(self._supervise(item)) for item in work]
        await self._started.wait()
        if self._fault is not None:
            raise self._fault
        return self.info

    async def died(self) -> LorikeetError:
        """Wait until the engine is dead (maybe for ever) and say why."""
        await self._died.wait()
        if self._fault is None:
            raise AssertionError("dead without a reason")
        return self._fault

    async def close(self, *, drain_seconds: float = 0.0) -> None:
        """Tell the engine to end, after at most ``drain_seconds``, and hang up. The caller joins the process."""
        if self._tasks and not self._ended.is_set():
            self._transport.send(Shutdown(drain_seconds))
            with suppress(TimeoutError):
                # Hanging up earlier would drop the Shutdown in the queue and the last outputs.
                async with asyncio.timeout(drain_seconds + 5.0):
                    await self._ended.wait()
                    await self._died.wait()
        self._die(EngineDeadError("the server is shutting down"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._transport.close()
        self.templates.close()

    @property
    def uploads(self) -> Path:
        """A directory that both processes can read, for adapters that clients send. It goes with the server."""
        return self._transport.address.uploads

    @property
    def stats(self) -> Mapping[str, float]:
        """The engine's newest counters and gauges."""
        return self._engine_metrics.values

    @property
    def num_open(self) -> int:
        return len(self._open)

    def check_alive(self) -> None:
        """Raises EngineDeadError if the engine is dead."""
        if self._fault is not None:
            raise EngineDeadError(str(self._fault))

    def check_awake(self) -> None:
        """Raises EngineDeadError if the engine is dead, UnavailableError if its process gives no sign of life."""
        self.check_alive()
        limit = min(SILENCE_S, max(LEAST_SILENCE_S, self._silence_limit / 2))
        if self._silence.pulse > limit or self._silence.exceeds(self._silence_limit):
            raise UnavailableError(f"the engine has given no sign of life for {limit:g} s")

    async def submit(
        self, batch: RequestBatch, *, markers: Collection[int] = ()
    ) -> CompletionStream:
        """Start the requests of one call, all of them or none.

        Returns once the engine has accepted every completion. If it refuses one, or the caller is cancelled, the others
        are aborted. The caller closes the stream.

        Args:
            markers: special tokens that are always part of the text.

        Raises:
            RequestError: a rid is in use, or the engine refused a request.
            EngineFault: the engine failed; EngineDeadError if it is dead, UnavailableError if its queue is full.
        """
        self.check_alive()
        call = self._claim(batch.labels, batch.num_completions)
        first_id = self._next_id
        for index in range(batch.num_completions):
            completion = batch.completion(index, self.tokenizer, markers=markers)
            timer = self._metrics.begin(completion.request.adapter)
            entry = OpenRequest(call, first_id + index, index, completion, timer)
            call.entries.append(entry)
            self._open[entry.number] = entry
        self._next_id += batch.num_completions
        self._transport.send(Submit.of(first_id, batch.requests))
        stream = call.stream
        assert stream is not None
        try:
            await call.accepted
        except BaseException:
            stream.close()
            raise
        return stream

    def abort(self, rid: str | None = None) -> int:
        """End early what the caller calls ``rid``, or all for None; their streams deliver an ``abort``.

        Returns:
            How many completions were open.
        """
        if rid is None:
            self._send_abort(None)  # one message, however many there are
            return sum(entry.is_followed for entry in self._open.values())
        call = self._labels.get(rid)
        entries = [] if call is None else [call.entries[i] for i in call.labels[rid]]
        found = [entry.number for entry in entries if entry.is_followed]
        self._send_abort(found)
        return len(found)

    def cut_off(self, fault: EngineFault) -> int:
        """End every open request and command with ``fault`` now, whether the engine answers or not.

        Returns:
            How many requests were followed.
        """
        self._send_abort(None)
        followed = [entry for entry in self._open.values() if entry.is_followed]
        for entry in followed:
            if entry.call.stream is not None:
                self._forget_labels(entry.call)
                entry.call.fail(fault)
        self._commands.fail(fault)
        return len(followed)

    async def command(self, command: Command[R]) -> R:
        """Ask the engine for something other than tokens.

        If the caller is cancelled, so is the command, where the engine can still undo it (a load that is not complete).

        Raises:
            UserError, EngineFault: the engine's answer was an error.
            EngineDeadError: it is dead.
            UnavailableError: it does not answer a question that costs it nothing.
        """
        self.check_alive()
        timeout = QUERY_TIMEOUT_S if command.is_question else None
        return await self._commands.run(command, timeout=timeout)

    def _claim(self, labels: Mapping[str, list[int]], num_completions: int) -> OpenCall:
        """A new call, whose names are its own from now on: nothing is awaited between the look and the claim."""
        for rid in labels:
            if rid in self._labels:
                raise RequestError(
                    f"rid: {rid!r} is already in use by a running request; allowed: a new one, or none",
                    "rid",
                )
        accepted = asyncio.get_running_loop().create_future()
        call = OpenCall(None, labels, accepted, num_completions, num_completions)
        call.stream = CompletionStream(num_completions, partial(self._abandon, call))
        self._labels.update(dict.fromkeys(labels, call))
        return call

    def _forget_labels(self, call: OpenCall) -> None:
        for rid in call.labels:
            if self._labels.get(rid) is call:
                del self._labels[rid]

    def _send_abort(self, ids: list[int] | None) -> None:
        if self._fault is None and ids != []:
            self._transport.send(Abort(ids))

    def _abandon(self, call: OpenCall) -> None:
        running = [entry.number for entry in call.entries if entry.is_followed]
        self._forget_labels(call)
        call.end()
        self._send_abort(running)

    async def _supervise(self, work: Coroutine[Any, Any, None]) -> None:
        """Run what has to run as long as the engine is used: if it fails, nobody would be answered any more."""
        try:
            await work
        except Exception as error:
            logger.exception("the server's side of the engine failed")
            self._die(
                EngineDeadError(f"an error inside the server: {type(error).__name__}: {error}")
            )

    async def _listen(self) -> None:
        while True:
            for message in await self._transport.recv():
                self._silence.heard(is_pulse=isinstance(message, Pulse))
                if isinstance(message, Outputs):
                    await self._outputs(message.outputs)
                else:
                    self._handle(message)
            # While messages wait, recv() returns without a pause, and nobody would write the streams.
            await asyncio.sleep(0)

    async def _watch(self) -> None:
        """Wait for the end of the process."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._process.sentinel, self._ended.set)
        try:
            await self._ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)
        if self._open or self._commands.num_waiting or not self._started.is_set():
            await asyncio.sleep(LAST_WORDS_S)
        self._die(
            EngineDeadError(f"the engine process has ended (exit code {self._process.exitcode})")
        )

    async def _watch_silence(self) -> None:
        """End everything when somebody waits for an engine that has said nothing for too long."""
        await self._started.wait()
        self._silence.heard()
        limit = self._silence_limit
        while not self._silence.exceeds(limit) or not (self._open or self._commands.num_waiting):
            await asyncio.sleep(TICK_S)
            self._silence.tick()
        if self._fault is None:
            logger.error("the engine has said nothing for %g s; it is killed", limit)
            self._die(
                EngineDeadError(f"the engine has said nothing for {limit:g} s (--watchdog-timeout)")
            )
            self._process.kill()

    async def _outputs(self, outputs: Sequence[RequestOutput]) -> None:
        """Take in what a step brought, and give others their turn where it takes long."""
        began = time.perf_counter()
        for output in outputs:
            if time.perf_counter() - began > TURN_S:
                await asyncio.sleep(0)
                began = time.perf_counter()
                if self._fault is not None:
                    return  # meanwhile everybody was told
            entry = self._open.get(output.id)
            if entry is None:
                logger.error("an output of the unknown completion %d", output.id)
                continue
            self._output(entry, output)

    def _handle(self, message: ToClient | Unreadable) -> None:
        match message:
            case Accepted(ids):
                self._accept(ids)
            case Reply():
                self._commands.reply(message)
            case Stats(values, labels, samples):
                self._engine_metrics.update(values, labels, samples)
            case AdaptersChanged() | AdapterTemplates():
                self._note_adapters(message)
            case Progress(phase):
                self._on_progress(phase)
            case Ready(info):
                self._ready(info)
            case Failed(failure):
                error = failure.error()
                self._die(error if isinstance(error, UserError) else EngineDeadError(str(error)))
            case Unreadable():
                self._tell_unreadable(message)
            case _:  # a sign of life, or outputs, which _listen takes
                pass

    def _tell_unreadable(self, message: Unreadable) -> None:
        """Somebody's answer has come and means nothing: a fault for those whom it names."""
        reason = f"a message of the engine cannot be read: {message.reason}"
        logger.error("%s", reason)
        if message.command is not None:
            self._commands.reply(Reply(message.command, failure=Failure("failed", reason)))
        entries = [entry for item in message.ids if (entry := self._open.get(item)) is not None]
        for entry in entries:
            self._lose(entry, reason)
        if message.command is None and not entries:
            self._die(EngineDeadError(reason))  # whoever waits for it would wait for ever

    def _lose(self, entry: OpenRequest, reason: str) -> None:
        """One completion cannot be followed any more."""
        if entry.completion.finish is None:
            entry.completion.fail(reason)
        if not entry.is_over:
            self._publish(entry)
        if entry.number in self._open:  # the engine goes on with it
            self._send_abort([entry.number])

    def _note_adapters(self, message: AdaptersChanged | AdapterTemplates) -> None:
        if isinstance(message, AdaptersChanged):
            self.adapters.apply(message)
        else:
            message.apply(self.adapter_templates)

    def _check_room(self, num_new: int) -> None:
        """Refuse what the engine would refuse, before it is made. Those that do not fit into its batch wait at least.

        Raises:
            UnavailableError: too many wait already.
        """
        limit = self.info.max_queued_requests
        if limit is None:
            return
        num_waiting = len(self._open) - self.info.max_running_requests
        if num_waiting > 0 and num_waiting + num_new > limit:
            raise UnavailableError(full_queue(num_waiting, num_new, limit))

    def _accept(self, ids: list[int]) -> None:
        for number in ids:
            entry = self._open.get(number)
            if entry is not None:
                entry.call.accept(entry)

    def _ready(self, info: EngineInfo) -> None:
        self.info = info
        self.intake = Intake(
            self.tokenizer,
            vocab_size=info.vocab_size,
            context_length=info.context_length,
            check_room=self._check_room,
        )
        self._started.set()

    def _output(self, entry: OpenRequest, output: RequestOutput) -> None:
        if output.finish is not None:
            del self._open[entry.number]
        try:
            if entry.completion.finish is None:
                self._take(entry, output)
        except Exception as error:
            logger.exception("an output could not be taken in")
            self._lose(entry, f"an error inside the server: {type(error).__name__}: {error}")
        if output.finish is not None:
            self._record_end(entry)

    def _take(self, entry: OpenRequest, output: RequestOutput) -> None:
        entry.timer.tokens(len(output.token_ids))
        if entry.completion.add(output):
            self._send_abort([output.id])  # ended by a stop string, which the engine cannot see
        self._publish(entry)

    def _publish(self, entry: OpenRequest) -> None:
        """Tell whoever follows that a completion has grown or finished."""
        call, finish = entry.call, entry.completion.finish
        # A terminal output without Accepted before it: refused, or aborted while it waited.
        error = None if finish is None or entry.is_accepted else finish.error()
        if error is None:
            call.accept(entry)
        else:
            call.refuse(error)
        if call.stream is not None:
            call.stream.update(entry.index, entry.completion)
        if finish is not None:
            call.finish(entry)
            if not call.num_running:
                self._forget_labels(call)
                call.end()

    def _record_end(self, entry: OpenRequest) -> None:
        """The terminal output is here."""
        finish, snapshot = entry.completion.finish, entry.completion.snapshot()
        if finish is None:
            raise AssertionError("a terminal output did not finish its completion")
        outcome: Outcome = "error" if finish.error() is not None else finish.kind
        entry.timer.end(
            outcome,
            num_prompt_tokens=snapshot.prompt_tokens,
            num_cached_tokens=snapshot.cached_tokens,
        )

    def _die(self, fault: LorikeetError) -> None:
        """The engine is lost: everyone who waits for it is told, once."""
        if self._fault is not None:
            return
        self._fault = fault
        dead = EngineDeadError(str(fault))
        for entry in self._open.values():
            entry.call.fail(dead)
            entry.timer.end("error", num_prompt_tokens=0, num_cached_tokens=0)
        self._open.clear()
        self._labels.clear()
        self._commands.fail(dead)
        self._started.set()
        self._died.set()
