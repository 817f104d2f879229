"""The embedding table on one rank and divided over several."""

from __future__ import annotations

import torch

from lorikeet.layers.embedding import VocabEmbedding
from lorikeet.layers.linear import Placement
from tests.layers.test_linear import Rank, draw


def test_shards_sum_to_the_whole_table() -> None:
    table, ids = draw(12, 5), torch.tensor([11, 0, 4, 7, 4])
    total = torch.zeros(5, 5)
    for rank in range(3):
        placement = Placement(Rank(rank, 3), torch.float32, torch.device("cpu"))
        layer = VocabEmbedding(12, 5, placement)
        layer.load_part("weight", 0, table)
        assert tuple(layer.weight.shape) == (4, 5)
        total += layer.local(ids)
    assert torch.equal(total, table[ids])


def test_one_rank() -> None:
    layer = VocabEmbedding(12, 5, Placement(Rank(0, 1), torch.float32, torch.device("cpu")))
    layer.load_part("weight", 0, draw(12, 5))
    ids = torch.tensor([3, 3, 9])
    assert torch.equal(layer.finish(layer.local(ids)), draw(12, 5)[ids])
