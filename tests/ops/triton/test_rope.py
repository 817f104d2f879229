"""The kernel of rotation and store in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lorikeet.ops.rope import HeadShape
from lorikeet.ops.triton.rope import rope_store_triton
from tests.support.op_cases import OpCases

SMALL = HeadShape(num_heads=4, num_kv_heads=2, head_dim=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_equals_torch(dtype: torch.dtype, norm: bool, delta: bool) -> None:
    OpCases("cpu", dtype).rope_store(5, SMALL, norm=norm, delta=delta)


@pytest.mark.parametrize("head_dim", [2, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("norm", [False, True])
def test_head_sizes(head_dim: int, norm: bool) -> None:
    OpCases("cpu", torch.float32).rope_store(2, HeadShape(3, 1, head_dim), norm=norm)


@pytest.mark.parametrize("heads", [(1, 1), (6, 1), (6, 3), (8, 8), (14, 2), (32, 8)])
def test_kinds_of_heads_meet_within_a_program(heads: tuple[int, int]) -> None:
    OpCases("cpu", torch.float32).rope_store(1, HeadShape(*heads, 16), norm=True)


@pytest.mark.parametrize("place_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "padded"), [(0, 0), (1, 0), (1, 1), (6, 2)])
def test_a_token_without_a_place_is_not_stored(
    place_dtype: torch.dtype, tokens: int, padded: int
) -> None:
    OpCases("cpu", torch.float32).rope_store(tokens, SMALL, padded=padded, place_dtype=place_dtype)


def test_operands_that_do_not_fit_are_refused() -> None:
    qkv, cos_sin, places_T = (
        torch.zeros(2, 64),
        torch.zeros(2, 8),
        torch.zeros(2, dtype=torch.int64),
    )
    cache = torch.zeros(5, 2, 8)
    with pytest.raises(ValueError, match=r"an operand is \(2, 64\) beside \(2, 80\)"):
        rope_store_triton(qkv, cos_sin, cache, cache, places_T, HeadShape(6, 2, 8))
    with pytest.raises(ValueError, match=r"an operand is \(1,\) beside \(2,\)"):
        rope_store_triton(qkv, cos_sin, cache, cache, places_T[:1], SMALL)
    with pytest.raises(ValueError, match=r"an operand is \(5, 4, 4\) beside \(5, 2, 8\)"):
        rope_store_triton(qkv, cos_sin, cache, cache.view(5, 4, 4), places_T, SMALL)
