"""Rotation and store against transformers' own rotation."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lorikeet.ops.norm import rms_norm_torch
from lorikeet.ops.rope import HeadShape, QKNorm, rope_store_torch, store_kv_torch

T, PLACES = 6, 20
SHAPE = HeadShape(num_heads=4, num_kv_heads=2, head_dim=8)
FEATURES = (4 + 2 + 2) * 8
SLOTS = torch.tensor([7, 3, 19, 0, 4, 11])


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def angles() -> torch.Tensor:
    return torch.arange(T).unsqueeze(-1) * (0.1 ** torch.arange(4))


def run(
    qkv: torch.Tensor, qk_norm: QKNorm | None, delta: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    k_cache = torch.full((PLACES, 2, 8), torch.nan, dtype=qkv.dtype)
    v_cache = k_cache.clone()
    cos_sin = torch.cat((angles().cos(), angles().sin()), dim=-1)
    q, k, v = rope_store_torch(qkv, cos_sin, k_cache, v_cache, SLOTS, SHAPE, qk_norm, delta)
    return q, k, v, k_cache, v_cache


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("with_delta", [False, True])
def test_equals_transformers(with_norm: bool, with_delta: bool) -> None:
    qkv, delta = draw(T, FEATURES, seed=0), draw(T, FEATURES, seed=1) if with_delta else None
    norm = QKNorm(draw(8, seed=2), draw(8, seed=3), 1e-6) if with_norm else None
    before = qkv.clone()
    q, k, v, k_cache, v_cache = run(qkv, norm, delta)
    total = qkv if delta is None else qkv + delta
    wanted_q, wanted_k, wanted_v = (
        part.unflatten(-1, (-1, 8)) for part in total.split([32, 16, 16], dim=-1)
    )
    if norm is not None:
        wanted_q, _ = rms_norm_torch(wanted_q, norm.q_weight_H, norm.eps)
        wanted_k, _ = rms_norm_torch(wanted_k, norm.k_weight_H, norm.eps)
    both = torch.cat((angles(), angles()), dim=-1)
    wanted_q, wanted_k = apply_rotary_pos_emb(wanted_q, wanted_k, both.cos(), both.sin())
    torch.testing.assert_close(q, wanted_q)
    torch.testing.assert_close(k, wanted_k)
    torch.testing.assert_close(v, wanted_v)
    assert torch.equal(qkv, before)
    assert torch.equal(k_cache[SLOTS], k)
    assert torch.equal(v_cache[SLOTS], v)
    untouched = [place for place in range(PLACES) if place not in SLOTS.tolist()]
    assert k_cache[untouched].isnan().all()
    assert v_cache[untouched].isnan().all()


def test_narrow_types_rotate_in_float32() -> None:
    qkv = draw(T, FEATURES, seed=0).to(torch.bfloat16)
    q, k, v, k_cache, _ = run(qkv, None, None)
    assert {t.dtype for t in (q, k, v, k_cache)} == {torch.bfloat16}
    exact_q, *_ = run(qkv.float(), None, None)
    assert torch.equal(q, exact_q.to(torch.bfloat16))


def test_only_the_named_places_are_written() -> None:
    k, v = torch.arange(12.0).view(3, 2, 2), torch.arange(12.0, 24.0).view(3, 2, 2)
    k_cache, v_cache = torch.full((5, 2, 2), -1.0), torch.full((5, 2, 2), -2.0)
    store_kv_torch(k, v, k_cache, v_cache, torch.tensor([4, 0, 2]))
    assert torch.equal(k_cache[[4, 0, 2]], k)
    assert torch.equal(v_cache[[4, 0, 2]], v)
    assert (k_cache[[1, 3]] == -1).all()
    assert (v_cache[[1, 3]] == -2).all()
