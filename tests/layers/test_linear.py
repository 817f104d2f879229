"""Shards of linear layers, without processes: what the ranks hold makes up the whole."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lorikeet.layers.linear import Linear, Part, Placement, ShardRule

IN = 12
Q, KV = Part(16, 4), Part(8, 2)  # on four ranks: four query shards, two key/value shards


class Rank:
    """A member whose collectives must not be called."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("all_reduce was called")

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        raise AssertionError("all_gather was called")


def make(rule: ShardRule, *, bias: bool = True, in_features: int = IN) -> Linear:
    placement = Placement(Rank(rule.rank, rule.size), torch.float32, torch.device("cpu"))
    layer = Linear(in_features, rule, placement, bias=bias)
    for parameter in layer.parameters():
        parameter.fill_(torch.nan)
    return layer


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class TestShardRule:
    def test_column(self) -> None:
        ranges = [ShardRule("column", rank, 4, (Q, KV, KV)).output_range(0) for rank in range(4)]
        assert ranges == [(0, 4), (4, 8), (8, 12), (12, 16)]
        rule = ShardRule("column", 3, 4, (Q, KV, KV))
        assert rule.input_range(IN) == (0, IN)
        assert rule.local_offsets() == (0, 4, 8, 12)

    def test_neighbours_share_a_shard(self) -> None:
        ranges = [ShardRule("column", rank, 4, (Q, KV, KV)).output_range(1) for rank in range(4)]
        assert ranges == [(0, 4), (0, 4), (4, 8), (4, 8)]

    def test_row(self) -> None:
        rule = ShardRule("row", 2, 3, (Part(5, 1),))
        assert rule.input_range(IN) == (8, 12)
        assert rule.output_range(0) == (0, 5)

    def test_replicated(self) -> None:
        rule = ShardRule("replicated", 1, 2, (Part(5, 1), Part(6, 1)))
        assert rule.input_range(IN) == (0, IN)
        assert rule.local_offsets() == (0, 5, 11)

    def test_what_does_not_divide(self) -> None:
        with pytest.raises(ValueError, match="7 features cannot be divided into 2"):
            ShardRule("column", 0, 2, (Part(7, 2),)).output_range(0)
        with pytest.raises(ValueError, match="7 features"):
            ShardRule("row", 0, 2, (Part(4, 1),)).input_range(7)


def test_column_shards_are_pieces_of_the_output() -> None:
    weights, biases = [draw(16, IN), draw(8, IN), draw(9, IN)[:8]], [draw(16), draw(8), draw(9)[:8]]
    x = draw(5, IN)
    wanted = [functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    for rank in range(4):
        rule = ShardRule("column", rank, 4, (Q, KV, KV))
        layer = make(rule)
        for part, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            layer.load_part("weight", part, weight)
            layer.load_part("bias", part, bias)
        y = layer.finish(layer.local(x))
        pieces = [whole[:, slice(*rule.output_range(i))] for i, whole in enumerate(wanted)]
        torch.testing.assert_close(y, torch.cat(pieces, dim=-1))


def test_row_shards_sum_to_the_output_and_the_bias_is_added_once() -> None:
    weight, bias, x = draw(7, IN), draw(7), draw(5, IN)
    layers = [make(ShardRule("row", rank, 3, (Part(7, 1),))) for rank in range(3)]
    total = torch.zeros(5, 7)
    for layer in layers:
        layer.load_part("weight", 0, weight)
        layer.load_part("bias", 0, bias)
        total += layer.local(x[:, slice(*layer.rule.input_range(IN))])
    torch.testing.assert_close(total, functional.linear(x, weight))
    layers[0]._tp.all_reduce = lambda tensor: tensor
    torch.testing.assert_close(layers[0].finish(total), functional.linear(x, weight, bias))


def test_one_rank_needs_no_collective() -> None:
    weight, bias, x = draw(7, IN), draw(7), draw(5, IN)
    for kind in ("row", "column", "replicated"):
        layer = make(ShardRule(kind, 0, 1, (Part(7, 1),)))
        layer.load_part("weight", 0, weight)
        layer.load_part("bias", 0, bias)
        torch.testing.assert_close(layer.finish(layer.local(x)), functional.linear(x, weight, bias))


def test_loading_converts_the_dtype() -> None:
    layer = make(ShardRule("row", 0, 1, (Part(3, 1),)), bias=False)
    weight = draw(3, IN).to(torch.bfloat16)
    layer.load_part("weight", 0, weight)
    assert torch.equal(layer.weight, weight.float())
    assert layer.bias is None
