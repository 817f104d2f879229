"""The look-up kernel in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lorikeet.ops.triton.embedding import embed_triton
from tests.support.op_cases import OpCases

INTEGERS = [torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "features"), [(0, 8), (1, 1), (5, 48), (2, 2500)])
def test_known_ids(dtype: torch.dtype, tokens: int, features: int) -> None:
    OpCases("cpu", dtype).embed(tokens, 30, features)


@pytest.mark.parametrize("ids", INTEGERS)
@pytest.mark.parametrize("sampled", INTEGERS)
@pytest.mark.parametrize("lanes", [1, 9])
def test_ids_of_lanes(ids: torch.dtype, sampled: torch.dtype, lanes: int) -> None:
    OpCases("cpu", torch.float32).embed(6, 30, 16, lanes=lanes, dtypes=(ids, sampled))


def test_strided_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) has stride 2, not 1"):
        embed_triton(torch.zeros(6, dtype=torch.int64)[::2], torch.zeros(4, 4))
