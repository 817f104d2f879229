"""The engine's own process: :class:`EngineCore` behind a socket.

The loop never blocks on anything but the next message, and on that only while there is nothing to compute.

What goes wrong, of whatever type, ends what it was done for and nothing else: a message (its requests get 500, its command
an error), the result of a command, a reply that cannot be sent. The process ends only where its own state can no longer
be trusted: where :meth:`EngineCore.step` raises :class:`EngineFault`, since pages, slots and what the device computes may then
disagree.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from typing import NoReturn

from tqdm import tqdm

from lorikeet.client.transport import EngineAddress, EngineEndpoint
from lorikeet.config import Settings
from lorikeet.core.commands import AnyCommand, Result
from lorikeet.core.failure import Failure
from lorikeet.core.messages import (
    Abort,
    Accepted,
    AdapterTemplates,
    Ask,
    Cancel,
    Failed,
    Outputs,
    Progress,
    Ready,
    Reply,
    Shutdown,
    Stats,
    Submit,
    ToEngine,
    Unreadable,
)
from lorikeet.core.request import FinishReason, Request, RequestOutput
from lorikeet.engine.build import build_engine
from lorikeet.engine.core import EngineCore
from lorikeet.errors import EngineFault, LorikeetError, UnavailableError
from lorikeet.log import setup_logging

logger = logging.getLogger(__name__)

# How long an idle engine waits for a message before it looks whether its parent still lives.
IDLE_MS = 500
# While a thread compiles a grammar or reads an adapter, its end is noticed after this long at first, and after a part of
# the time that the loop has waited, up to the second value: an unload may wait for hours.
THREADS_MS = 2
MAX_THREADS_MS = 50
PATIENCE = 0.1
STATS_INTERVAL_S = 1.0


def main(settings: Settings, address: EngineAddress, parent: int) -> None:
    """Body of the engine process: serve until told to stop or until process ``parent`` is gone, then exit."""
    setup_logging(settings.log_level)
    # Files for a while lie in the directory that the parent removes, also if this process is killed.
    if tempfile.gettempdir() == os.path.dirname(address.directory):
        tempfile.tempdir = address.directory
    # A lock between processes, which the bars of this one do not need, would be reported as lost after a kill.
    tqdm.set_lock(threading.RLock())
    endpoint = EngineEndpoint(address)
    try:
        code = _serve(settings, endpoint, parent)
    finally:
        endpoint.close()
    _exit(code)


def _exit(code: int) -> NoReturn:
    """End now: the interpreter would wait for threads, and one may be stuck in a download for ever."""
    for helper in multiprocessing.active_children():
        helper.kill()
    logging.shutdown()
    os._exit(code)


def _serve(settings: Settings, endpoint: EngineEndpoint, parent: int) -> int:
    try:
        core = build_engine(settings, report=lambda phase: endpoint.send(Progress(phase)))
    except Exception as error:
        is_on_purpose = isinstance(error, LorikeetError)
        if not is_on_purpose:
            logger.exception("the engine could not start")
        endpoint.send(Failed(Failure.of(error)))
        return 2 if is_on_purpose else 1
    # Modules, weights and graphs live as long as the process: a full collection that walks over them takes as long as
    # several steps.
    gc.collect()
    gc.freeze()
    loop = EngineLoop(core, endpoint, parent)
    loop.send_adapter_news()
    endpoint.start_pulse()
    endpoint.send(Ready(core.info))
    try:
        return loop.run()
    except Exception as error:
        logger.exception("the engine failed")
        failure = Failure.of(error)
        endpoint.send(Outputs(core.fail_all(f"the engine failed: {failure.message}")))
        endpoint.send(Failed(failure))
        return 1
    finally:
        core.close()


class EngineLoop:
    """Messages in, steps, messages out, until a Shutdown or the parent's death."""

    def __init__(self, core: EngineCore, endpoint: EngineEndpoint, parent: int) -> None:
        self._core = core
        self._endpoint = endpoint
        self._parent = parent
        self._deadline: float | None = None  # set by Shutdown: when running requests are aborted
        self._stats_due = 0.0
        self._commands: dict[int, Future[Result]] = {}
        self._quiet_since = time.monotonic()

    def run(self) -> int:
        """Serve until told to stop; returns the exit code."""
        while not self._is_finished():
            messages = self._endpoint.recv(self._patience_ms())
            for message in messages:
                self._handle(message)
            outputs = self._core.step()
            if messages or outputs:
                self._quiet_since = time.monotonic()
            self.send_adapter_news()
            if accepted := self._core.take_accepted():
                self._endpoint.send(Accepted(accepted))
            if outputs:
                self._endpoint.send(Outputs(outputs))
            self._send_replies()
            self._send_stats()
        return 0

    def send_adapter_news(self) -> None:
        """Tell which adapters came or went, and what else has changed about them."""
        if news := self._core.adapters.take_changes():
            self._endpoint.send(news)
        if changed := self._core.adapters.take_templates():
            self._endpoint.send(AdapterTemplates(changed))

    def _patience_ms(self) -> int:
        if self._core.has_steps:
            return 0
        if not self._core.waits_for_threads:
            return IDLE_MS
        quiet_ms = (time.monotonic() - self._quiet_since) * 1000
        return min(MAX_THREADS_MS, max(THREADS_MS, int(PATIENCE * quiet_ms)))

    def _is_finished(self) -> bool:
        if os.getppid() != self._parent:
            logger.warning("the parent process is gone; the engine ends")
            return True
        if self._deadline is None:
            return False
        if self._core.num_open and time.monotonic() >= self._deadline:
            self._core.abort(None, "the server is shutting down", "unavailable")
            self._endpoint.send(Outputs(self._core.step()))
        return not self._core.num_open

    def _handle(self, message: ToEngine | Unreadable) -> None:
        """Do what a message asks for; what goes wrong with it is told to those whom it is about."""
        try:
            self._do(message)
        except Exception as error:
            logger.exception("a message could not be handled")
            self._give_up(message, f"an error inside the engine: {type(error).__name__}: {error}")

    def _do(self, message: ToEngine | Unreadable) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Abort(ids, text):
                for number in [None] if ids is None else ids:
                    self._abort(number, text)
            case Ask(number, command):
                self._command(number, command)
            case Cancel(number):
                if (future := self._commands.get(number)) is not None:
                    future.cancel()
            case Shutdown(drain_seconds):
                self._deadline = time.monotonic() + drain_seconds
            case Unreadable(reason):
                logger.error("a message of the client cannot be read: %s", reason)
                self._give_up(message, f"a message to the engine cannot be read: {reason}")

    def _give_up(self, message: ToEngine | Unreadable, reason: str) -> None:
        """Tell everyone who waits for what this message asked for that it has failed."""
        match message:
            case Submit():
                for item in message.ids:
                    self._end(item, reason)
            case Unreadable(_, ids, number):
                for item in ids:
                    self._end(item, reason)
                if number is not None:
                    self._endpoint.send(Reply(number, failure=Failure("failed", reason)))
            case Ask(number):
                self._endpoint.send(Reply(number, failure=Failure("failed", reason)))
            case _:  # nobody waits for an answer
                pass

    def _abort(self, number: int | None, text: str) -> None:
        try:
            self._core.abort(number, text)
        except Exception:  # the others of the message are to end all the same
            logger.exception("a request could not be aborted")

    def _end(self, number: int, reason: str) -> None:
        """End one completion with a fault, however far it has come."""
        if self._core.is_open(number):
            self._core.abort(number, reason, "failed")
        else:
            self._refuse([number], Failure("failed", reason))

    def _refuse(self, ids: Iterable[int], failure: Failure) -> None:
        """Send a terminal output for completions that the core does not have."""
        finish = FinishReason(kind="abort", failure=failure)
        outputs = [RequestOutput(id=number, token_ids=[], finish=finish) for number in ids]
        self._endpoint.send(Outputs(outputs))

    def _submit(self, message: Submit) -> None:
        """Take the requests of one call, or none of them."""
        try:
            if self._deadline is not None:
                raise UnavailableError("the server is shutting down")
            self._core.check_queue(message.num_completions)
        except UnavailableError as error:
            self._refuse(message.ids, Failure.of(error))
            return
        number = message.first_id
        for request in message.requests():
            self._submit_one(request, number, message.first_id)
            number += request.num_samples

    def _submit_one(self, request: Request, number: int, call: int) -> None:
        try:
            self._core.submit(request, number, call)
        except EngineFault:
            # The ids have been used. An answer under them would end somebody else's stream; the client never sends one
            # twice.
            logger.exception("request dropped")
        except Exception as error:
            logger.exception("a request could not be taken")
            reason = f"the request could not be taken: {type(error).__name__}: {error}"
            for sample in range(request.num_samples):
                self._end(number + sample, reason)

    def _command(self, number: int, command: AnyCommand) -> None:
        try:
            result = self._core.command(command)
        except LorikeetError as error:
            self._endpoint.send(Reply(number, failure=Failure.of(error)))
            return
        if isinstance(result, Future):
            self._commands[number] = result
        else:
            self._endpoint.send(Reply(number, result))

    def _send_replies(self) -> None:
        for number in [number for number, future in self._commands.items() if future.done()]:
            self._endpoint.send(_reply(number, self._commands.pop(number)))

    def _send_stats(self) -> None:
        now = time.monotonic()
        if now >= self._stats_due:
            self._stats_due = now + STATS_INTERVAL_S
            core = self._core
            self._endpoint.send(Stats(core.stats(), core.labels(), core.adapters.take_samples()))


def _reply(number: int, future: Future[Result]) -> Reply:
    """What a command has come to."""
    if future.cancelled():
        return Reply(number, failure=Failure("aborted", "cancelled by the client"))
    error = future.exception()
    if error is None:
        return Reply(number, future.result())
    if isinstance(error, LorikeetError):
        return Reply(number, failure=Failure.of(error))
    logger.error("a command failed", exc_info=error)
    failure = Failure("failed", f"an error inside the engine: {Failure.of(error).message}")
    return Reply(number, failure=failure)
