"""Which part of a pair a rank holds."""

from __future__ import annotations

import torch

from lorikeet.core.sites import LoRASite, SiteSlice
from lorikeet.layers.linear import Part, ShardRule
from lorikeet.lora.pool_plan import shard_pair, shard_site

QKV = LoRASite(
    "qkv",
    "column",
    0,
    8,
    (
        SiteSlice("q_proj", "q", 0, 16),
        SiteSlice("k_proj", "k", 16, 4),
        SiteSlice("v_proj", "v", 20, 4),
    ),
)
# Four ranks, two key/value heads: ranks 0 and 1 hold the first, 2 and 3 the second.
PARTS = (Part(16, 4), Part(4, 2), Part(4, 2))


def test_a_column_site_divides_b_and_keeps_a():
    A_RK, B_OR = torch.randn(3, 8), torch.arange(16.0)[:, None].expand(16, 3)
    for rank in range(4):
        rule = ShardRule("column", rank, 4, PARTS)
        local = shard_site(QKV, rule)
        assert [(part.offset, part.out_features) for part in local.slices] == [
            (0, 4),
            (4, 2),
            (6, 2),
        ]
        assert local.in_features == 8
        own_A_RK, own_B_OR = shard_pair(A_RK, B_OR, rule, 0)
        assert own_A_RK.shape == A_RK.shape
        assert own_B_OR[:, 0].tolist() == list(range(4 * rank, 4 * rank + 4))


def test_ranks_that_share_a_head_hold_the_same_rows_of_b():
    B_OR = torch.arange(4.0)[:, None]
    held = [
        shard_pair(torch.zeros(1, 8), B_OR, ShardRule("column", rank, 4, PARTS), 1)[1]
        .flatten()
        .tolist()
        for rank in range(4)
    ]
    assert held == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_a_row_site_divides_a_and_keeps_b():
    site = LoRASite("o", "row", 0, 8, (SiteSlice("o_proj", "o", 0, 6),))
    A_RK, B_OR = torch.arange(8.0).expand(2, 8), torch.randn(6, 2)
    rule = ShardRule("row", 1, 2, (Part(6, 1),))
    local = shard_site(site, rule)
    assert (local.in_features, local.out_features) == (4, 6)
    own_A_RK, own_B_OR = shard_pair(A_RK, B_OR, rule, 0)
    assert own_A_RK[0].tolist() == [4, 5, 6, 7]
    assert torch.equal(own_B_OR, B_OR)


def test_the_parts_of_all_ranks_make_the_whole_delta():
    A_RK, B_OR, x_K = torch.randn(3, 8), torch.randn(6, 3), torch.randn(8)
    rules = [ShardRule("row", rank, 2, (Part(6, 1),)) for rank in range(2)]
    total_O = torch.zeros(6)
    for rule, x_part_K in zip(rules, x_K.chunk(2), strict=True):
        own_A_RK, own_B_OR = shard_pair(A_RK, B_OR, rule, 0)
        total_O += own_B_OR @ own_A_RK @ x_part_K
    torch.testing.assert_close(total_O, B_OR @ A_RK @ x_K)
