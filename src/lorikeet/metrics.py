"""What Prometheus sees: requests, tokens and latencies as a client of the engine measures them, and the engine's numbers.

Everything is registered in a registry that the caller makes; nothing here is global. The latencies are measured in
the HTTP process, so they contain the queue and both crossings of the process boundary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_M = TypeVar("_M", Counter, Gauge, Histogram)
Outcome = Literal["stop", "length", "abort", "error"]
OUTCOMES: tuple[Outcome, ...] = ("stop", "length", "abort", "error")

# Seconds. The first token waits for a queue and a prompt, the next ones only for a step.
TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 80, 160)
ITL_BUCKETS = (0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
E2E_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640)
LOAD_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300)

# Adapters come and go by the thousand, and each value of a label is kept for ever by who scrapes it.
TOP_ADAPTERS = 20
BASE, OTHER = "base", "other"
# Adapters whose requests are counted to find the top ones. Beyond it all counts are halved and the zeros forgotten.
MAX_COUNTED_ADAPTERS = 10_000
# Longest list of names in a label of vllm:lora_requests_info. A router asks whether it exceeds max_lora.
MAX_LISTED_ADAPTERS = 100


class AdapterLabels:
    """Which adapters have a label of their own: at most ``size``, the others share one.

    An adapter takes the place of the one with the fewest requests once it has had twice as many. Without the factor,
    adapters of equal popularity would take turns, each turn a new series.

    Args:
        size: how many adapters have a label; the base model's is not counted.
    """

    def __init__(self, size: int = TOP_ADAPTERS, max_counted: int = MAX_COUNTED_ADAPTERS) -> None:
        self._size = size
        self._max_counted = max_counted
        self._counts: dict[str, int] = {}
        self._named: set[str] = set()

    def of(self, adapter: str | None) -> str:
        """The label of an adapter at this moment; None is the base."""
        if adapter is None:
            return BASE
        if adapter not in self._named:
            return OTHER
        return f"{adapter} (adapter)" if adapter in (BASE, OTHER) else adapter

    def count(self, adapter: str | None) -> str | None:
        """One more request of this adapter.

        Returns:
            The label that is given up for it, if one is.
        """
        if adapter is None:
            return None
        self._counts[adapter] = self._counts.get(adapter, 0) + 1
        if len(self._counts) > self._max_counted:
            self._counts = {name: num // 2 for name, num in self._counts.items() if num > 1}
        if adapter in self._named:
            return None
        dropped = None
        if len(self._named) >= self._size:
            least = min(self._named, key=lambda name: self._counts.get(name, 0))
            if self._counts.get(adapter, 0) < 2 * max(1, self._counts.get(least, 0)):
                return None
            dropped = self.of(least)
            self._named.remove(least)
        self._named.add(adapter)
        return dropped


class _Twins(Generic[_M]):
    """A metric over all requests, and the same one by adapter.

    Args:
        by_adapter: the text of the second one.
        outcomes: values of the label ``outcome``; empty: there is no such label.
        options: of ``kind``.
    """

    def __init__(
        self,
        kind: Callable[..., _M],
        name: str,
        text: str,
        by_adapter: str,
        *,
        model_name: str,
        outcomes: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        names = ["outcome"] if outcomes else []
        self._model_name = model_name
        self._series: list[tuple[str, ...]] = [(outcome,) for outcome in outcomes] or [()]
        whole = kind(f"lorikeet_{name}", text, ["model_name", *names], **options)
        self._whole = {series: whole.labels(model_name, *series) for series in self._series}
        names = ["model_name", "adapter", *names]
        self._by_adapter = kind(f"lorikeet_adapter_{name}", by_adapter, names, **options)

    def of(self, adapter: str, *series: str) -> tuple[_M, _M]:
        """Both, for an adapter's label and an outcome."""
        return self._whole[series], self._by_adapter.labels(self._model_name, adapter, *series)

    def drop(self, adapter: str) -> None:
        """Forget what was counted under an adapter's label."""
        for series in self._series:
            self.of(adapter, *series)  # makes it: what is not there cannot be removed
            self._by_adapter.remove(self._model_name, adapter, *series)


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
        self.labels = AdapterLabels()

        def single(kind: Callable[..., _M], name: str, text: str, **options: Any) -> _M:
            made = kind(f"lorikeet_{name}", text, ["model_name"], registry=registry, **options)
            return made.labels(model_name)

        def twins(
            kind: Callable[..., _M], name: str, text: str, by_adapter: str = "", **options: Any
        ) -> _Twins[_M]:
            options |= {"model_name": model_name, "registry": registry}
            return _Twins(kind, name, text, by_adapter or f"{text} by adapter", **options)

        self.open = single(Gauge, "requests_open", "Requests submitted and not yet ended")
        text = "Tokens of prompts that came from the prefix cache"
        self.cached_tokens = single(Counter, "cached_prompt_tokens", text)
        text = "Submission to the end"
        self.e2e = single(Histogram, "request_latency_seconds", text, buckets=E2E_BUCKETS)
        self.ended = twins(
            Counter,
            "requests",
            "Requests that ended, by how they ended",
            "Requests that ended, by adapter and how they ended",
            outcomes=OUTCOMES,
        )
        self.prompt_tokens = twins(Counter, "prompt_tokens", "Tokens of prompts")
        self.generated_tokens = twins(Counter, "generated_tokens", "Tokens generated")
        text = "Submission to first token"
        self.ttft = twins(Histogram, "time_to_first_token_seconds", text, buckets=TTFT_BUCKETS)
        text = "One token to the next"
        self.itl = twins(Histogram, "inter_token_latency_seconds", text, buckets=ITL_BUCKETS)

    def begin(self, adapter: str | None = None) -> RequestTimer:
        """A request for ``adapter`` (None: the base model) is submitted now."""
        self.open.inc()
        return RequestTimer(self, adapter)

    def started(self, adapter: str | None) -> None:
        """A request of this adapter was served. One that was refused does not count: its name may mean nothing."""
        dropped = self.labels.count(adapter)
        if dropped is not None:
            for metric in (self.prompt_tokens, self.generated_tokens, self.ttft, self.itl):
                metric.drop(dropped)
            self.ended.drop(dropped)


