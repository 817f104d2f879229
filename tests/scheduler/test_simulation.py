"""Thousands of random requests and adapters; see ``tests/support/simulation.py`` for what is checked.

In each run, after each step: every integrity check; before each token: every K/V position that it may attend to. For
each request: the oracle's tokens, log-probabilities of the right positions, one terminal output, passed by at most
``max_passes`` later requests. At the end: no page, slot, rank page, lease or worker state is left.
"""

from __future__ import annotations

import random
from itertools import product

import pytest

from tests.support.scenario import Scenario
from tests.support.simulation import Simulation


def random_scenario(seed: int, *, overlap: bool, radix: bool, policy: str) -> Scenario:
    rng = random.Random(seed)
    page_size = rng.choice((1, 2, 4, 8, 16))
    max_loras = rng.choice((1, 2, 3, 5))
    num_adapters = rng.choice((1, 3, 8, 20))
    return Scenario(
        seed=seed,
        num_requests=100,
        page_size=page_size,
        num_pages=rng.choice((64, 80, 128, 320)) // page_size,
        radix=radix,
        overlap=overlap,
        policy=policy,
        max_running=rng.choice((1, 4, 8, 16)),
        max_step_tokens=rng.choice((3, 16, 40, 100)),
        max_prefill_tokens=rng.choice((9, 64)),
        max_loras=max_loras,
        num_slots=max_loras + 1 + rng.choice((0, 0, 1, 4)),
        num_adapters=num_adapters,
        num_pinned=rng.choice((0, 0, min(max_loras - 1, num_adapters))),
        popularity=rng.choice(("uniform", "zipf")),
        base_share=rng.choice((0.0, 0.2, 0.5)),
        eviction=rng.choice(("lru", "fifo")),
        max_passes=rng.choice((1, 4, 16)),
        arrivals_per_step=rng.choice((0.2, 1.0, 3.0)),
        abort_rate=rng.choice((0.0, 0.1, 0.3)),
        copy_failure_rate=rng.choice((0.0, 0.0, 0.2)),
        token_error_rate=rng.choice((0.0, 0.0, 0.02)),
        replace_rate=rng.choice((0.0, 0.05)),
        step_failure_rate=rng.choice((0.0, 0.0, 0.01)),
        pooling_rate=rng.choice((0.0, 0.3)),
        even_length=rng.choice((None, None, 5)),
    )


@pytest.mark.parametrize(
    ("index", "overlap", "radix", "policy"),
    [
        (index, overlap, radix, policy)
        for index, (overlap, radix, policy) in enumerate(
            product((False, True), (True, False), ("fcfs", "lpm"))
        )
    ],
)
def test_anything_goes(index: int, overlap: bool, radix: bool, policy: str) -> None:
    for round_ in range(5):
        scenario = random_scenario(
            1000 * round_ + index, overlap=overlap, radix=radix, policy=policy
        )
        Simulation(scenario).run()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("radix", [False, True])
def test_a_pool_that_is_far_too_small(overlap: bool, radix: bool) -> None:
    scenario = Scenario(
        seed=7,
        page_size=2,
        num_pages=32,
        radix=radix,
        overlap=overlap,
        max_running=12,
        max_step_tokens=64,
        arrivals_per_step=3.0,
        ignore_eos=1.0,
    )
    simulation = Simulation(scenario)
    simulation.run()
    assert simulation.scheduler.stats().total_preemptions > 20


@pytest.mark.parametrize("overlap", [False, True])
def test_vectors_beside_tokens_in_a_small_pool(overlap: bool) -> None:
    scenario = Scenario(
        seed=21,
        num_requests=300,
        page_size=2,
        num_pages=32,
        overlap=overlap,
        max_running=12,
        max_step_tokens=7,
        arrivals_per_step=1.0,
        abort_rate=0.05,
        token_error_rate=0.02,
        step_failure_rate=0.01,
        pooling_rate=0.6,
        ignore_eos=1.0,
    )
    simulation = Simulation(scenario)
    simulation.run()
    assert simulation.scheduler.stats().total_preemptions > 10
    ended = [answer for answer in simulation.answers.values() if answer.embedding is not None]
    assert len(ended) > 100
    assert any(max(answer.cached) for answer in ended), "the last state may follow a cached prefix"


def test_a_roomy_pool_serves_prefixes_from_the_cache() -> None:
    simulation = Simulation(
        Scenario(seed=3, num_pages=400, num_adapters=2, arrivals_per_step=0.5, num_requests=200)
    )
    simulation.run()
    stats = simulation.scheduler.stats()
    assert stats.total_preemptions == 0
    assert stats.total_cached_tokens > 0.3 * stats.total_prompt_tokens


@pytest.mark.parametrize("popularity", ["uniform", "zipf"])
@pytest.mark.parametrize("max_loras", [2, 4])
def test_far_more_adapters_than_slots(popularity: str, max_loras: int) -> None:
    """Everybody gets a turn, and nobody is passed more often than is promised."""
    scenario = Scenario(
        seed=11,
        num_requests=400,
        num_pages=200,
        num_adapters=4 * max_loras,
        popularity=popularity,
        max_loras=max_loras,
        num_slots=max_loras + 1,
        max_running=16,
        arrivals_per_step=2.0,
        base_share=0.1,
        max_passes=8,
    )
    simulation = Simulation(scenario)
    simulation.run()
    assert 0 < simulation.max_passed <= 8


def test_long_runs_of_one_popular_adapter_do_not_starve_the_rest() -> None:
    """Nine in ten requests want adapter 0; the wait for the others is bounded by what runs, not by what arrives."""
    scenario = Scenario(
        seed=5,
        num_requests=300,
        num_pages=300,
        num_adapters=3,
        popularity="skewed",
        max_loras=1,
        num_slots=2,
        base_share=0.0,
        arrivals_per_step=1.5,
        max_passes=8,
    )
    simulation = Simulation(scenario)
    simulation.run()
    assert 0 < simulation.max_passed <= 8


def test_the_bound_on_passes_is_reached() -> None:
    """Or the other tests would show nothing about it."""
    scenario = Scenario(
        seed=2,
        num_requests=150,
        num_pages=200,
        num_adapters=8,
        popularity="zipf",
        max_loras=2,
        num_slots=3,
        max_running=16,
        max_step_tokens=400,
        max_prefill_tokens=400,
        arrivals_per_step=0.7,
        base_share=0.0,
        max_passes=4,
        ignore_eos=1.0,
    )
    simulation = Simulation(scenario)
    simulation.run()
    assert simulation.max_passed == 4
