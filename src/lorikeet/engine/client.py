"""The HTTP process's view of the engine: submit requests, follow their completions, run commands, notice its death.

Everything here belongs to one asyncio loop. A request is *open* from :meth:`EngineClient.submit` until its terminal
output arrives; its id cannot be used again before that, also if nobody waits for it any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any

from prometheus_client import CollectorRegistry

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
from lorikeet.core.request import Request, RequestOutput
from lorikeet.engine.adapter_views import AdapterViews
from lorikeet.engine.commands import Commands
from lorikeet.engine.completion import Completion
from lorikeet.engine.intake import Intake
from lorikeet.engine.open_request import OpenRequest
from lorikeet.engine.silence import Silence
from lorikeet.engine.stream import CompletionStream, finish_error
from lorikeet.engine.template_sandbox import TemplateSandbox
from lorikeet.engine.tokenizer import Tokenizer
from lorikeet.engine.transport import ClientTransport, ProcessHandle
from lorikeet.errors import (
    EngineDeadError,
    EngineFault,
    LorikeetError,
    RequestError,
    UnavailableError,
    UserError,
)
from lorikeet.metrics import EngineMetrics, Outcome, RequestMetrics

logger = logging.getLogger(__name__)

# How often the silence of the engine is looked at.
TICK_S = 0.5
# An engine that gives no sign of life for so long, or half of the time of the watchdog, is not healthy. It may still
# come back. A pulse may be late.
SILENCE_S = 15.0
LEAST_SILENCE_S = 3.0
# Questions that the engine answers between two steps, and how long they wait.
QUERIES = ("adapters", "info", "flush_cache")
QUERY_TIMEOUT_S = 20.0
# Outputs taken in before other coroutines of the HTTP process get their turn.
MAX_OUTPUTS = 64
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
    """

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
        self._open: dict[str, OpenRequest] = {}
        self._commands = Commands(transport)
        self._fault: LorikeetError | None = None
        self._info: dict[str, Any] | None = None
        self._intake: Intake | None = None
        self._started = asyncio.Event()
        self._died = asyncio.Event()  # nothing more is expected of the engine
        self._ended = asyncio.Event()  # its process is gone
        self._on_progress: Callable[[str], None] = logger.info
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, on_progress: Callable[[str], None] = logger.info) -> dict[str, Any]:
        """Listen to the engine and wait until it serves.

        Args:
            on_progress: told each phase of the engine's start.

        Returns:
            What the engine says of itself (``Ready.info``).

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
    def info(self) -> dict[str, Any]:
        """``Ready.info``; only after :meth:`start`."""
        if self._info is None:
            raise AssertionError("the engine is not ready yet")
        return self._info

    @property
    def intake(self) -> Intake:
        """Makes requests of prompts, with the limits of this engine; only after :meth:`start`."""
        if self._intake is None:
            raise AssertionError("the engine is not ready yet")
        return self._intake

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
        self,
        requests: Sequence[Request],
        groups: Mapping[str, str] | None = None,
        *,
        markers: Collection[int] = (),
    ) -> CompletionStream:
        """Start the requests of one call, all of them or none.

        Returns once the engine has accepted every one. If it refuses one, or the caller is cancelled, the others are
        aborted. The caller closes the stream.

        Args:
            groups: id of a request -> the id that it was expanded from; :meth:`abort` takes that one, too.
            markers: special tokens that are always part of the text.

        Raises:
            RequestError: an id is in use, or the engine refused a request.
            EngineFault: the engine failed; EngineDeadError if it is dead, UnavailableError if its queue is full.
        """
        await self._wait_for_ids(requests)
        stream = CompletionStream(len(requests), self._abandon)
        made = [Completion(request, self.tokenizer, markers=markers) for request in requests]
        entries = [
            self._begin(stream, index, item, (groups or {}).get(item.request.rid))
            for index, item in enumerate(made)
        ]
        self._transport.send(Submit([entry.request for entry in entries]))
        try:
            await asyncio.gather(*(entry.accepted for entry in entries))
        except BaseException:
            stream.close()
            raise
        return stream

    def abort(self, rid: str | None = None) -> int:
        """End the request or the group ``rid``, or all for None, early; their streams deliver an ``abort``.

        Returns:
            How many were open.
        """
        found = [
            key
            for key, entry in self._open.items()
            if entry.stream is not None and (rid is None or rid in (key, entry.group))
        ]
        if rid is None:
            self._send_abort(None)  # one message, however many there are
            return len(found)
        for key in found:
            self._send_abort(key)
        return len(found)

    def cut_off(self, fault: EngineFault) -> int:
        """End every open request and command with ``fault`` now, whether the engine answers or not.

        Returns:
            How many requests were followed.
        """
        self._send_abort(None)
        followed = [entry for entry in self._open.values() if entry.stream is not None]
        for entry in followed:
            entry.fail(fault)
        self._commands.fail(fault)
        return len(followed)

    async def command(self, name: str, /, **args: object) -> Any:
        """Ask the engine for something other than tokens.

        If the caller is cancelled, so is the command, where the engine can still undo it (a load that is not complete).

        Raises:
            UserError, EngineFault: the engine's answer was an error, by its status.
            EngineDeadError: it is dead.
            UnavailableError: it does not answer a question that costs it nothing.
        """
        self.check_alive()
        timeout = QUERY_TIMEOUT_S if name in QUERIES else None
        return await self._commands.run(name, args, timeout=timeout)

    async def _wait_for_ids(self, requests: Sequence[Request]) -> None:
        """Wait until ids that nobody follows any more are free; refuse those that are in use."""
        for request in requests:
            while (entry := self._open.get(request.rid)) is not None:
                if entry.stream is not None:
                    raise RequestError(
                        f"rid: {request.rid!r} is already in use by a running request", "rid"
                    )
                await entry.released.wait()
        self.check_alive()
        if len({request.rid for request in requests}) < len(requests):
            raise RequestError("rid: the requests of one call need different ids", "rid")

    def _begin(
        self, stream: CompletionStream, index: int, completion: Completion, group: str | None
    ) -> OpenRequest:
        request = completion.request
        entry = OpenRequest(
            request=request,
            completion=completion,
            timer=self._metrics.begin(request.adapter),
            index=index,
            group=group or request.rid,
            stream=stream,
            accepted=asyncio.get_running_loop().create_future(),
        )
        self._open[request.rid] = entry
        return entry

    def _send_abort(self, rid: str | None) -> None:
        if self._fault is None:
            self._transport.send(Abort(rid))

    def _abandon(self, stream: CompletionStream) -> None:
        for rid, entry in self._open.items():
            if entry.stream is stream:
                entry.stream = None
                self._send_abort(rid)

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
        """Take in what a step brought, and let others have their turn where it ends thousands at once."""
        for number, output in enumerate(outputs, 1):
            entry = self._open.get(output.rid)
            if self._fault is not None:
                return  # meanwhile everybody was told
            if entry is None:
                logger.error("an output of the unknown request %r", output.rid)
                continue
            try:
                self._output(entry, output)
            except Exception as error:
                logger.exception("an output could not be taken in")
                self._lose(entry, f"an error inside the server: {type(error).__name__}: {error}")
            if number % MAX_OUTPUTS == 0:
                await asyncio.sleep(0)

    def _handle(self, message: ToClient | Unreadable) -> None:
        match message:
            case Accepted(rid):
                self._accept(rid)
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
            case Failed(text, user_error):
                self._die(UserError(text) if user_error else EngineDeadError(text))
            case Unreadable():
                self._tell_unreadable(message)
            case _:  # a sign of life, or outputs, which _listen takes
                pass

    def _tell_unreadable(self, message: Unreadable) -> None:
        """Somebody's answer has come and means nothing: a fault for those whom it names."""
        reason = f"a message of the engine cannot be read: {message.reason}"
        logger.error("%s", reason)
        if message.command is not None:
            self._commands.reply(Reply(message.command, error=reason, status_code=500))
        entries = [entry for rid in message.rids if (entry := self._open.get(rid)) is not None]
        for entry in entries:
            self._lose(entry, reason)
        if message.command is None and not entries:
            self._die(EngineDeadError(reason))  # whoever waits for it would wait for ever

    def _lose(self, entry: OpenRequest, reason: str) -> None:
        """One request cannot be followed any more; its id is free when the engine has ended it."""
        entry.fail(EngineFault(reason))
        self._send_abort(entry.request.rid)

    def _note_adapters(self, message: AdaptersChanged | AdapterTemplates) -> None:
        if isinstance(message, AdaptersChanged):
            self.adapters.apply(message)
        else:
            message.apply(self.adapter_templates)

    def _accept(self, rid: str) -> None:
        entry = self._open.get(rid)
        if entry is not None and not entry.accepted.done():
            entry.accepted.set_result(None)

    def _ready(self, info: dict[str, Any]) -> None:
        self._info = info
        self._intake = Intake(
            self.tokenizer,
            vocab_size=info["vocab_size"],
            context_length=info["context_length"],
            is_bounded=True,
        )
        self._started.set()

    def _output(self, entry: OpenRequest, output: RequestOutput) -> None:
        completion = entry.completion
        if completion.finish is None:
            entry.timer.tokens(len(output.token_ids))
            if completion.add(output):
                self._send_abort(output.rid)  # ended by a stop string, which the engine cannot see
            self._publish(entry)
        if output.finish is not None:
            self._release(entry)

    def _publish(self, entry: OpenRequest) -> None:
        finish = entry.completion.finish
        if not entry.accepted.done():
            # A terminal output without Accepted before it: refused, or aborted while it waited.
            error = None if finish is None else finish_error(finish)
            if error is None:
                entry.accepted.set_result(None)
            else:
                entry.accepted.set_exception(error)
        if entry.stream is not None:
            entry.stream.update(entry.index, entry.completion)
            if finish is not None:
                entry.stream = None

    def _release(self, entry: OpenRequest) -> None:
        """The terminal output is here: the id is free."""
        completion = entry.completion
        del self._open[entry.request.rid]
        entry.released.set()
        if completion.finish is None:
            raise AssertionError("a terminal output did not finish its completion")
        failed = finish_error(completion.finish) is not None
        outcome: Outcome = "error" if failed else completion.finish.kind
        entry.timer.end(
            outcome,
            num_prompt_tokens=len(entry.request.prompt_token_ids),
            num_cached_tokens=completion.snapshot().cached_tokens,
        )

    def _die(self, fault: LorikeetError) -> None:
        """The engine is lost: everyone who waits for it is told, once."""
        if self._fault is not None:
            return
        self._fault = fault
        dead = EngineDeadError(str(fault))
        for entry in self._open.values():
            entry.fail(dead)
            entry.released.set()
            entry.timer.end("error", num_prompt_tokens=0, num_cached_tokens=0)
        self._open.clear()
        self._commands.fail(dead)
        self._started.set()
        self._died.set()
