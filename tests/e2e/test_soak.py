"""Minutes of everything at once: loads, unloads, replacements, evictions, aborts and requests, in random order.

Every answer has to be PEFT's for the version that the request leased, and nothing may be left at the end.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import cast

import pytest

from lorikeet import LLM
from lorikeet.client.uploads import Uploads
from lorikeet.core.commands import (
    Command,
    ListAdapters,
    LoadAdapter,
    LoadAdapterFromTensors,
    LoadOutcome,
    UnloadAdapter,
)
from lorikeet.core.request import Request, RequestOutput, SamplingParams
from lorikeet.core.views import AdapterDetail
from lorikeet.errors import AdapterError, AdapterNotFoundError
from tests.e2e.conftest import World
from tests.support.live_server import wait_until
from tests.support.peft_adapters import CONFIG, WEIGHTS, peft_generate

CONTENTS = ("qv", "all", "one", "mlp", "rslora", "patterns", "head")
NAMES = tuple(f"name-{i}" for i in range(9))
NUM_TOKENS = 6
MAX_OPEN = 24
# An allocator keeps what it had once; a leak of one tiny adapter per load would be ten times this within minutes.
MAX_GROWTH_MB = 24.0
# Of all pools of an engine together: loads, reloads, copies, grammars.
MAX_THREADS = 8
FAST_S, SLOW_S = 5.0, 300.0


class Soak:
    """Random traffic against one engine.

    Args:
        answers: (content or None for the base, number of the prompt) -> tokens.
    """

    def __init__(
        self,
        llm: LLM,
        world: World,
        prompts: list[list[int]],
        answers: dict[tuple[str | None, int], list[int]],
    ) -> None:
        self.core = llm._core
        self.world = world
        self.prompts = prompts
        self.answers = answers
        self.chance = random.Random(11)
        self.versions: dict[int, str] = {}
        for content in CONTENTS:
            version = llm.load_lora_adapter(content, str(world.adapters[content]))
            self.versions[version] = content
            llm.unload_lora_adapter(content)
        self.uploads = Uploads()
        self.upload_root: Path | None = None
        self.open: dict[int, tuple[str | None, int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.aborted: set[int] = set()
        self.futures: list[Future[object]] = []
        self.counts = dict.fromkeys(
            ("answers", "aborts", "refused", "loads", "failed", "unloads", "cancels"), 0
        )

    def act(self) -> None:
        action = self.chance.choices(
            (self.submit, self.load, self.load_tensors, self.unload, self.abort, self.cancel),
            (60, 14, 3, 8, 5, 2),
        )[0]
        action()

    def submit(self) -> None:
        if len(self.open) >= MAX_OPEN:
            return
        name = self.chance.choice((*NAMES, None))
        number = self.chance.randrange(len(self.prompts))
        sampling = SamplingParams(temperature=0.0, max_new_tokens=NUM_TOKENS, ignore_eos=True)
        request = Request(prompt_token_ids=self.prompts[number], sampling=sampling, adapter=name)
        request_id = self.core.submit(request)
        entry = self.core._open.get(request_id)
        if entry is None:
            self.counts["refused"] += 1  # not loaded; its output says so
            self.aborted.add(request_id)
            return
        assert entry.version is not None
        content = self.versions[entry.version] if entry.version else None
        self.open[request_id], self.tokens[request_id] = (content, number), []

    def load(self) -> None:
        command = LoadAdapter(
            self.chance.choice(NAMES),
            str(self.world.adapters[self.chance.choice(CONTENTS)]),
            pinned=self.chance.random() < 0.1,
            replace=self.chance.random() < 0.6,
        )
        self.command(command, "loads")

    def load_tensors(self) -> None:
        path = self.world.adapters[self.chance.choice(CONTENTS)]
        weights = self.uploads.new()
        shutil.copyfile(path / WEIGHTS, weights)
        command = LoadAdapterFromTensors(
            self.chance.choice(NAMES), json.loads((path / CONFIG).read_text()), str(weights)
        )
        self.upload_root = weights.parent.parent
        self.command(command, "loads")

    def unload(self) -> None:
        timeout = self.chance.choice((None, None, 0.0))
        name = self.chance.choice(NAMES)
        self.command(UnloadAdapter(name, timeout), "unloads")

    def abort(self) -> None:
        if self.open:
            request_id = self.chance.choice(list(self.open))
            self.aborted.add(request_id)
            self.core.abort(request_id, "enough")

    def cancel(self) -> None:
        if self.futures and self.chance.choice(self.futures).cancel():
            self.counts["cancels"] += 1

    def command(self, command: Command[LoadOutcome], kind: str) -> None:
        try:
            future = cast("Future[LoadOutcome]", self.core.command(command))
        except (AdapterError, AdapterNotFoundError):
            self.counts["failed"] += 1
        else:
            self.futures.append(future)
            self.counts[kind] += 1

    def step(self) -> None:
        for output in self.core.step():
            self.take(output)
        self.core.take_accepted()
        for future in [future for future in self.futures if future.done()]:
            self.futures.remove(future)
            error = None if future.cancelled() else future.exception()
            if error is not None:
                assert isinstance(error, AdapterError), error
                assert any(
                    words in str(error)
                    for words in ("starvation", "still run with it", "--max-loaded-loras")
                ), error
        self.core.wait_for_threads()

    def take(self, output: RequestOutput) -> None:
        if output.id in self.tokens:
            self.tokens[output.id] += output.token_ids
        if output.finish is None:
            return
        key, tokens = self.open.pop(output.id, None), self.tokens.pop(output.id, [])
        if output.finish.kind == "abort":
            assert output.id in self.aborted, output.finish
            self.counts["aborts"] += 1
        else:
            assert key is not None
            assert tokens == self.answers[key], key
            self.counts["answers"] += 1
        self.aborted.discard(output.id)

    def rest(self) -> None:
        """Run until nothing is open, and recount."""
        while not (self.core.is_idle and not self.core.waits_for_threads):
            self.step()
        for _ in range(4):
            self.step()
        assert not self.open
        self.core.check_integrity()

    def unload_all(self) -> None:
        self.rest()  # a load under way has no name to unload yet
        for view in cast("list[AdapterDetail]", self.core.command(ListAdapters())):
            self.command(UnloadAdapter(view.name), "unloads")
        self.rest()
        assert self.core.command(ListAdapters()) == []
        root = self.upload_root
        wait_until(lambda: root is None or not any(item.is_dir() for item in root.iterdir()))


def resident_mb() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    chance = random.Random(2)
    shared = [chance.randrange(256) for _ in range(8)]
    return [shared + [chance.randrange(256) for _ in range(n)] for n in (3, 9, 17)]


@pytest.fixture(scope="module")
def answers(world: World, prompts: list[list[int]]) -> dict[tuple[str | None, int], list[int]]:
    return {
        (content, number): peft_generate(
            world.model, world.path(content), prompt, max_new_tokens=NUM_TOKENS
        )[0]
        for content in (None, *CONTENTS)
        for number, prompt in enumerate(prompts)
    }


@pytest.mark.parametrize(
    "seconds",
    [FAST_S, pytest.param(SLOW_S, marks=[pytest.mark.slow, pytest.mark.timeout(2 * SLOW_S)])],
)
def test_everything_at_once(
    world: World,
    make_llm: Callable[..., LLM],
    prompts: list[list[int]],
    answers: dict[tuple[str | None, int], list[int]],
    seconds: float,
) -> None:
    num_threads = threading.active_count()
    llm = make_llm(
        enable_lora=True,
        lora_target_modules=("all",),
        max_lora_rank=64,
        max_loras_per_batch=3,
        max_loaded_loras=4,
        max_running_requests=8,
        max_total_tokens=1024,
        page_size=4,
    )
    soak = Soak(llm, world, prompts, answers)
    began, warm, num_files = time.monotonic(), None, 0
    while (passed := time.monotonic() - began) < seconds:
        for _ in range(soak.chance.randint(0, 3)):
            soak.act()
        soak.step()
        if warm is None and passed > 0.4 * seconds:
            soak.unload_all()
            warm = resident_mb()
            num_files = len(os.listdir("/proc/self/fd"))
    soak.unload_all()
    assert warm is not None
    assert resident_mb() - warm < MAX_GROWTH_MB
    assert threading.active_count() <= num_threads + MAX_THREADS
    assert len(os.listdir("/proc/self/fd")) <= num_files
    stats = llm._core.stats()
    assert stats["adapter_host_bytes"] == 0
    assert stats["total_adapter_host_evictions"] > 0
    assert stats["total_adapter_reloads"] > 0
    for kind in ("answers", "aborts", "refused", "loads", "failed", "unloads"):
        assert soak.counts[kind] > 0, soak.counts
    assert soak.counts["answers"] > 5 * seconds, soak.counts
    llm.shutdown()
