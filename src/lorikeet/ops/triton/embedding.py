"""The look-up of token vectors in Triton: a program copies a part of one token's vector.

Shape legend: T tokens, V token ids, D features, L lanes (the last token of each running sequence); B features of one
program, a power of two.
"""

from __future__ import annotations

import torch
import triton.language as tl

from lorikeet.ops.triton.launcher import cdiv, check_rows, kernel, next_power_of_2

_MAX_BLOCK = 2048
_NUM_WARPS = 4


def embed_triton(
    ids_T: torch.Tensor, table_VD: torch.Tensor, tokens_L: torch.Tensor | None = None
) -> torch.Tensor:
    """Triton form of :class:`lorikeet.ops.embedding.EmbedOp`. Rows of the table may be strided.

    Raises:
        ValueError: the last dimension of an operand has a stride.
    """
    (num_tokens,), features = ids_T.shape, table_VD.shape[1]
    check_rows(None, ids_T, table_VD, tokens_L)
    x_TD = table_VD.new_empty((num_tokens, features))
    block = min(_MAX_BLOCK, next_power_of_2(features))
    _embed[(num_tokens, cdiv(features, block))](
        ids_T,
        tokens_L,
        table_VD,
        x_TD,
        table_VD.stride(0),
        D=features,
        B=block,
        num_warps=_NUM_WARPS,
    )
    return x_TD


@kernel()
def _embed(
    ids_ptr,
    tokens_ptr,
    table_ptr,
    x_ptr,
    table_stride,
    D: tl.constexpr,
    B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at_B = tl.program_id(1) * B + tl.arange(0, B)
    mask_B = at_B < D
    token = tl.load(ids_ptr + row).to(tl.int64)
    if tokens_ptr is not None:
        sampled = tl.load(tokens_ptr + (-1 - token), mask=token < 0, other=0).to(tl.int64)
        token = tl.where(token < 0, sampled, token)
    x_B = tl.load(table_ptr + token * table_stride + at_B, mask=mask_B)
    tl.store(x_ptr + row * D + at_B, x_B, mask=mask_B)
