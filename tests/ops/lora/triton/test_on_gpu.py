"""The LoRA kernels as they are compiled, at the shapes of an 8B model. T rows, K in, O out."""

from __future__ import annotations

import random
from functools import lru_cache

import pytest
import torch

from tests.support.lora_tables import RandomSite, random_site
from tests.support.lora_tiles import TOLERANCES, KernelCase

pytestmark = pytest.mark.gpu

SITES = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
TOKENS = [1, 2, 16, 64, 256, 1000, 8192]
TYPES = [torch.bfloat16, torch.float16, torch.float32]
RANKS = [16, 8, 64, 1, 40, 16, 16, 128]


@lru_cache(maxsize=4)
def _site(name: str, num_adapters: int, dtype: torch.dtype, most: int = 128) -> RandomSite:
    num_inputs, sizes = SITES[name]
    ranks = {
        slot: tuple(
            0 if (slot + part) % 11 == 10 else min(most, RANKS[slot % len(RANKS)])
            for part in range(len(sizes))
        )
        for slot in range(1, num_adapters + 1)
    }
    return random_site(num_inputs, sizes, ranks, dtype=dtype, device="cuda")


def _draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def _check(site: RandomSite, name: str, slot_T: list[int], **options) -> None:
    num_inputs, sizes = SITES[name]
    case = KernelCase(site, slot_T, **options)
    x_TK = _draw(len(slot_T), num_inputs, dtype=case.dtype)
    case.check(x_TK, _draw(len(slot_T), sum(sizes), dtype=case.dtype))


def _slots(popularity: str, tokens: int, num_adapters: int) -> list[int]:
    rng = random.Random(tokens)
    if popularity == "identical":
        return [1 % (num_adapters + 1)] * tokens
    if popularity == "distinct":
        return [row % (num_adapters + 1) for row in range(tokens)]
    weights = [1 / (slot + 1) for slot in range(num_adapters + 1)]
    if popularity == "uniform":
        weights = [1] * (num_adapters + 1)
    return rng.choices(range(num_adapters + 1), weights, k=tokens)


@pytest.mark.parametrize("name", list(SITES))
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_sites(name, dtype, tokens):
    """Decode's form up to 256 rows, prefill's from 256 on."""
    site = _site(name, 8, dtype)
    slot_T = _slots("uniform", tokens, 8)
    if tokens <= 256:
        _check(site, name, slot_T, beside=True)
        _check(site, name, slot_T, beside=True, deterministic=True)
        _check(site, name, slot_T, by_adapter=False, beside=True, num_tiles=tokens + 3)
    if tokens >= 256:
        for block in (16, 32, 64, 128):
            _check(site, name, slot_T, block=block)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("most", [16, 64, 128])
def test_types_and_largest_ranks(dtype, most):
    site = _site("qkv", 8, dtype, most)
    for tokens in (3, 64):
        _check(site, "qkv", _slots("uniform", tokens, 8), beside=True)
    _check(site, "qkv", _slots("uniform", 500, 8), block=64)


@pytest.mark.parametrize("popularity", ["identical", "distinct", "uniform", "Zipf"])
@pytest.mark.parametrize("num_adapters", [1, 32, 64])
def test_popularity(popularity, num_adapters):
    site = _site("o", 64, torch.bfloat16)
    for tokens in (64, 256):
        slot_T = _slots(popularity, tokens, num_adapters)
        _check(site, "o", slot_T, beside=True)
        _check(site, "o", slot_T, by_adapter=False, beside=True)


def test_a_step_without_adapters_is_zeros():
    _check(_site("o", 8, torch.bfloat16), "o", [0] * 40, beside=True, num_tiles=10)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("tokens", [5, 1000, 8192])
def test_gated(dtype, tokens):
    site = _site("gate_up", 8, dtype)
    for block in (16, 32, 64, 128):
        case = KernelCase(site, _slots("Zipf", tokens, 8), block=block)
        x_TK = _draw(tokens, 4096, dtype=dtype)
        y_TO = _draw(tokens, 28672, dtype=dtype)
        gate_TI, up_TI = case.expected(y_TO, x_TK).chunk(2, dim=-1)
        wanted_TI = torch.nn.functional.silu(gate_TI) * up_TI
        error = (case.gated(y_TO, x_TK).float() - wanted_TI).norm() / wanted_TI.norm()
        assert error < 2 * TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_embedding(dtype):
    site = random_site(128256, (4096,), {1: (16,), 2: (40,)}, dtype=dtype, device="cuda")
    case = KernelCase(site, [1, 0, 2, 2, 1] * 20)
    ids_T = torch.randint(128256, (100,), device="cuda")
    y_TO, got_TO = torch.zeros(2, 100, 4096, device="cuda", dtype=dtype)
    for row, slot in enumerate(case.slot_T):
        if slot:
            A_RK, B_OR, scale = site.weights[slot, 0]
            column_R = A_RK[:, ids_T[row].item()].double()
            y_TO[row] = (scale * (B_OR.double() @ column_R)).to(dtype)
    case.backend.expand_(
        got_TO, case.backend.gather(ids_T, site.table, case.tiles), site.table, case.tiles
    )
    error = (got_TO.float() - y_TO.float()).norm() / y_TO.float().norm()
    assert error < 1e-5 if dtype == torch.float32 else error < 1e-2


def test_a_captured_step_reads_what_changed_since():
    """Adapters, rows and tables are read by kernels, not frozen into the graph."""
    site = _site("qkv", 8, torch.bfloat16)
    case = KernelCase(site, [1, 2, 3, 0, 4, 4, 5, 6], beside=True, num_tiles=9)
    x_TK = _draw(8, 4096, dtype=torch.bfloat16)
    case.alone(x_TK, 6144)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.begin()
        delta_TO = case.alone(x_TK, 6144)
    other = KernelCase(site, [8, 8, 0, 1, 2, 7, 7, 7], beside=True, num_tiles=9)
    case.tiles.slot_J.copy_(other.tiles.slot_J)
    case.tiles.rows_JM.copy_(other.tiles.rows_JM)
    x_TK.copy_(_draw(8, 4096, dtype=torch.bfloat16))
    for _ in range(2):
        graph.replay()
        expected_TO = other.alone(x_TK, 6144)
        other.begin()
        error = (delta_TO.float() - expected_TO.float()).norm() / expected_TO.float().norm()
        assert error < 1e-2


def test_deterministic_means_the_same_bits():
    site = _site("gate_up", 8, torch.bfloat16)
    case = KernelCase(site, [*range(9)] * 4, beside=True, deterministic=True)
    x_TK = _draw(36, 4096, dtype=torch.bfloat16)
    first_TO = case.alone(x_TK, 28672)
    for _ in range(20):
        case.begin()
        assert torch.equal(case.alone(x_TK, 28672), first_TO)
