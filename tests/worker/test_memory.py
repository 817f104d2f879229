"""The memory split: what K/V gets, and the refusal when it is too little."""

from __future__ import annotations

import pytest

from lorikeet.errors import ConfigError
from lorikeet.worker.memory import (
    POOL,
    WEIGHTS,
    MemoryRequest,
    available_host_bytes,
    check_memory,
    split_memory,
)

GB = 10**9


def request(**changes) -> MemoryRequest:
    values = {
        "weights_bytes": 2 * GB,
        "pool_bytes": 1 * GB,
        "kv_bytes_per_token": 100_000,
        "page_size": 16,
        "available_bytes": 10 * GB,
        "useful_tokens": 10**9,
        "min_tokens": 4096,
    }
    return MemoryRequest(**(values | changes))


def test_kv_gets_what_is_left_of_the_fraction() -> None:
    split = split_memory(request(fraction=0.8))
    assert split.num_pages == (8 * GB - 3 * GB) // (16 * 100_000)
    assert split.kv_bytes == split.num_pages * 16 * 100_000
    assert split.weights_bytes + split.pool_bytes + split.kv_bytes <= 8 * GB


def test_kv_never_exceeds_what_can_be_used() -> None:
    split = split_memory(request(useful_tokens=5000))
    assert split.num_tokens == 5008  # 5000 tokens in whole pages of 16


def test_max_total_tokens_overrides_the_fraction() -> None:
    split = split_memory(request(max_total_tokens=60_000, fraction=0.1))
    assert split.num_tokens == 60_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fraction": 0.3}, ["10.00 GB", "2.00 GB", "1.00 GB", "4096 tokens", "0.41 GB"]),
        ({"max_total_tokens": 80_000}, ["80000 tokens", "8.00 GB"]),
        ({"weights_bytes": 20 * GB}, ["20.00 GB", "--mem-fraction-static"]),
    ],
)
def test_too_little_memory_is_refused_with_the_numbers(changes, words) -> None:
    with pytest.raises(ConfigError) as caught:
        split_memory(request(**changes))
    for word in words:
        assert word in str(caught.value)


def test_available_memory_is_a_plausible_figure() -> None:
    assert 10**7 < available_host_bytes() < 10**14


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({WEIGHTS: 9 * GB}, ["weights need 9.00 GB", "only 8.00 GB is left", "--dtype"]),
        (
            {WEIGHTS: 6 * GB, POOL: 3 * GB},
            ["weights need 6.00 GB, adapters need 3.00 GB", "only 2.00 GB", "--max-lora-rank"],
        ),
        ({WEIGHTS: 9 * GB, POOL: GB}, ["only 0.00 MB is left for adapters"]),
        ({WEIGHTS: GB, POOL: 0, "K/V for 7 tokens": 8 * GB}, ["--context-length"]),
    ],
)
def test_what_finds_no_room_is_refused_with_what_would_help(needs, words) -> None:
    with pytest.raises(ConfigError, match=r"^not enough memory: 8.00 GB available; ") as caught:
        check_memory(8 * GB, needs)
    for word in words:
        assert word in str(caught.value)
    assert "need 0" not in str(caught.value)


def test_what_fits_is_not_refused() -> None:
    check_memory(8 * GB, {WEIGHTS: 8 * GB})
    check_memory(8 * GB, {WEIGHTS: 6 * GB, POOL: 2 * GB})
    check_memory(None, {WEIGHTS: 10**20})


def test_a_fraction_that_leaves_too_little_for_steps_says_which_would_do() -> None:
    with pytest.raises(ConfigError, match=r"--mem-fraction-static 0.95 .*at most 0.9, "):
        split_memory(request(fraction=0.95, reserve_bytes=GB))
