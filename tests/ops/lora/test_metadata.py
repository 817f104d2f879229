"""Page tables: what kernels read and what matmuls read must be the same thing."""

from __future__ import annotations

import torch

from lorikeet.ops.lora.metadata import NO_PAGE, RankPageTable, SliceTable


def _table(num_elems: int = 4000) -> SliceTable:
    return SliceTable(
        torch.arange(num_elems, dtype=torch.float32),
        in_features=5,
        out_features=3,
        offset=0,
        page_ranks=16,
        table=RankPageTable(num_slots=3, num_slices=2, max_pages=4, device=torch.device("cpu")),
        index=1,
    )


def test_neighbouring_pages_are_one_view():
    table = _table()
    table.remember(1, [256, 384, 512], 40, 0.5)
    (factors,) = table.factors_of(1)
    assert factors.A_KR.shape == (5, 40)
    assert factors.B_RO.shape == (40, 3)
    assert factors.A_KR[0, 39] == 256 + 39 * 8
    assert factors.A_KR.data_ptr() == table.pool_E[256:].data_ptr()


def test_scattered_pages_are_separate_views_in_rank_order():
    table = _table()
    table.remember(2, [1280, 0, 128], 35, 2.0)
    first, rest = table.factors_of(2)
    assert [len(first.B_RO), len(rest.B_RO)] == [16, 19]
    assert first.A_KR[0, 0] == 1280
    assert rest.B_RO[18, 0] == 18 * 8 + 5


def test_remembering_again_forgets_the_old_pages():
    table = _table()
    table.remember(1, [0, 128, 256], 48, 1.0)
    assert table.factors_of(1)
    table.remember(1, [512], 8, 3.0)
    (factors,) = table.factors_of(1)
    assert factors.A_KR.shape == (5, 8)
    assert table.scales[1] == 3.0
    table.forget(1)
    assert (table.factors_of(1), table.scales[1]) == ((), 0.0)


def test_a_slot_is_described_in_all_slices_at_once():
    slices = _table()
    table = slices.table
    assert not table.ranks_SL.any()
    table.put(1, {0: ([64], 3, -2.0), 1: ([0, 128], 17, 0.25)})
    assert slices.pages_SP[1].tolist() == [0, 128, NO_PAGE, NO_PAGE]
    assert (int(slices.ranks_S[1]), float(slices.scales_S[1])) == (17, 0.25)
    assert (int(table.ranks_SL[1, 0]), float(table.scales_SL[1, 0])) == (3, -2.0)
    # Anew: what is not named any more is gone.
    table.put(1, {1: ([512], 8, 3.0)})
    assert slices.pages_SP[1].tolist() == [512, NO_PAGE, NO_PAGE, NO_PAGE]
    assert table.ranks_SL.tolist() == [[0, 0], [0, 8], [0, 0]]
    table.put(2, {1: ([1024], 1, 1.0)})
    table.clear(1)
    assert (int(slices.ranks_S[1]), float(slices.scales_S[1])) == (0, 0.0)
    assert slices.pages_SP[1].tolist() == [NO_PAGE] * 4
    assert int(slices.ranks_S[2]) == 1
