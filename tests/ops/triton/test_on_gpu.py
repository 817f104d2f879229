"""The kernels as they are compiled, at the shapes of an 8B model."""

from __future__ import annotations

import pytest
import torch

from lorikeet.ops.rope import HeadShape
from tests.support.op_cases import OpCases

pytestmark = pytest.mark.gpu

TYPES = [torch.bfloat16, torch.float16, torch.float32]
TOKENS = [1, 16, 64, 256, 8192]
HEADS = HeadShape(num_heads=32, num_kv_heads=8, head_dim=128)
MIXED = [0.0, 1.0, 0.3, 2.5]


@pytest.fixture(params=TYPES, ids=str)
def cases(request: pytest.FixtureRequest) -> OpCases:
    return OpCases("cuda", request.param)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_rms_norm(cases: OpCases, tokens: int, residual: bool, delta: bool) -> None:
    cases.rms_norm(tokens, 4096, residual=residual, delta=delta)


@pytest.mark.parametrize("features", [1, 100, 896, 3072, 8192])
def test_rms_norm_of_other_sizes(cases: OpCases, features: int) -> None:
    cases.rms_norm(3, features, residual=True, delta=True, strided=True)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("delta", [False, True])
def test_silu_mul(cases: OpCases, tokens: int, delta: bool) -> None:
    cases.silu_mul(tokens, 14336, delta=delta)


@pytest.mark.parametrize("half", [1, 100, 4864, 8960])
def test_silu_mul_of_other_sizes(cases: OpCases, half: int) -> None:
    cases.silu_mul(3, half, delta=True, strided=True)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_rope_store(cases: OpCases, tokens: int, delta: bool, norm: bool) -> None:
    cases.rope_store(tokens, HEADS, delta=delta, norm=norm, padded=tokens // 3)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
@pytest.mark.parametrize("norm", [False, True])
def test_rope_store_of_other_sizes(cases: OpCases, head_dim: int, norm: bool) -> None:
    shape = HeadShape(num_heads=14, num_kv_heads=2, head_dim=head_dim)
    cases.rope_store(7, shape, delta=True, norm=norm, padded=2, place_dtype=torch.int32)


def test_places_beyond_two_to_the_31_elements() -> None:
    """Offsets of 32 bits would wrap around. A pair of caches takes 10 GB, and there are two pairs."""
    OpCases("cuda", torch.bfloat16).rope_store(64, HEADS, places=2_200_000)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("lanes", [0, 256])
def test_embed(cases: OpCases, tokens: int, lanes: int) -> None:
    cases.embed(tokens, 128256, 4096, lanes=lanes, dtypes=(torch.int32, torch.int64))


@pytest.mark.parametrize("rows", [1, 16, 64, 256])
@pytest.mark.parametrize("vocab", [128256, 1000])
def test_draw_tokens(cases: OpCases, rows: int, vocab: int) -> None:
    cases.draw_tokens(rows, vocab, MIXED)


def test_nan_in_a_row() -> None:
    cases = OpCases("cuda", torch.bfloat16)
    logits = cases.draw(4, 128256)
    logits[1, 100_000] = logits[3, 0] = torch.nan
    numbers = torch.arange(4, device="cuda")
    temperature = torch.tensor([0.0, 0.0, 1.0, 1.0], device="cuda")
    tokens, scores = cases.triton.draw(
        logits, temperature, numbers, numbers, numbers, numbers.clone()
    )
    assert scores[:, 0].isnan().tolist() == [False, True, False, True]
    assert ((tokens >= 0) & (tokens < 128256)).all()


def test_all_in_a_graph() -> None:
    """Nothing in a launch waits for the device, which capture would refuse, and a replay reads the new inputs."""
    cases = OpCases("cuda", torch.bfloat16)
    x, weight = cases.draw(8, 4096), cases.draw(4096)
    ids, table = cases.integers(100, 8), cases.draw(100, 4096)
    numbers, temperature = torch.arange(8, device="cuda"), torch.ones(8, device="cuda")
    sampled = torch.zeros(8, dtype=torch.int64, device="cuda")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        y, _ = cases.triton.rms_norm(cases.triton.embed(ids, table, sampled), weight, 1e-5, x)
        logits = cases.triton.silu_mul(y)
        return cases.triton.draw(logits, temperature, numbers, numbers, numbers, sampled)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    ids.copy_(cases.integers(100, 8))
    graph.replay()
    for got, wanted in zip(replayed, step(), strict=True):
        assert torch.equal(got, wanted)
