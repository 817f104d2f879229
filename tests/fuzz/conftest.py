"""The time and the seeds of the fuzzers: seconds in CI, minutes as a slow test.

A fuzzer goes over ``chances``; each of them is a source of random choices with a seed of its own, which a failure shows:

    LORIKEET_FUZZ_SEED=0-1234 pytest tests/fuzz/test_stop.py    # that case, and no other
    LORIKEET_FUZZ_SECONDS=600 pytest -m slow tests/fuzz         # longer
    LORIKEET_FUZZ_SEED=7 pytest tests/fuzz                      # other cases: 7-0, 7-1, ...
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

import pytest

FAST_SECONDS = 2.0
SLOW_SECONDS = float(os.environ.get("LORIKEET_FUZZ_SECONDS", "120"))
SEED = os.environ.get("LORIKEET_FUZZ_SEED", "0")


class Chance(random.Random):
    """Random choices whose seed is seen where a test shows its variables."""

    def __new__(cls, name: str) -> Chance:
        return super().__new__(cls)

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)

    def __repr__(self) -> str:
        return f"Chance({self.name!r})"


def make_chances(seed: str, seconds: float) -> Iterator[Chance]:
    """Chances until the time is over; the one that ``seed`` names, if it names one. At least one in any case."""
    if "-" in seed:
        yield Chance(seed)
        return
    number, end = 0, time.monotonic() + seconds
    while not number or time.monotonic() < end:
        yield Chance(f"{seed}-{number}")
        number += 1


@pytest.fixture(
    params=[
        pytest.param(FAST_SECONDS, id="seconds"),
        pytest.param(
            SLOW_SECONDS,
            id="minutes",
            marks=[pytest.mark.slow, pytest.mark.timeout(SLOW_SECONDS + 300)],
        ),
    ]
)
def chances(request: pytest.FixtureRequest) -> Iterator[Chance]:
    """One source of random choices per case, for as long as the test may take."""
    return make_chances(SEED, request.param)
