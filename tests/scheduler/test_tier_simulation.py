"""Adapters that are read, copied and evicted on both tiers while random requests want them.

Reads and copies take random numbers of steps and fail now and then; names are unloaded and mean something else from one
moment to the next. On top of what ``test_simulation.py`` lists: nobody who waits for room is passed by more than
``max_passes`` later requests, whoever the queue wants leaves host memory only for somebody wanted before, bytes in host memory
never exceed the limit, no version is copied that is not there, and the loop neither spins nor sleeps while there is work.
"""

from __future__ import annotations

import random

import pytest

from tests.support.scenario import Scenario
from tests.support.simulation import Simulation


def random_scenario(seed: int) -> Scenario:
    rng = random.Random(seed)
    page_size = rng.choice((1, 4, 16))
    max_loras = rng.choice((1, 2, 4, 8))
    num_adapters = rng.choice((3, 8, 20, 40))
    return Scenario(
        seed=seed,
        num_requests=100,
        page_size=page_size,
        num_pages=rng.choice((64, 128, 320)) // page_size,
        radix=rng.random() < 0.5,
        overlap=rng.random() < 0.5,
        policy=rng.choice(("fcfs", "lpm")),
        max_running=rng.choice((1, 8, 16)),
        max_step_tokens=rng.choice((3, 40, 100)),
        max_loras=max_loras,
        num_slots=max_loras + 1 + rng.choice((0, 0, 4)),
        num_adapters=num_adapters,
        num_pinned=rng.choice((0, 0, min(max_loras, num_adapters) - 1)),
        popularity=rng.choice(("uniform", "zipf", "skewed")),
        base_share=rng.choice((0.0, 0.3)),
        eviction=rng.choice(("lru", "fifo")),
        max_passes=rng.choice((1, 4, 16)),
        arrivals_per_step=rng.choice((0.2, 1.0, 3.0)),
        abort_rate=rng.choice((0.0, 0.2)),
        copy_failure_rate=rng.choice((0.0, 0.0, 0.2)),
        replace_rate=rng.choice((0.0, 0.05, 0.3)),
        step_failure_rate=rng.choice((0.0, 0.0, 0.01)),
        max_host=rng.choice((max_loras, max_loras + 1, 2 * max_loras, None)),
        read_steps=rng.choice((1, 6, 30)),
        read_failure_rate=rng.choice((0.0, 0.0, 0.1)),
        copy_steps=rng.choice((0, 3, 10)),
        unload_rate=rng.choice((0.0, 0.0, 0.1)),
        max_reads=rng.choice((1, 2, 64)),
    )


@pytest.mark.parametrize("start", range(0, 24, 8))
def test_anything_goes(start: int) -> None:
    for seed in range(start, start + 8):
        Simulation(random_scenario(seed)).run()


@pytest.mark.parametrize("popularity", ["uniform", "zipf"])
@pytest.mark.parametrize("max_loras", [2, 4, 8])
@pytest.mark.parametrize("host_factor", [1, 2])
@pytest.mark.parametrize(("max_step_tokens", "max_reads"), [(200, 1), (32, 4)])
def test_more_adapters_than_device_and_host_hold(
    popularity: str, max_loras: int, host_factor: int, max_step_tokens: int, max_reads: int
) -> None:
    """Everybody gets a turn, after at most one read: what came for a request stays until it ran.

    What came for one that passed a longer one may have to make room for that and come again.
    """
    simulation = Simulation(
        Scenario(
            seed=23,
            num_requests=140,
            num_pages=300,
            num_adapters=6 * max_loras,
            popularity=popularity,
            max_loras=max_loras,
            num_slots=max_loras + 1,
            max_host=host_factor * max_loras,
            read_steps=8,
            copy_steps=2,
            max_running=16,
            max_step_tokens=max_step_tokens,
            max_prefill_tokens=max_step_tokens,
            arrivals_per_step=1.5,
            base_share=0.1,
            max_passes=8,
        )
    )
    simulation.run()
    assert all(
        answer.finish and answer.finish.kind != "abort" for answer in simulation.answers.values()
    )
    assert 0 < simulation.max_passed <= 8
    assert sum(simulation.host.num_reads.values()) > 20
    assert 1 <= simulation.max_reads_waited <= max_reads


def test_two_crowds_do_not_starve_each_other() -> None:
    """Nine in ten requests want one adapter; host memory and device hold one at a time."""
    simulation = Simulation(
        Scenario(
            seed=5,
            num_requests=140,
            num_pages=300,
            num_adapters=4,
            popularity="skewed",
            max_loras=1,
            num_slots=2,
            max_host=1,
            read_steps=4,
            copy_steps=2,
            base_share=0.0,
            arrivals_per_step=1.5,
            max_passes=8,
        )
    )
    simulation.run()
    assert 0 < simulation.max_passed <= 8


def test_the_bound_is_reached_with_tiers() -> None:
    simulation = Simulation(
        Scenario(
            seed=3,
            num_requests=150,
            num_pages=200,
            num_adapters=12,
            popularity="zipf",
            max_loras=2,
            num_slots=3,
            max_host=3,
            read_steps=3,
            copy_steps=1,
            max_running=16,
            arrivals_per_step=0.7,
            base_share=0.0,
            max_passes=4,
            ignore_eos=1.0,
        )
    )
    simulation.run()
    assert simulation.max_passed == 4


def test_long_reads_hold_nobody_up() -> None:
    """While adapters are read for hundreds of steps, requests for those that are there run as if alone."""
    simulation = Simulation(
        Scenario(
            seed=9,
            num_requests=150,
            num_pages=400,
            num_adapters=12,
            popularity="zipf",
            max_loras=4,
            num_slots=5,
            max_host=8,
            read_steps=400,
            max_running=16,
            arrivals_per_step=0.5,
            base_share=0.2,
            max_passes=2,
        )
    )
    simulation.run()
    assert simulation.num_passed_moving > 50
