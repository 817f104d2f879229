"""The metrics by hand, with a clock that the test moves."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from lorikeet.metrics import EngineGauges, Outcome, RequestMetrics


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
    gauges = EngineGauges(registry, model_name="m")
    assert b"lorikeet_engine" not in generate_latest(registry)
    gauges.update({"num_running": 3.0, "token_usage": 0.5})
    assert value(registry, "engine_num_running") == 3.0
    assert value(registry, "engine_token_usage") == 0.5
    gauges.update({"num_running": 0.0})
    assert value(registry, "engine_num_running") == 0.0
    assert value(registry, "engine_token_usage") is None, "what is no longer reported is gone"
    assert gauges.values == {"num_running": 0.0}


def test_two_registries_do_not_share_anything() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    RequestMetrics(first, model_name="m").begin()
    RequestMetrics(second, model_name="m")
    assert value(first, "requests_open") == 1
    assert value(second, "requests_open") == 0
