"""The look-up of token vectors against indexing."""

from __future__ import annotations

import pytest
import torch

from lorikeet.ops.embedding import embed_torch

TABLE = torch.arange(20.0).view(10, 2)
INTEGERS = [torch.int32, torch.int64]


def test_known_ids() -> None:
    ids = torch.tensor([3, 0, 9, 3])
    assert torch.equal(embed_torch(ids, TABLE), TABLE[[3, 0, 9, 3]])
    assert torch.equal(embed_torch(ids.int(), TABLE, torch.tensor([5])), TABLE[[3, 0, 9, 3]])


@pytest.mark.parametrize("id_dtype", INTEGERS)
@pytest.mark.parametrize("token_dtype", INTEGERS)
def test_an_id_below_zero_is_what_its_lane_sampled(
    id_dtype: torch.dtype, token_dtype: torch.dtype
) -> None:
    ids = torch.tensor([-1, 4, -3, -2, -1], dtype=id_dtype)
    sampled = torch.tensor([7, 8, 9], dtype=token_dtype)
    before = ids.clone()
    assert torch.equal(embed_torch(ids, TABLE, sampled), TABLE[[7, 4, 9, 8, 7]])
    assert torch.equal(ids, before)
