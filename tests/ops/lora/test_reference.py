"""The oracle itself, against dense algebra on factors that were never paged."""

from __future__ import annotations

import torch

from lorikeet.ops.lora import reference
from tests.support.lora_tables import assert_close, groups_of, random_site


def test_factors_are_read_back_through_the_page_table():
    site = random_site(20, (12, 6), {1: (40, 3), 2: (16, 17)})
    for (slot, part), (A_RK, B_OR, _) in site.weights.items():
        read_A_RK, read_B_OR = reference.read_factors(site.table.slices[part], slot)
        assert torch.equal(read_A_RK, A_RK)
        assert torch.equal(read_B_OR, B_OR)


def test_delta_equals_dense_algebra():
    site = random_site(20, (12, 6), {1: (40, 3), 2: (16, 0)})
    x_TK, y_TO = torch.randn(4, 20), torch.randn(4, 18)
    slot_T = [1, 0, 2, 1]
    result_TO = reference.delta(y_TO, x_TK, site.table, groups_of(slot_T, gathered=False))
    expected_TO = y_TO.double()
    for slot, part in site.weights:
        rows = [row for row, used in enumerate(slot_T) if used == slot]
        table = site.table.slices[part]
        out = slice(table.offset, table.offset + table.out_features)
        expected_TO[rows, out] += site.dense_delta(x_TK[rows], slot, part)
    assert_close("y", result_TO.double(), expected_TO, 2e-6)


def test_embedding_reads_columns_of_a():
    site = random_site(9, (5,), {1: (3,)})
    A_RK, B_OR, scale = site.weights[1, 0]
    y_TO = reference.delta(
        torch.zeros(1, 5), torch.tensor([4]), site.table, groups_of([1], gathered=False)
    )
    assert_close("y", y_TO[0], scale * B_OR @ A_RK[:, 4], 2e-6)
