"""Lanes: where a running sequence's page table and newest token are."""

from __future__ import annotations

import pytest
import torch

from lorikeet.errors import EngineFault
from lorikeet.worker.inputs import Lanes


@pytest.fixture
def lanes() -> Lanes:
    return Lanes(2, 4, torch.device("cpu"))


def test_pages_are_appended_in_order(lanes: Lanes) -> None:
    lane = lanes.open([7, 3])
    lanes.extend(lane, [9])
    lanes.extend(lane, [])
    assert lanes.pages_LP[lane].tolist() == [7, 3, 9, 0]


def test_a_lane_that_is_given_back_is_clean(lanes: Lanes) -> None:
    lane = lanes.open([7, 3, 5, 6])
    lanes.close(lane)
    assert lanes.open([1]) == lane
    assert lanes.pages_LP[lane].tolist() == [1, 0, 0, 0]


def test_there_are_no_more_lanes_than_there_are(lanes: Lanes) -> None:
    assert {lanes.open([]), lanes.open([])} == {0, 1}
    with pytest.raises(EngineFault, match="more than 2"):
        lanes.open([])


def test_no_sequence_is_longer_than_the_longest(lanes: Lanes) -> None:
    lane = lanes.open([1, 2, 3])
    with pytest.raises(EngineFault, match="5 pages; a sequence has at most 4"):
        lanes.extend(lane, [4, 5])
