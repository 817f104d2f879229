"""The metrics by hand, with a clock that the test moves."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from lorikeet.metrics import TOP_ADAPTERS, AdapterLabels, EngineMetrics, Outcome, RequestMetrics


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"lorikeet_{name}", {"model_name": "m", **labels})


def test_one_request_fills_every_metric() -> None:
    registry, clock = CollectorRegistry(), Clock()
    metrics = RequestMetrics(registry, model_name="m", clock=clock)
    timer = metrics.begin()
    assert value(registry, "requests_open") == 1
    clock.now += 0.5
    timer.tokens(1)
    clock.now += 0.3
    timer.tokens(0)  # a step without a token of it: no sample
    timer.tokens(3)
    clock.now += 0.2
    timer.end("length", num_prompt_tokens=7, num_cached_tokens=4)

    assert value(registry, "requests_open") == 0
    assert value(registry, "requests_total", outcome="length") == 1
    assert value(registry, "requests_total", outcome="stop") == 0
    assert value(registry, "prompt_tokens_total") == 7
    assert value(registry, "cached_prompt_tokens_total") == 4
    assert value(registry, "generated_tokens_total") == 4
    assert value(registry, "time_to_first_token_seconds_count") == 1
    assert value(registry, "time_to_first_token_seconds_sum") == pytest.approx(0.5)
    # Three tokens at once share the time since the last one.
    assert value(registry, "inter_token_latency_seconds_count") == 3
    assert value(registry, "inter_token_latency_seconds_sum") == pytest.approx(0.3)
    assert value(registry, "request_latency_seconds_count") == 1
    assert value(registry, "request_latency_seconds_sum") == pytest.approx(1.0)


@pytest.mark.parametrize(("outcome", "num_prompts"), [("abort", 7), ("error", 0)])
def test_what_did_not_run_to_its_end_has_no_latency(outcome: Outcome, num_prompts: int) -> None:
    registry = CollectorRegistry()
    timer = RequestMetrics(registry, model_name="m").begin()
    timer.end(outcome, num_prompt_tokens=7, num_cached_tokens=0)
    assert value(registry, "requests_total", outcome=outcome) == 1
    assert value(registry, "prompt_tokens_total") == num_prompts
    assert value(registry, "request_latency_seconds_count") == 0
    assert value(registry, "requests_open") == 0


def test_the_engines_numbers_are_gauges_of_its_names() -> None:
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry, model_name="m")
    assert b"lorikeet_engine" not in generate_latest(registry)
    metrics.update({"num_running": 3.0, "token_usage": 0.5}, {}, {})
    assert value(registry, "engine_num_running") == 3.0
    assert value(registry, "engine_token_usage") == 0.5
    metrics.update({"num_running": 0.0}, {}, {})
    assert value(registry, "engine_num_running") == 0.0
    assert value(registry, "engine_token_usage") is None, "what is no longer reported is gone"
    assert metrics.values == {"num_running": 0.0}
    assert b"vllm:" not in generate_latest(registry), "an engine without LoRA has no adapters"


def test_adapters_of_the_engine() -> None:
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry, model_name="m", max_lora=2, now=lambda: 1789828498.5)
    numbers = {
        "num_adapters_host": 3.0,
        "num_adapters_device": 2.0,
        "num_adapters_failed": 0.0,
        "num_waiting_for_adapter": 4.0,
        "total_adapter_loads": 7.0,
        "total_adapter_host_evictions": 5.0,
        "total_adapter_device_evictions": 6.0,
    }
    names = {"running_lora_adapters": ["a", "b"], "waiting_lora_adapters": ["c"]}
    times = {"adapter_load_seconds": [0.25, 0.5], "adapter_cold_start_seconds": [0.125]}
    metrics.update(numbers, names, times)
    assert value(registry, "adapters", tier="host") == 3
    assert value(registry, "adapters", tier="device") == 2
    assert value(registry, "adapters", tier="failed") == 0
    assert value(registry, "adapters", tier="disk") is None
    assert value(registry, "requests_waiting_for_adapter") == 4
    assert value(registry, "adapter_loads_total") == 7
    assert value(registry, "adapter_evictions_total", tier="host") == 5
    assert value(registry, "adapter_evictions_total", tier="device") == 6
    assert b"lorikeet_engine" not in generate_latest(registry), "no number has two metrics"
    info = {"max_lora": "2", "running_lora_adapters": "a,b", "waiting_lora_adapters": "c"}
    assert registry.get_sample_value("vllm:lora_requests_info", info) == 1789828498.5

    metrics.update(numbers, {}, times)
    assert value(registry, "adapter_load_seconds_count") == 4
    assert value(registry, "adapter_load_seconds_sum") == pytest.approx(1.5)
    assert value(registry, "adapter_cold_start_seconds_count") == 2
    assert value(registry, "adapter_reload_seconds_count") == 0
    assert registry.get_sample_value("vllm:lora_requests_info", info) is None, (
        "one series at a time"
    )
    idle = info | {"running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert registry.get_sample_value("vllm:lora_requests_info", idle) == 1789828498.5


def test_a_long_queue_of_adapters_is_cut() -> None:
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry, model_name="m", max_lora=2)
    names = [f"a{i}" for i in range(1000)]
    assert b"vllm:" not in generate_latest(registry), "nothing is known before the first report"
    metrics.update({}, {"waiting_lora_adapters": names}, {})
    label = {
        "max_lora": "2",
        "running_lora_adapters": "",
        "waiting_lora_adapters": ",".join(names[:100]),
    }
    assert registry.get_sample_value("vllm:lora_requests_info", label) is not None


def test_requests_by_adapter() -> None:
    registry, clock = CollectorRegistry(), Clock()
    metrics = RequestMetrics(registry, model_name="m", clock=clock)
    for adapter in (None, "sql"):
        timer = metrics.begin(adapter)
        clock.now += 0.5
        timer.tokens(1)
        clock.now += 0.25
        timer.tokens(2)
        timer.end("stop", num_prompt_tokens=7, num_cached_tokens=4)
    for label in ("base", "sql"):
        assert value(registry, "adapter_requests_total", adapter=label, outcome="stop") == 1
        assert value(registry, "adapter_prompt_tokens_total", adapter=label) == 7
        assert value(registry, "adapter_generated_tokens_total", adapter=label) == 3
        name = "adapter_time_to_first_token_seconds"
        assert value(registry, f"{name}_sum", adapter=label) == pytest.approx(0.5)
        name = "adapter_inter_token_latency_seconds"
        assert value(registry, f"{name}_count", adapter=label) == 2
        assert value(registry, f"{name}_sum", adapter=label) == pytest.approx(0.25)


def labels(registry: CollectorRegistry) -> set[str]:
    return {
        sample.labels["adapter"]
        for family in registry.collect()
        for sample in family.samples
        if "adapter" in sample.labels
    }


def serve(metrics: RequestMetrics, adapter: str, count: int = 1) -> None:
    for _ in range(count):
        timer = metrics.begin(adapter)
        timer.tokens(1)
        timer.end("length", num_prompt_tokens=1, num_cached_tokens=0)


def test_labels_are_bounded_and_go_to_the_busiest() -> None:
    registry = CollectorRegistry()
    metrics = RequestMetrics(registry, model_name="m")
    for index in range(300):
        serve(metrics, f"a{index}")
    assert labels(registry) == {f"a{index}" for index in range(TOP_ADAPTERS)} | {"other"}
    assert value(registry, "adapter_requests_total", adapter="other", outcome="length") == 280
    busy = {f"a{index}" for index in range(200, 200 + TOP_ADAPTERS)}
    for name in sorted(busy):
        serve(metrics, name, 10)
    assert labels(registry) == busy | {"other"}
    total = sum(
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "lorikeet_adapter_requests_total"
    )
    assert total == 300 + 10 * TOP_ADAPTERS - TOP_ADAPTERS, "a dropped series takes its own along"
    # What has no label keeps everything.
    assert value(registry, "requests_total", outcome="length") == 300 + 10 * TOP_ADAPTERS


def test_a_refused_name_is_never_a_label() -> None:
    registry = CollectorRegistry()
    metrics = RequestMetrics(registry, model_name="m")
    for index in range(50):
        timer = metrics.begin(f"made-up-{index}")
        timer.end("error", num_prompt_tokens=0, num_cached_tokens=0)
    assert labels(registry) == {"other"}
    assert value(registry, "adapter_requests_total", adapter="other", outcome="error") == 50


def test_adapters_named_like_the_shared_labels() -> None:
    registry = CollectorRegistry()
    metrics = RequestMetrics(registry, model_name="m")
    serve(metrics, "base")
    serve(metrics, "other")
    assert labels(registry) == {"base (adapter)", "other (adapter)"}


def test_equally_popular_adapters_do_not_take_turns() -> None:
    names = AdapterLabels(size=2)
    for _ in range(50):
        for adapter in "abcd":
            names.count(adapter)
    assert [names.of(adapter) for adapter in "abcd"] == ["a", "b", "other", "other"]


def test_counts_are_bounded_and_fade() -> None:
    names = AdapterLabels(size=1, max_counted=8)
    for _ in range(5):
        names.count("old")
    for index in range(100):
        names.count(f"once-{index}")
    dropped = [names.count("new") for _ in range(4)]
    assert names.of("new") == "new"
    assert [name for name in dropped if name]


def test_two_registries_do_not_share_anything() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    RequestMetrics(first, model_name="m").begin()
    RequestMetrics(second, model_name="m")
    assert value(first, "requests_open") == 1
    assert value(second, "requests_open") == 0
