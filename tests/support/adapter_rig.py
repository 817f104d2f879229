"""An engine with LoRA whose disk is a dictionary and whose worker computes hashes: adapters come and go in milliseconds."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, cast

import msgspec
import torch

from lorikeet.adapters.rank_pages import RankPageAllocator
from lorikeet.adapters.residency import Residency
from lorikeet.adapters.sources.transfer import Transfer
from lorikeet.adapters.spec import LoRASpec
from lorikeet.adapters.store import AdapterStore
from lorikeet.adapters.views import AdapterViews
from lorikeet.core.commands import Command, LoadAdapter, LoadOutcome, R, UnloadAdapter
from lorikeet.core.messages import AdaptersChanged, decode_to_client, encode
from lorikeet.core.request import Request, RequestOutput, SamplingParams
from lorikeet.engine.core import EngineCore
from lorikeet.errors import AdapterError
from lorikeet.kv.manager import KVManager
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.host_memory import HostMemory
from lorikeet.lora.reader import AdapterReader
from lorikeet.scheduler.scheduler import Scheduler, SchedulerLimits
from tests.support.engine_info import engine_info
from tests.support.fake_worker import FakeWorker, first_hash, next_token, prefix_hash

PAGE_SIZE, NUM_PAGES, VOCAB = 4, 256, 1000
PATIENCE_S = 20.0


def expected_tokens(version: int, prompt: list[int], count: int, *, seed: int = 0) -> list[int]:
    """What the fake worker answers a prompt with under an adapter version."""
    state, tokens = first_hash(version), list(prompt)
    for token in tokens:
        state = prefix_hash(state, token)
    for _ in range(count):
        tokens.append(next_token(state, seed, VOCAB))
        state = prefix_hash(state, tokens[-1])
    return tokens[len(prompt) :]


class Disk:
    """Paths and what lies there: equal contents are equal adapters.

    Attributes:
        contents: path -> content; a missing path is a missing file.
        gates: path -> reads of it wait for this event.
        templates: path -> chat templates that lie there, too.
        num_reads: reads that have begun, of any path.
    """

    def __init__(self) -> None:
        self.contents: dict[str, str] = {}
        self.gates: dict[str, threading.Event] = {}
        self.templates: dict[str, dict[str, str]] = {}
        self.num_reads = 0
        self.untrusted: list[str] = []

    def load(
        self, name: str, path: str, *, trust: str, is_first: bool, transfer: Transfer
    ) -> HostAdapter:
        self.num_reads += 1
        if trust == "request":
            self.untrusted.append(path)
        gate = self.gates.get(path)
        if gate is not None:
            assert gate.wait(PATIENCE_S)
        content = self.contents.get(path)
        if content is None:
            raise AdapterError(f"adapter path {path} does not exist")
        if content == "crash":
            raise ZeroDivisionError("the loader has a bug")
        return HostAdapter(
            name=name,
            path=path,
            digest=f"digest of {content}",
            spec=LoRASpec(r=1, lora_alpha=1, target_modules=("q_proj",)),
            data=torch.zeros(20),
            page_sizes=(10, 10),
            page_classes=(0, 0),
            modules=(),
            rank=1,
            targets=("q_proj",),
            chat_templates=self.templates.get(path, {}) if is_first else {},
        )

    def find(self, name: str) -> Path | None:
        path = Path("/found") / name
        return path if str(path) in self.contents else None

    def reject(self, name: str, reason: str) -> None:
        pass


class AdapterRig:
    """The engine, and requests by number.

    Args:
        copy_steps: steps that a copy to the device takes.
    """

    def __init__(
        self,
        *,
        max_loras: int = 2,
        max_host: int | None = None,
        resolver: bool = False,
        copy_steps: int = 1,
    ) -> None:
        self.disk = Disk()
        self.kv = KVManager(PAGE_SIZE, NUM_PAGES, radix=True)
        self.residency = Residency(
            allocator=RankPageAllocator((10,), 10, 2 * max_loras, [2 * max_loras]),
            num_slots=1 + max_loras,
            policy="lru",
            max_pinned=max_loras - 1,
            max_host=max_host,
        )
        reader = AdapterReader(self.disk.load, resolver=self.disk if resolver else None)
        self.host = HostMemory(reader)
        self.store = AdapterStore(self.residency, self.host, can_find=resolver)
        limits = SchedulerLimits(
            max_running=16,
            max_step_tokens=64,
            max_prefill_tokens=1000,
            context_length=200,
            max_loras_per_batch=max_loras,
            eos_token_ids=frozenset(),
        )
        self.failing_copies: set[int] = set()
        self.core = EngineCore(
            scheduler=Scheduler(limits, self.kv, self.residency),
            kv=self.kv,
            worker=FakeWorker(
                page_size=PAGE_SIZE,
                num_pages=NUM_PAGES,
                num_slots=1 + max_loras,
                vocab_size=VOCAB,
                fail_copy=lambda version: version in self.failing_copies,
                copy_steps=lambda: copy_steps,
            ),
            adapters=self.store,
            compile_grammar=lambda sampling: Future(),
            seeds=lambda: 0,
            info=engine_info(),
            on_close=self.host.close,
        )
        self.outputs: dict[int, list[RequestOutput]] = {}
        self.copy = AdapterViews()

    # -- files and commands --------------------------------------------------------------------------------------

    def write(self, path: str, content: str) -> str:
        self.disk.contents[path] = content
        return path

    def block(self, path: str) -> threading.Event:
        """Reads of ``path`` wait from now on until the event is set."""
        gate = self.disk.gates[path] = threading.Event()
        return gate

    def command(self, command: Command[R]) -> Future[R]:
        """Begin a command that takes time."""
        return cast("Future[R]", self.core.command(command))

    def start_load(self, name: str, content: str | None = None, **args: Any) -> Future[LoadOutcome]:
        """Begin to load ``name`` from ``/name``, where ``content`` is put if it is given."""
        if content is not None:
            self.write(f"/{name}", content)
        return self.command(LoadAdapter(name, f"/{name}", **args))

    def load(self, name: str, content: str | None = None, **args: Any) -> int:
        future = self.start_load(name, content, **args)
        wait([self.read_of(name)], PATIENCE_S)  # without a step of those that run
        return self.wait(future).version

    def read_of(self, name: str) -> Future[Any]:
        """The read of a name that is being loaded."""
        ticket = self.store._loads[name].ticket
        assert ticket is not None
        return self.host._reads[ticket].future

    def unload(self, name: str) -> None:
        self.wait(self.command(UnloadAdapter(name)))

    def wait(self, future: Future[LoadOutcome]) -> LoadOutcome:
        self.until(future.done)
        self.tell()
        return future.result()

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(
        self, adapter: str | None, *, count: int = 4, prompt: list[int] | None = None
    ) -> int:
        sampling = SamplingParams(max_new_tokens=count, ignore_eos=True)
        prompt = prompt or list(range(10))
        number = self.core.submit(
            Request(prompt_token_ids=prompt, sampling=sampling, adapter=adapter)
        )
        self.outputs[number] = []
        return number

    def ask(
        self, adapter: str | None, *, count: int = 4, prompt: list[int] | None = None
    ) -> list[int]:
        """The tokens that a request is answered with; AssertionError if it is refused."""
        number = self.submit(adapter, count=count, prompt=prompt)
        self.until(lambda: self.is_over(number))
        return self.tokens(number)

    def tokens(self, number: int) -> list[int]:
        outputs = self.outputs[number]
        assert outputs[-1].finish is not None
        assert outputs[-1].finish.kind == "length", outputs[-1].finish
        return [token for output in outputs for token in output.token_ids]

    def is_over(self, number: int) -> bool:
        return bool(self.outputs[number]) and self.outputs[number][-1].finish is not None

    def refusal(self, number: int) -> str:
        """Why a request was refused, with a status of 400."""
        self.until(lambda: self.is_over(number))
        finish = self.outputs[number][-1].finish
        assert finish is not None
        assert (finish.kind, finish.status_code) == ("abort", 400), finish
        return finish.message or ""

    # -- the loop ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        for output in self.core.step():
            assert not self.is_over(output.id), f"{output.id} ends twice"
            self.outputs[output.id].append(output)
        self.tell()

    def tell(self) -> None:
        """Bring the copy of the other process up to date, as the engine's loop does after each step."""
        news = self.core.adapters.take_changes()
        if news is not None:
            message = decode_to_client(encode(news))
            assert isinstance(message, AdaptersChanged)
            self.copy.apply(message)

    def until(self, condition: Any) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "it never happens"
            self.step()
            if not self.core.has_steps:
                time.sleep(0.0005)

    def finish(self) -> None:
        """Run until nothing is open, then recount everything."""
        self.until(lambda: self.core.is_idle and not self.core.waits_for_threads)
        for _ in range(4):
            self.step()
        self.core.check_integrity()
        self.check_copy()

    def check_copy(self) -> None:
        """What has changed adds up to what is there."""
        told = [self.copy.detail(view) for view in self.copy.views()]
        assert sorted(told, key=str) == sorted(self.store.describe(), key=str)

    def close(self) -> None:
        for gate in self.disk.gates.values():
            gate.set()
        self.core.close()

    # -- what is where -------------------------------------------------------------------------------------------

    def view(self, name: str) -> dict[str, Any]:
        """The one entry that is called ``name``."""
        (view,) = self.store.describe(name)
        return msgspec.to_builtins(view)

    def names(self) -> dict[str, str]:
        """Name -> state of everything that is listed, the newest entry of each name."""
        return {view.name: view.state for view in reversed(self.store.describe())}
