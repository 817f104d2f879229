"""Run requests through an engine and note when their tokens come."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.common import Row
from benchmarks.engine.floor import linear_shapes
from benchmarks.engine.traffic import Traffic
from lorikeet.core.commands import FlushCache
from lorikeet.core.request import Request, RequestOutput
from lorikeet.engine.core import EngineCore
from lorikeet.models.spec import ModelSpec

# Steps without an output after which an idle engine that will not forget its prefixes is a fault.
_FLUSH_TRIES = 1000


@dataclass
class Timeline:
    """When the tokens of requests that were submitted together came; seconds of ``time.perf_counter``.

    Attributes:
        began: just before the first was submitted.
        steps: for each call that brought tokens: its end, the requests that got some, and how many tokens.
        first, last: by request, its first and its newest token.
    """

    num_requests: int
    began: float
    steps: list[tuple[float, int, int]] = field(default_factory=list)
    first: dict[int, float] = field(default_factory=dict)
    last: dict[int, float] = field(default_factory=dict)
    num_tokens: int = 0
    num_cached: int = 0

    def note(self, outputs: Sequence[RequestOutput]) -> bool:
        """Take what one step returned; True if there were tokens.

        Raises:
            RuntimeError: a request has failed, so that the figures would mean nothing.
        """
        now = time.perf_counter()
        ids: set[int] = set()
        tokens = 0
        for output in outputs:
            if output.finish is not None and output.finish.kind == "abort":
                raise RuntimeError(f"request {output.id}: {output.finish.message}")
            if output.token_ids:
                if output.id not in self.first:
                    self.first[output.id] = now
                    self.num_cached += output.cached_tokens
                self.last[output.id] = now
                ids.add(output.id)
                tokens += len(output.token_ids)
        if ids:
            self.steps.append((now, len(ids), tokens))
            self.num_tokens += tokens
        return bool(ids)

    @property
    def all_decode(self) -> bool:
        """True from the last request's first token on."""
        return len(self.first) == self.num_requests

    @property
    def prefill_s(self) -> float:
        """Until every request has its first token."""
        return max(self.first.values()) - self.began

    @property
    def total_s(self) -> float:
        return max(self.last.values()) - self.began

    def step_seconds(self) -> list[float]:
        """Times from one token to the next while every request was decoding."""
        ready = max(self.first.values())
        gaps: list[float] = []
        for (earlier, rows, _), (later, next_rows, tokens) in itertools.pairwise(self.steps):
            if earlier >= ready and rows == next_rows == self.num_requests:
                gaps.append((later - earlier) * next_rows / tokens)
        return gaps

    def decode_s(self) -> float:
        """From the first token of the request that began last to its last one."""
        latest = max(self.first, key=self.first.__getitem__)
        return self.last[latest] - self.first[latest]


def generate(core: EngineCore, requests: Sequence[Request]) -> Timeline:
    """Submit all requests at once and step until the last has ended."""
    timeline = Timeline(len(requests), time.perf_counter())
    for request in requests:
        core.submit(request)
    while not core.is_idle:
        # With overlap a step may return nothing although work goes on.
        if not timeline.note(core.step()):
            core.wait_for_threads()
    return timeline


def forget_prefixes(core: EngineCore) -> None:
    """Empty the prefix cache.

    Raises:
        RuntimeError: the engine stays busy without an open request.
    """
    for _ in range(_FLUSH_TRIES):
        if core.command(FlushCache()) is True:
            return
        core.step()
    raise RuntimeError("the engine does not become idle, so its prefix cache cannot be emptied")


@dataclass(frozen=True)
class Load:
    """One row of the measurement: so many requests at once, of fixed lengths, with these adapters."""

    input_len: int
    output_len: int
    adapters: tuple[str | None, ...]

    @property
    def concurrency(self) -> int:
        return len(self.adapters)

    def describe(self) -> Row:
        """The part of a result's row that says what was asked."""
        return {
            "input_len": self.input_len,
            "output_len": self.output_len,
            "concurrency": self.concurrency,
            "distinct_adapters": len({name for name in self.adapters if name is not None}),
        }


