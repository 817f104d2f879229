from __future__ import annotations

import pytest

from lorikeet.scheduler.limits import SchedulerLimits, StepBudget


def limits(**changes: object) -> SchedulerLimits:
    values: dict[str, object] = {
        "max_running": 8,
        "max_step_tokens": 32,
        "max_prefill_tokens": 20,
        "context_length": 100,
        "max_loras_per_batch": 2,
        "eos_token_ids": frozenset({2}),
    }
    return SchedulerLimits(**{**values, **changes})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("num_rows", "expected"), [(0, 20), (11, 20), (13, 19), (31, 1), (32, 0), (40, 0)]
)
def test_rows_come_first(num_rows: int, expected: int) -> None:
    budget = StepBudget.for_step(limits(), num_rows=num_rows, num_running=3, num_adapters=1)
    assert (budget.tokens, budget.sequences, budget.adapters) == (expected, 5, 1)
    assert budget.can_admit == (expected > 0)


def test_no_row_left() -> None:
    assert not StepBudget.for_step(limits(), num_rows=0, num_running=8, num_adapters=0).can_admit


@pytest.mark.parametrize(
    "name",
    [
        "max_running",
        "max_step_tokens",
        "max_prefill_tokens",
        "context_length",
        "max_loras_per_batch",
        "max_passes",
    ],
)
def test_limits_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        limits(**{name: 0})


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="known: fcfs, lpm"):
        limits(policy="random")
