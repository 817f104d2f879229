"""How long an adapter takes to the device, and what a running stream sees of it.

    python -m benchmarks.lifecycle.activation                 # Llama-3.1-8B shape, rank 16, on a GPU; about a minute
    python -m benchmarks.lifecycle.activation --model demo    # on a CPU

The engine runs in this process, with room for two adapters on the device and six in host memory. Taking six in turn
brings each from the host; taking twelve in turn, each from its files, which the system has in its cache. A *load* is the
command: it reads an adapter from the disk's cache, checks, packs, registers and describes it. Prints a table and writes a
result file.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks import common
from benchmarks.engine.fixtures import LLAMA_8B, model_directory, write_adapters
from benchmarks.engine.session import Adapters, engine_values, with_engine
from lorikeet.core.commands import LoadAdapter
from lorikeet.core.request import Request, SamplingParams
from lorikeet.engine.core import EngineCore
from lorikeet.models.spec import read_model_spec

NUM_ADAPTERS, ROOM = 6, 2
PROMPT, STREAM_TOKENS = 16, 400
ROUNDS = 3


class Session:
    """Requests on one engine."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._numbers = itertools.count()

    def submit(self, adapter: str | None, num_tokens: int) -> int:
        number = next(self._numbers)
        prompt = [(number * 31 + index) % 1000 for index in range(PROMPT)]
        sampling = SamplingParams(max_new_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        request = Request(prompt_token_ids=prompt, sampling=sampling, adapter=adapter)
        return self.core.submit(request)

    def first_token_ms(self, adapter: str | None) -> float:
        begin = time.perf_counter()
        request_id = self.submit(adapter, 1)
        while not any(output.id == request_id and output.finish for output in self.core.step()):
            self.core.wait_for_threads()
        found = (time.perf_counter() - begin) * 1e3
        while not self.core.is_idle:
            self.core.step()
        return found

    def gaps_ms(self, during: list[Path]) -> tuple[list[float], list[float]]:
        """Gaps between tokens of a stream of the base model while adapters are loaded; and how long each load took."""
        request_id = self.submit(None, STREAM_TOKENS)
        gaps: list[float] = []
        loads: list[float] = []
        waiting = list(during)
        pending: tuple[Future[Any], float] | None = None
        last, count = 0.0, 0
        while not self.core.is_idle or pending is not None:
            # A loop that spins would keep the interpreter from the threads that read.
            self.core.wait_for_threads()
            for output in self.core.step():
                now = time.perf_counter()
                if output.id == request_id and output.token_ids:
                    gaps += [(now - last) * 1e3] if count else []
                    last, count = now, count + 1
            if pending is not None and pending[0].done():
                pending[0].result()
                loads.append((time.perf_counter() - pending[1]) * 1e3)
                pending = None
            if pending is None and waiting and count > 20:
                path = waiting.pop()
                started = self.core.command(LoadAdapter(f"new-{path.name}", str(path)))
                pending = (cast("Future[Any]", started), time.perf_counter())
        return gaps, loads


def measure(core: EngineCore, adapters: Adapters, fresh: list[Path]) -> common.Row:
    """Every figure of the table, milliseconds."""
    session = Session(core)
    names = adapters.names
    for name in [None, *names, *names]:
        session.first_token_ms(name)
    base = statistics.median(session.first_token_ms(None) for _ in range(8))
    resident = statistics.median(session.first_token_ms(names[-1]) for _ in range(8))
    host = statistics.median(session.first_token_ms(name) for _ in range(ROUNDS) for name in names)
    alone, _ = session.gaps_ms([])
    beside, loads = session.gaps_ms(fresh)
    # The loads have taken the others' places in host memory.
    everything = [*names, *(f"new-{path.name}" for path in fresh)]
    disk = statistics.median(session.first_token_ms(name) for name in everything * 2)
    step = statistics.median(alone)
    return {
        "first_token_base_ms": base,
        "first_token_resident_ms": resident,
        "first_token_from_host_ms": host,
        "activation_from_host_ms": host - resident,
        "first_token_from_disk_cache_ms": disk,
        "activation_from_disk_cache_ms": disk - resident,
        "load_from_disk_cache_ms": statistics.median(loads),
        "step_ms": step,
        "longest_gap_alone_ms": max(alone),
        "longest_gap_beside_loads_ms": max(beside),
        "pause_in_steps": (max(beside) - step) / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=LLAMA_8B)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="lorikeet-activation-") as temporary:
        directory, load_format = model_directory(args.model, Path(temporary))
        spec = read_model_spec(directory)
        paths = write_adapters(Path(temporary) / "adapters", 2 * NUM_ADAPTERS, spec, args.rank)
        adapters = Adapters(tuple(paths[:NUM_ADAPTERS]), args.rank)
        options: dict[str, object] = {
            "model_path": str(directory),
            "load_format": load_format,
            "device": device,
            "max_loras_per_batch": ROOM,
            "max_loaded_loras": NUM_ADAPTERS,
            "max_total_tokens": 20_000,
            "max_running_requests": 8,
            "disable_radix_cache": True,
        }
        values = engine_values(options, spec, adapters, 8)
        fresh = list(paths[NUM_ADAPTERS:])
        row = with_engine(values, lambda core, _: measure(core, adapters, fresh))
    content = common.about(
        "an adapter's way to the device", "benchmarks.lifecycle.activation", ("torch", "triton")
    )
    path = common.write_result({**content, "rank": args.rank, **row}, "activation", args.json)
    for name, value in row.items():
        print(f"{name:30} {value:9.2f}")
    print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
