"""A group of one, and the threads that stand in for more in other tests."""

from __future__ import annotations

import torch

from lorikeet.parallel.group import SingleRank, TPGroup
from tests.support.thread_ranks import run_ranks


def test_a_group_of_one_is_the_identity() -> None:
    group: TPGroup = SingleRank()
    tensor = torch.arange(3.0)
    assert (group.rank, group.size) == (0, 1)
    assert group.all_reduce(tensor) is tensor
    assert group.all_gather(tensor, 0) is tensor


def test_thread_ranks_keep_the_contract() -> None:
    def work(group: TPGroup) -> tuple[torch.Tensor, torch.Tensor]:
        mine = torch.full((1, 2), float(group.rank))
        return group.all_reduce(mine), group.all_gather(mine, 0)

    for total, gathered in run_ranks(3, work):
        assert total.tolist() == [[3.0, 3.0]]
        assert gathered.tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