class RequestTimer:
    """The record of one request; call :meth:`tokens` for each output and :meth:`end` once."""

    __slots__ = ("_adapter", "_begun", "_last", "_metrics")

    def __init__(self, metrics: RequestMetrics, adapter: str | None) -> None:
        self._metrics = metrics
        self._adapter = adapter
        self._begun = metrics.clock()
        self._last: float | None = None

    def tokens(self, count: int) -> None:
        """``count`` tokens arrived together; the time since the last ones is shared among them."""
        if not count:
            return
        metrics, now = self._metrics, self._metrics.clock()
        if self._last is None:
            metrics.started(self._adapter)
            latency, samples, seconds = metrics.ttft, 1, now - self._begun
        else:
            latency, samples, seconds = metrics.itl, count, (now - self._last) / count
        self._last = now
        label = metrics.labels.of(self._adapter)
        for histogram in latency.of(label):
            for _ in range(samples):
                histogram.observe(seconds)
        for counter in metrics.generated_tokens.of(label):
            counter.inc(count)

    def end(self, outcome: Outcome, *, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """The request has ended; one that was refused or failed adds to no histogram and no count of tokens."""
        metrics, failed = self._metrics, outcome == "error"
        metrics.open.dec()
        if not failed and self._last is None:
            metrics.started(self._adapter)
        label = metrics.labels.of(self._adapter)
        for counter in metrics.ended.of(label, outcome):
            counter.inc()
        for counter in metrics.prompt_tokens.of(label):
            counter.inc(0 if failed else num_prompt_tokens)
        metrics.cached_tokens.inc(0 if failed else num_cached_tokens)
        if outcome not in ("abort", "error"):
            metrics.e2e.observe(metrics.clock() - self._begun)


class _Family(NamedTuple):
    """A metric of what the engine reports: ``keys`` are its names there, each with its value of ``label``."""

    kind: type[GaugeMetricFamily | CounterMetricFamily]
    name: str
    text: str
    keys: dict[str, str]
    label: str | None = None


def _counter(name: str, text: str) -> _Family:
    return _Family(CounterMetricFamily, f"adapter_{name}", text, {f"total_adapter_{name}": ""})


_TIERS = ("disk", "reading", "host", "copying", "device", "failed")
# What the engine reports under these names has a metric of its own; everything else is lorikeet_engine_<name>.
_FAMILIES = (
    _Family(
        GaugeMetricFamily,
        "adapters",
        "Adapters by where they are",
        {f"num_adapters_{tier}": tier for tier in _TIERS},
        "tier",
    ),
    _Family(
        GaugeMetricFamily,
        "requests_waiting_for_adapter",
        "Waiting requests whose adapter is not on the device",
        {"num_waiting_for_adapter": ""},
    ),
    _counter("loads", "Adapters loaded"),
    _counter("load_failures", "Loads that were refused or failed"),
    _counter("unloads", "Adapters unloaded"),
    _counter("reloads", "Adapters read again after they had left host memory"),
    _Family(
        CounterMetricFamily,
        "adapter_evictions",
        "Adapters that lost their place in a memory to another one",
        {f"total_adapter_{tier}_evictions": tier for tier in ("host", "device")},
        "tier",
    ),
)
_HISTOGRAMS = {
    "adapter_load_seconds": "The command to load an adapter, until requests can name it",
    "adapter_reload_seconds": "Reading an adapter again after it had left host memory",
    "adapter_cold_start_seconds": "A request's wait until its adapter was on the device",
}
_OWN = {key for family in _FAMILIES for key in family.keys}


class EngineMetrics(Collector):
    """The newest ``Stats`` of the engine.

    Args:
        registry: where the metrics are registered, once.
        model_name: value of the label ``model_name``.
        max_lora: adapters that fit into one batch; None if LoRA is off.
        now: seconds since 1970.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        model_name: str,
        max_lora: int | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._model_name = model_name
        self._max_lora = max_lora
        self._now = now
        self._values: dict[str, float] = {}
        self._names: dict[str, Sequence[str]] = {}
        self._updated: float | None = None

        self._histograms = {
            name: Histogram(
                f"lorikeet_{name}", text, ["model_name"], registry=registry, buckets=LOAD_BUCKETS
            ).labels(model_name)
            for name, text in _HISTOGRAMS.items()
        }
        registry.register(self)

    @property
    def values(self) -> Mapping[str, float]:
        return self._values

    def update(
        self,
        values: Mapping[str, float],
        labels: Mapping[str, Sequence[str]],
        samples: Mapping[str, Sequence[float]],
    ) -> None:
        """A report of the engine: what is so now, and what it measured since the last one."""
        self._values = dict(values)
        self._names = dict(labels)
        self._updated = self._now()
        for name, histogram in self._histograms.items():
            for seconds in samples.get(name, ()):
                histogram.observe(seconds)

    def collect(self) -> Iterable[Metric]:
        rest = [
            _Family(
                GaugeMetricFamily,
                f"engine_{name}",
                f"{name} as the engine last reported it",
                {name: ""},
            )
            for name in sorted(self._values.keys() - _OWN)
        ]
        for kind, name, text, keys, label in (*rest, *_FAMILIES):
            found = {key: value for key, value in keys.items() if key in self._values}
            if not found:
                continue
            names = ["model_name", *([label] if label else [])]
            family = kind(f"lorikeet_{name}", text, labels=names)
            for key, value in found.items():
                labels = [self._model_name, *([value] if label else [])]
                family.add_metric(labels, self._values[key])
            yield family
        if self._max_lora is not None and self._updated is not None:
            yield self._lora_requests(self._max_lora, self._updated)

    def _lora_requests(self, max_lora: int, updated: float) -> Metric:
        """The gauge by which adapter-aware routers of vLLM choose a server; its value is the time of the report."""
        names = {
            key: ",".join(self._names.get(key, ())[:MAX_LISTED_ADAPTERS])
            for key in ("running_lora_adapters", "waiting_lora_adapters")
        }
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and of waiting requests; the value is when this was so",
            labels=["max_lora", *names],
        )
        family.add_metric([str(max_lora), *names.values()], updated)
        return family
