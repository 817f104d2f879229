"""What Prometheus sees: requests, tokens and latencies as a client of the engine measures them, and the engine's gauges.

Everything is registered in a registry that the caller makes; nothing here is global. The latencies are measured in
the HTTP process, so they contain the queue and both crossings of the process boundary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

Outcome = Literal["stop", "length", "abort", "error"]
OUTCOMES: tuple[Outcome, ...] = ("stop", "length", "abort", "error")

# Seconds. The first token waits for a queue and a prompt, the next ones only for a step.
TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 80, 160)
ITL_BUCKETS = (0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
E2E_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640)


class RequestMetrics:
    """Counters and histograms over requests; :meth:`begin` opens the record of one.

    Args:
        registry: where the metrics are registered, once.
        model_name: value of the label ``model_name`` of every metric.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        model_name: str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock

        def counter(name: str, text: str) -> Counter:
            return Counter(f"lorikeet_{name}", text, ["model_name"], registry=registry).labels(
                model_name
            )

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"lorikeet_{name}_seconds",
                text,
                ["model_name"],
                registry=registry,
                buckets=buckets,
            ).labels(model_name)

        requests = Counter(
            "lorikeet_requests",
            "Requests that ended, by how they ended",
            ["model_name", "outcome"],
            registry=registry,
        )
        self.ended = {outcome: requests.labels(model_name, outcome) for outcome in OUTCOMES}
        self.open = Gauge(
            "lorikeet_requests_open",
            "Requests submitted and not yet ended",
            ["model_name"],
            registry=registry,
        ).labels(model_name)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = counter(
            "cached_prompt_tokens", "Tokens of prompts that came from the prefix cache"
        )
        self.generated_tokens = counter("generated_tokens", "Tokens generated")
        self.ttft = histogram("time_to_first_token", "Submission to first token", TTFT_BUCKETS)
        self.itl = histogram("inter_token_latency", "One token to the next", ITL_BUCKETS)
        self.e2e = histogram("request_latency", "Submission to the end", E2E_BUCKETS)

    def begin(self) -> RequestTimer:
        """A request is submitted now."""
        self.open.inc()
        return RequestTimer(self)


class RequestTimer:
    """The record of one request; call :meth:`tokens` for each output and :meth:`end` once."""

    __slots__ = ("_begun", "_last", "_metrics")

    def __init__(self, metrics: RequestMetrics) -> None:
        self._metrics = metrics
        self._begun = metrics.clock()
        self._last: float | None = None

    def tokens(self, count: int) -> None:
        """``count`` tokens arrived together; the time since the last ones is shared among them."""
        if not count:
            return
        metrics, now = self._metrics, self._metrics.clock()
        if self._last is None:
            metrics.ttft.observe(now - self._begun)
        else:
            for _ in range(count):
                metrics.itl.observe((now - self._last) / count)
        self._last = now
        metrics.generated_tokens.inc(count)

    def end(self, outcome: Outcome, *, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """The request has ended; one that was refused or failed adds to no histogram and no count of tokens."""
        metrics = self._metrics
        metrics.open.dec()
        metrics.ended[outcome].inc()
        if outcome == "error":
            return
        metrics.prompt_tokens.inc(num_prompt_tokens)
        metrics.cached_tokens.inc(num_cached_tokens)
        if outcome != "abort":
            metrics.e2e.observe(metrics.clock() - self._begun)


class EngineGauges(Collector):
    """The newest ``Stats`` of the engine, each value as a gauge ``lorikeet_engine_<name>``."""

    def __init__(self, registry: CollectorRegistry, *, model_name: str) -> None:
        self._model_name = model_name
        self._values: dict[str, float] = {}
        registry.register(self)

    @property
    def values(self) -> Mapping[str, float]:
        return self._values

    def update(self, values: Mapping[str, float]) -> None:
        self._values = dict(values)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for name, value in sorted(self._values.items()):
            family = GaugeMetricFamily(
                f"lorikeet_engine_{name}",
                f"{name} as the engine last reported it",
                labels=["model_name"],
            )
            family.add_metric([self._model_name], value)
            yield family
