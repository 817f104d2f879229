"""Packed log-probabilities are those that were packed."""

from __future__ import annotations

import pytest

from lorikeet.core.request import TokenLogprobs
from lorikeet.text.completion import PackedLogprobs

POSITIONS = [
    TokenLogprobs(None, 5, []),
    TokenLogprobs(-0.1, 2**31, [(-0.1, 2**31), (float("-inf"), 0)]),
    TokenLogprobs(-1e-300, 7, [(-1e-300, 7)]),
]


def test_what_comes_out_is_what_went_in() -> None:
    packed = PackedLogprobs(POSITIONS[:1])
    packed.extend(POSITIONS[1:])
    assert list(packed) == POSITIONS
    assert packed[1:] == POSITIONS[1:]
    assert packed[-1] == POSITIONS[-1]
    assert packed[9:] == []
    with pytest.raises(IndexError):
        packed[3]


def test_what_was_there_does_not_grow() -> None:
    packed = PackedLogprobs(POSITIONS[:2])
    before = packed.so_far()
    packed.extend(POSITIONS[2:])
    assert list(before) == POSITIONS[:2]
    assert (len(before), len(packed)) == (2, 3)
    assert before[-1] == POSITIONS[1]