def measure_load(core: EngineCore, traffic: Traffic, load: Load, repeats: int) -> Row:
    """Medians over ``repeats`` runs after a short one that warms up; each run's own figures under ``runs``."""

    def run(output_len: int) -> Timeline:
        forget_prefixes(core)
        return generate(core, traffic.requests(load.input_len, output_len, load.adapters))

    run(min(8, load.output_len))
    runs = [_figures(load, run(load.output_len)) for _ in range(repeats)]
    return {
        **load.describe(),
        **{name: _median([run[name] for run in runs]) for name in runs[0]},
        "runs": runs,
    }


def _figures(load: Load, timeline: Timeline) -> Row:
    expected = load.concurrency * load.output_len
    if timeline.num_tokens != expected:
        raise RuntimeError(f"{timeline.num_tokens} tokens came instead of {expected}")
    steps, total = timeline.step_seconds(), timeline.total_s
    num_gaps = load.output_len - 1
    return {
        "prefill_ms": 1e3 * timeline.prefill_s,
        "inter_token_ms": 1e3 * statistics.median(steps) if steps else None,
        "mean_inter_token_ms": 1e3 * timeline.decode_s() / num_gaps if num_gaps else None,
        "steps_measured": len(steps),
        "output_tokens_per_s": expected / total,
        "total_tokens_per_s": (expected + load.concurrency * load.input_len) / total,
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def measure_prefill(
    core: EngineCore, traffic: Traffic, spec: ModelSpec, load: Load, repeats: int
) -> Row:
    """Time until all prompts have their one token, and the rate of the linear layers' arithmetic in it.

    Attention's own arithmetic is not counted. The LM head counts for the rows that are sampled.
    """

    def run() -> float:
        forget_prefixes(core)
        return generate(core, traffic.requests(load.input_len, 1, load.adapters)).prefill_s

    run()
    seconds = statistics.median(run() for _ in range(repeats))
    num_tokens = load.concurrency * load.input_len
    *inner, (vocab, hidden) = linear_shapes(spec)
    operations = 2 * num_tokens * sum(rows * columns for rows, columns in inner)
    operations += 2 * load.concurrency * vocab * hidden
    return {
        **load.describe(),
        "ms": 1e3 * seconds,
        "tokens_per_s": num_tokens / seconds,
        "linear_tflops": operations / seconds / 1e12,
    }


def measure_prefix_hit(
    core: EngineCore, traffic: Traffic, load: Load, repeats: int, share: float = 0.9
) -> Row:
    """Prefill time of prompts whose first ``share`` was computed before, against that of prompts all new."""
    shared_len = int(load.input_len * share)

    def run(prompts: Sequence[list[int]]) -> Timeline:
        pairs = zip(prompts, load.adapters, strict=True)
        return generate(core, [traffic.request(prompt, 1, name) for prompt, name in pairs])

    def pair() -> tuple[float, float, float]:
        forget_prefixes(core)
        prompts = [traffic.prompt(load.input_len) for _ in load.adapters]
        cold = run(prompts)
        tails = load.input_len - shared_len
        warm = run([prompt[:shared_len] + traffic.prompt(tails) for prompt in prompts])
        return cold.prefill_s, warm.prefill_s, warm.num_cached / (len(prompts) * load.input_len)

    pair()
    colds, warms, cached = zip(*(pair() for _ in range(repeats)), strict=True)
    cold, warm = statistics.median(colds), statistics.median(warms)
    return {
        **load.describe(),
        "cached_share": statistics.median(cached),
        "cold_ms": 1e3 * cold,
        "hit_ms": 1e3 * warm,
        "times_faster": cold / warm,
    }
