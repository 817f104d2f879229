"""The memory split: what K/V gets, and the refusal when it is too little."""

from __future__ import annotations

import pytest

from lorikeet.errors import ConfigError
from lorikeet.worker.memory import MemoryRequest, available_host_bytes, split_memory

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
