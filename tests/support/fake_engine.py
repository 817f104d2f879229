"""An engine without a model that speaks the real transport.

It answers each request with its own prompt, token by token and over again, until ``max_new_tokens`` or a stop token.
It knows a few adapters, refuses what the real one refuses, and can be slow, stuck or die. A test runs it in a thread
(:class:`ThreadEngine`) and turns its knobs while it runs, or in a process of its own (:func:`spawn_fake_engine`).
"""

from __future__ import annotations

import multiprocessing
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Self

from lorikeet.client.transport import EngineAddress, EngineEndpoint
from lorikeet.config import Settings
from lorikeet.core.commands import (
    AnyCommand,
    FindAdapter,
    FlushCache,
    ListAdapters,
    LoadAdapter,
    LoadAdapterFromTensors,
    LoadOutcome,
    UnloadAdapter,
)
from lorikeet.core.failure import Failure
from lorikeet.core.messages import (
    Abort,
    Accepted,
    AdaptersChanged,
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
from lorikeet.core.request import FinishReason, Request, RequestOutput, TokenLogprobs
from lorikeet.core.views import AdapterState, AdapterUse, AdapterView, EngineInfo
from lorikeet.errors import ALREADY_LOADED, RequestError
from lorikeet.signals import leave_stops_to_parent
from tests.support.engine_info import engine_info

CONTEXT_LENGTH = 512
VOCAB_SIZE = 257
HIDDEN_SIZE = 4
END_TOKEN = 256


@dataclass
class Knobs:
    """How the engine behaves; may be changed while it runs in a thread (but what it says of itself at its start).

    Attributes:
        step_s: seconds between two tokens of a request.
        is_stuck: hears nothing but its end; what was sent meanwhile is handled afterwards.
        steps: where there is one, each step takes one permit, so that a test tells when the next token comes.
        has_pulse: tells that it lives.
        hold_accept: takes requests and neither accepts nor refuses them.
        die_after: dies after so many steps that produced tokens; None never.
        last_words: message of the Failed that it sends when it dies; None dies silently.
        start_error: cannot start, for this reason; ``start_user_error`` says whose fault it is.
        fail_token: a request that is to output this token fails instead, with status 500.
        start_s: seconds that its start takes.
        lora_enabled: False is an engine without LoRA.
        states: state of an adapter, where it is not "loaded".
        load_s: seconds that a load takes.
        load_error: why every load fails.
        queue_is_full: refuses every request with 503.
        stats: sent with every step instead of the engine's own.
        scripts: tokens that are answered in place of the prompt, then the end; request after request takes the next one.
        templates: path of an adapter -> chat templates that lie there.
        refuse_grammar: why a structural tag is refused.
        findable: name -> path of adapters that a resolver finds.
        sampling_defaults: what OpenAI requests get that do not say.
    """

    adapters: dict[str, str] = field(default_factory=lambda: {"json": "/a/json", "sql": "/a/sql"})
    step_s: float = 0.0
    is_stuck: bool = False
    steps: threading.Semaphore | None = None
    has_pulse: bool = True
    hold_accept: bool = False
    die_after: int | None = None
    last_words: str | None = None
    start_error: str | None = None
    start_user_error: bool = False
    start_s: float = 0.0
    fail_token: int | None = None
    lora_enabled: bool = True
    states: dict[str, AdapterState] = field(default_factory=dict)
    load_s: float = 0.0
    load_error: Failure | None = None
    stats: Stats | None = None
    queue_is_full: bool = False
    scripts: list[list[int]] = field(default_factory=list)
    templates: dict[str, dict[str, str]] = field(default_factory=dict)
    refuse_grammar: str | None = None
    context_length: int = CONTEXT_LENGTH
    vocab_size: int = VOCAB_SIZE
    findable: dict[str, str] = field(default_factory=dict)
    sampling_defaults: dict[str, int | float] = field(default_factory=dict)


@dataclass
class _Running:
    number: int
    request: Request
    script: list[int] | None = None
    num_out: int = 0


class FakeEngine:
    """The loop; ``exit_code`` is None while it runs."""

    def __init__(self, address: EngineAddress, knobs: Knobs) -> None:
        self.knobs = knobs
        self.seen: list[Request] = []
        self.aborted: list[int] = []
        self.num_steps = 0
        self._address = address
        self._running: dict[int, _Running] = {}
        self._next_id = 0
        self._deadline: float | None = None
        self._must_die = threading.Event()
        self.max_running = 0
        self.commands: list[Ask] = []
        self.cancelled: list[int] = []
        self._unheard: list[ToEngine | Unreadable] = []
        self._loading: dict[int, tuple[float, LoadAdapter | LoadAdapterFromTensors]] = {}
        self._told: dict[str, tuple[str, AdapterState | None]] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    def die(self) -> None:
        """End at once, from any thread."""
        self._must_die.set()

    def run(self) -> int:
        """Serve until Shutdown or death; returns the exit code."""
        self._endpoint = EngineEndpoint(self._address)
        self._parent = os.getppid()
        try:
            return self._run()
        finally:
            self._endpoint.close()

    def _run(self) -> int:
        knobs, endpoint = self.knobs, self._endpoint
        endpoint.send(Progress("loading nothing"))
        if self._must_die.wait(knobs.start_s):
            return 3
        if knobs.start_error is not None:
            kind = "refused" if knobs.start_user_error else "failed"
            endpoint.send(Failed(Failure(kind, knobs.start_error)))
            return 2 if knobs.start_user_error else 1
        self._tell_changes()
        if knobs.has_pulse:
            endpoint.start_pulse()
        endpoint.send(Ready(self._info()))
        while not self._is_over():
            orphan = os.getppid() != self._parent
            if orphan or self._must_die.is_set() or self.num_steps == knobs.die_after:
                if knobs.last_words is not None:
                    endpoint.send(Failed(Failure("failed", knobs.last_words)))
                return 3
            is_busy = self._running and not knobs.is_stuck
            self._unheard += endpoint.recv(0 if is_busy else 5)
            self._hear()
            self._finish_loads()
            self._tell_changes()
            self._step()
        return 0

    def _info(self) -> EngineInfo:
        return engine_info(
            context_length=self.knobs.context_length,
            vocab_size=self.knobs.vocab_size,
            hidden_size=HIDDEN_SIZE,
            lora_enabled=self.knobs.lora_enabled,
            sampling_defaults=self.knobs.sampling_defaults,
        )

    def _is_over(self) -> bool:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            for number in list(self._running):
                self._end(
                    number,
                    FinishReason(
                        kind="abort", failure=Failure("unavailable", "the server is shutting down")
                    ),
                )
        return self._deadline is not None and not self._running

    def _hear(self) -> None:
        messages, self._unheard = self._unheard, []
        for message in messages:
            if self.knobs.is_stuck and not isinstance(message, Shutdown):
                self._unheard.append(message)
            else:
                self._handle(message)

    def _handle(self, message: ToEngine | Unreadable) -> None:
        match message:
            case Submit():
                self._begin(message)
            case Abort(ids, text):
                for key in list(self._running) if ids is None else ids:
                    if key in self._running:
                        self.aborted.append(key)
                        self._end(key, FinishReason(kind="abort", failure=Failure("aborted", text)))
            case Ask(number, command):
                self.commands.append(message)
                reply = self._command(number, command)
                if reply is not None:
                    self._endpoint.send(reply)
            case Cancel(number):
                self.cancelled.append(number)
                self._loading.pop(number, None)
            case Shutdown(drain_seconds):
                self._deadline = time.monotonic() + drain_seconds

    def _begin(self, message: Submit) -> None:
        if message.first_id < self._next_id:
            raise AssertionError(f"the client used the id {message.first_id} twice")
        self._next_id = message.first_id
        for request in message.requests():
            self.seen.append(request)
            for _ in range(request.num_samples):
                self._submit(self._next_id, request)
                self._next_id += 1

    def _submit(self, number: int, request: Request) -> None:
        if self.knobs.queue_is_full:
            self._refuse(number, Failure("unavailable", "the queue is full"))
        elif request.adapter is not None and request.adapter not in self.knobs.adapters:
            known = ", ".join(self.knobs.adapters)
            text = f"lora_path: {request.adapter!r} has never been loaded; loaded: {known}"
            self._refuse(number, Failure("refused", text, "lora_path"))
        elif request.sampling.regex == "(":
            error = RequestError.about(
                ("sampling_params", "regex"), ": '(' is no regular expression"
            )
            self._refuse(number, Failure.of(error))
        elif request.sampling.structural_tag and self.knobs.refuse_grammar:
            field = ("sampling_params", "structural_tag")
            error = RequestError.about(field, f": {self.knobs.refuse_grammar}")
            self._refuse(number, Failure.of(error))
        elif not self.knobs.hold_accept:
            scripts = self.knobs.scripts
            script = scripts[number % len(scripts)] if scripts else None
            self._running[number] = _Running(number, request, script)
            self.max_running = max(self.max_running, len(self._running))
            self._endpoint.send(Accepted([number]))
        else:
            self._running[number] = _Running(number, request)

    def _refuse(self, number: int, failure: Failure) -> None:
        finish = FinishReason(kind="abort", failure=failure)
        self._endpoint.send(Outputs([RequestOutput(id=number, token_ids=[], finish=finish)]))

    def _end(self, number: int, finish: FinishReason) -> None:
        del self._running[number]
        self._endpoint.send(Outputs([RequestOutput(id=number, token_ids=[], finish=finish)]))

    def _command(self, number: int, command: AnyCommand) -> Reply | None:
        """The reply, or None if it comes later."""
        match command:
            case FlushCache():
                return Reply(number, not self._running)
            case LoadAdapter() | LoadAdapterFromTensors():
                self._loading[number] = (time.monotonic() + self.knobs.load_s, command)
                return None
            case FindAdapter(name):
                return self._find(name, number)
            case UnloadAdapter(name):
                return self._unload(name, number)
            case ListAdapters():
                return Reply(number, [])  # the client knows better

    def _unload(self, name: str, number: int) -> Reply:
        path = self.knobs.adapters.pop(name, None)
        if path is None:
            text = f"adapter {name!r} has never been loaded"
            return Reply(number, failure=Failure("not_found", text, "lora_path"))
        self._tell(name)
        return Reply(number, LoadOutcome(name, path, 1, 0.0))

    def _find(self, name: str, number: int) -> Reply:
        if name in self.knobs.findable:
            self.knobs.adapters[name] = self.knobs.findable[name]
            self._tell(name)
        return Reply(number)

    def _tell_changes(self) -> None:
        """Tell the client about names that a test has given another meaning."""
        now = {
            name: (path, self.knobs.states.get(name)) for name, path in self.knobs.adapters.items()
        }
        if now != self._told:
            names = dict.fromkeys([*now, *self._told])
            self._tell(*(name for name in names if now.get(name) != self._told.get(name)))

    def _tell(self, *names: str) -> None:
        """Tell the client what these names mean now."""
        for name in names:
            self._told.pop(name, None)
            if name in self.knobs.adapters:
                self._told[name] = (self.knobs.adapters[name], self.knobs.states.get(name))
        paths = {name: self.knobs.adapters.get(name) for name in names}
        self._endpoint.send(self._changes(paths))
        templates = self.knobs.templates
        changed = {
            name: None if path is None else templates.get(path, {}) for name, path in paths.items()
        }
        self._endpoint.send(AdapterTemplates(changed))

    def _changes(self, paths: Mapping[str, str | None]) -> AdaptersChanged:
        """What the real engine would say about these names; a name's version is its hash."""
        names: dict[str, list[AdapterView]] = {}
        uses: dict[int, AdapterUse | None] = {}
        for name, path in paths.items():
            state = self.knobs.states.get(name, "loaded")
            version = zlib.crc32(name.encode())
            reason = "broken" if state == "failed" else None
            view = AdapterView(
                name=name,
                path=path or "",
                state="loaded" if state == "failed" else state,
                pinned=False,
                version=None if state == "loading" else version,
            )
            names[name] = [] if path is None else [view]
            uses[version] = None if path is None else AdapterUse(tier="host", reason=reason)
        return AdaptersChanged(names, uses, dict.fromkeys(uses, b'{"rank":8}'))

    def _finish_loads(self) -> None:
        now = time.monotonic()
        for number in [number for number, (due, _) in self._loading.items() if due <= now]:
            self._endpoint.send(self._load(number, self._loading.pop(number)[1]))

    def _load(self, number: int, command: LoadAdapter | LoadAdapterFromTensors) -> Reply:
        name, is_path = command.name, isinstance(command, LoadAdapter)
        if self.knobs.load_error is not None:
            return Reply(number, failure=self.knobs.load_error)
        if name in self.knobs.adapters and not (is_path and command.replace):
            text = f"adapter {name!r} is already loaded"
            return Reply(number, failure=Failure("refused", text, code=ALREADY_LOADED))
        path = self.knobs.adapters[name] = command.path if is_path else "__tensor__"
        self._tell(name)
        return Reply(number, LoadOutcome(name, path, 1, 0.0))

    def _step(self) -> None:
        if not self._running or self.knobs.hold_accept or self.knobs.is_stuck:
            return
        if self.knobs.steps is not None and not self.knobs.steps.acquire(timeout=0.005):
            return
        if self.knobs.step_s:
            self._must_die.wait(self.knobs.step_s)
        outputs = [self._advance(entry) for entry in list(self._running.values())]
        self._endpoint.send(Outputs(outputs))
        self._endpoint.send(self.knobs.stats or Stats({"num_running": float(len(self._running))}))
        self.num_steps += 1

    def _pool(self, entry: _Running) -> RequestOutput:
        del self._running[entry.number]
        return RequestOutput(
            id=entry.number,
            token_ids=[],
            embedding=struct.pack(f"<{HIDDEN_SIZE}f", *vector(entry.request)),
            finish=FinishReason(kind="length", length=0),
        )

    def _room(self, request: Request) -> int:
        return self.knobs.context_length - len(request.prompt_token_ids)

    def _advance(self, entry: _Running) -> RequestOutput:
        request, sampling = entry.request, entry.request.sampling
        if request.pooling is not None:
            return self._pool(entry)
        token = request.prompt_token_ids[entry.num_out % len(request.prompt_token_ids)]
        finish = None
        if entry.script is not None and entry.num_out == len(entry.script):
            token, finish = END_TOKEN, FinishReason(kind="stop", matched=END_TOKEN)
        elif entry.script is not None:
            token = entry.script[entry.num_out]
        entry.num_out += 1
        if finish is not None:
            pass
        elif token == self.knobs.fail_token:
            finish = FinishReason(kind="abort", failure=Failure("failed", "out of memory"))
        elif token in sampling.stop_token_ids:
            finish = FinishReason(kind="stop", matched=token)
        elif entry.num_out in (sampling.max_new_tokens, self._room(request)):
            finish = FinishReason(kind="length", length=entry.num_out)
        if finish is not None:
            del self._running[entry.number]
        return RequestOutput(
            id=entry.number,
            token_ids=[token],
            logprobs=_logprobs([token], request),
            prompt_logprobs=(
                _logprobs(request.prompt_token_ids[request.logprob_start_len :], request)
                if entry.num_out == 1 and request.logprob_start_len >= 0
                else []
            ),
            cached_tokens=1,
            finish=finish,
        )


def vector(request: Request) -> list[float]:
    """What a request with pooling is answered with: it tells the adapter, the prompt and the pooling."""
    assert request.pooling is not None
    name = request.adapter or ""
    kind = ("last", "mean").index(request.pooling.kind)
    return [len(name), sum(request.prompt_token_ids), kind, request.pooling.normalize]


def _logprobs(tokens: list[int], request: Request) -> list[TokenLogprobs]:
    if not request.return_logprob:
        return []
    top = [(-0.5 - rank, rank) for rank in range(request.top_logprobs_num)]
    return [TokenLogprobs(-0.5, token, top) for token in tokens]


class FakeProcess:
    """What the client watches: the sentinel becomes readable when the writing end is closed."""

    def __init__(self) -> None:
        self.sentinel, self._alive = os.pipe()
        self.exitcode: int | None = None
        self.was_killed = False
        self.on_kill: Callable[[], None] = lambda: None

    def kill(self) -> None:
        """As for a process; the thread ends with its next turn."""
        self.was_killed = True
        self.on_kill()

    def end(self, code: int) -> None:
        self.exitcode = code
        os.close(self._alive)

    def close(self) -> None:
        os.close(self.sentinel)


class ThreadEngine:
    """A :class:`FakeEngine` in a thread: ``with ThreadEngine() as engine``."""

    def __init__(self, knobs: Knobs | None = None) -> None:
        self.knobs = knobs or Knobs()
        self.address = EngineAddress.create()
        self.process = FakeProcess()
        self.engine = FakeEngine(self.address, self.knobs)
        self.process.on_kill = self.engine.die
        self._thread = threading.Thread(target=self._main, name="fake-engine")

    def _main(self) -> None:
        code = 1
        try:
            code = self.engine.run()
        finally:
            self.process.end(code)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.engine.die()
        self._thread.join()
        self.process.close()
        self.address.remove()


def spawn_fake_engine(
    settings: Settings, address: EngineAddress, knobs: Knobs | None = None
) -> BaseProcess:
    """The engine in a process of its own, as ``engine.spawn.spawn_engine`` starts the real one."""
    process = multiprocessing.get_context("spawn").Process(
        target=_process_main, args=(address, knobs or Knobs()), name="fake-engine", daemon=True
    )
    process.start()
    return process


def _process_main(address: EngineAddress, knobs: Knobs) -> None:
    leave_stops_to_parent()
    raise SystemExit(FakeEngine(address, knobs).run())
