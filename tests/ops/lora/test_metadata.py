"""Page tables: what kernels read and what matmuls read must be the same thing."""

from __future__ import annotations

import torch

from lorikeet.ops.lora.metadata import NO_PAGE, SliceTable


def _table(num_elems: int = 4000) -> SliceTable:
    return SliceTable(
        torch.arange(num_elems, dtype=torch.float32),
        in_features=5,
        out_features=3,
        offset=0,
        page_ranks=16,
        num_slots=3,
        max_pages=4,
    )


def test_neighbouring_pages_are_one_view():
    table = _table()
    table.set(1, [256, 384, 512], 40, 0.5)
    (factors,) = table.factors[1]
    assert factors.A_KR.shape == (5, 40)
    assert factors.B_RO.shape == (40, 3)
    assert factors.A_KR[0, 39] == 256 + 39 * 8
    assert factors.A_KR.data_ptr() == table.pool_E[256:].data_ptr()


def test_scattered_pages_are_separate_views_in_rank_order():
    table = _table()
    table.set(2, [1280, 0, 128], 35, 2.0)
    first, rest = table.factors[2]
    assert [len(first.B_RO), len(rest.B_RO)] == [16, 19]
    assert first.A_KR[0, 0] == 1280
    assert rest.B_RO[18, 0] == 18 * 8 + 5


def test_tensors_say_the_same():
    table = _table()
    table.set(1, [0, 128], 17, 0.25)
    assert table.pages_SP[1].tolist() == [0, 128, NO_PAGE, NO_PAGE]
    assert (int(table.ranks_S[1]), float(table.scales_S[1])) == (17, 0.25)


def test_setting_again_forgets_the_old_pages_and_clear_leaves_rank_zero():
    table = _table()
    table.set(1, [0, 128, 256], 48, 1.0)
    table.set(1, [512], 8, 3.0)
    assert table.pages_SP[1].tolist() == [512, NO_PAGE, NO_PAGE, NO_PAGE]
    table.clear(1)
    assert (int(table.ranks_S[1]), table.factors[1], float(table.scales_S[1])) == (0, (), 0.0)
    assert table.pages_SP[1].tolist() == [NO_PAGE] * 4
