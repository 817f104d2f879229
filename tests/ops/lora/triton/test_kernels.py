"""The LoRA kernels in Triton's interpreter against the reference. T rows, K in, O out, R rank."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lorikeet.ops.activation import silu_mul_torch
from lorikeet.ops.lora import tiles as tile_table
from lorikeet.ops.lora.tiles import ANY, ExpandTile, ShrinkTile, table_of
from lorikeet.ops.lora.triton.resolve import resolve_tiles
from lorikeet.ops.lora.triton.site import SiteShape, regions_of
from tests.support.lora_tables import add_delta_, assert_close, random_site
from tests.support.lora_tiles import KernelCase, tiles_of

K = 48
QKV = (32, 8, 16)
MIXED_RANKS = {1: (1, 8, 16), 2: (17, 0, 40), 3: (64, 100, 256), 4: (0, 0, 5), 5: (33, 33, 33)}
# Of 8 rows each.
POPULARITY = {
    "none": [0] * 8,
    "identical": [2] * 8,
    "distinct": [1, 2, 3, 4, 5, 0, 6, 2],  # slot 6 is empty
    "Zipf": [5, 5, 1, 5, 0, 5, 1, 2],
    "one of many": [0, 0, 0, 0, 2, 0, 0, 0],
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs and several iterations at the sizes of these tests."""
    small = tile_table.TileTable(
        tile_table.Sizes([(ANY, ANY, ANY, ShrinkTile(16, 32, 1, 1))]),
        tile_table.Sizes([(ANY, ANY, ANY, ExpandTile(16, 1, 1))]),
        tile_table.table_of(None).gated,
    )
    monkeypatch.setattr(tile_table, "table_of", lambda _: small)


def _draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("popularity", list(POPULARITY))
@pytest.mark.parametrize("by_adapter", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"beside": True, "num_tiles": 10}, {"beside": True, "deterministic": True}],
    ids=["added", "alone", "alone, deterministic"],
)
def test_mixed_ranks(popularity, by_adapter, options):
    site = random_site(K, QKV, MIXED_RANKS)
    case = KernelCase(site, POPULARITY[popularity], by_adapter=by_adapter, **options)
    case.check(_draw(8, K), _draw(8, sum(QKV)))


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 15, 16, 17, 31, 32, 64, 100, 128, 255, 256])
def test_every_rank(rank):
    case = KernelCase(random_site(K, (40,), {1: (rank,)}, seed=rank), [1] * 3, beside=True)
    case.check(_draw(3, K), _draw(3, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_blocks_and_types(dtype, block):
    slot_T = [1] * 40 + [2, 0] * 10 + [3] * 9
    site = random_site(K, QKV, MIXED_RANKS, dtype=dtype)
    case = KernelCase(site, slot_T, block=block, beside=True)
    case.check(_draw(69, K, dtype=dtype), _draw(69, sum(QKV), dtype=dtype))


@pytest.mark.parametrize("num_inputs", [16, 33, 64, 100])
def test_inputs_that_do_not_divide(num_inputs):
    case = KernelCase(random_site(num_inputs, (20, 12), {1: (5, 18)}), [1, 1, 0], beside=True)
    case.check(_draw(3, num_inputs), _draw(3, 32))


@pytest.mark.parametrize(
    ("sizes", "offsets", "out_features"),
    [((24,), (8,), 40), ((8, 16), (0, 16), 32), ((8, 16), (8, 16), 32), ((16,), (0,), 16)],
)
def test_features_between_slices_are_zeros_or_left_alone(sizes, offsets, out_features):
    site = random_site(K, sizes, {1: (8,) * len(sizes)}, offsets=offsets)
    case = KernelCase(site, [1, 0, 1], beside=True)
    case.check(_draw(3, K), _draw(3, out_features))


@pytest.mark.parametrize("tokens", range(1, 19, 4))
@pytest.mark.parametrize("by_adapter", [True, False])
def test_numbers_of_rows(tokens, by_adapter):
    rng = random.Random(tokens)
    slot_T = [rng.randrange(6) for _ in range(tokens)]
    site = random_site(K, (24,), {slot: (4 * slot,) for slot in range(1, 6)})
    case = KernelCase(site, slot_T, by_adapter=by_adapter, beside=True)
    case.check(_draw(tokens, K), _draw(tokens, 24))


def test_sixty_four_adapters():
    rng = random.Random(0)
    slot_T = [*range(1, 65), *(rng.randrange(65) for _ in range(16))]
    site = random_site(16, (16,), {slot: (1 + slot % 3,) for slot in range(1, 65)})
    case = KernelCase(site, slot_T, beside=True, num_tiles=70)
    case.check(_draw(80, 16), _draw(80, 16))


@pytest.mark.parametrize("beside", [True, False])
def test_poisoned_rows_of_others_do_not_leak(beside):
    case = KernelCase(random_site(K, QKV, MIXED_RANKS), [1, 0, 3, 0, 1], beside=beside)
    x_TK, y_TO = _draw(5, K), _draw(5, sum(QKV))
    clean_TO = case.add(y_TO, x_TK)
    x_TK[[1, 3]] = torch.nan
    y_TO[[1, 3]] = torch.nan
    case.begin()
    poisoned_TO = case.add(y_TO, x_TK)
    assert torch.equal(poisoned_TO[[0, 2, 4]], clean_TO[[0, 2, 4]])
    assert poisoned_TO[[1, 3]].isnan().all()


def test_strided_rows():
    case = KernelCase(random_site(K, QKV, MIXED_RANKS), [1, 0, 3, 2], beside=True)
    x_TK, y_TO = _draw(4, 2 * K)[:, 5 : 5 + K], _draw(4, 100)[:, : sum(QKV)]
    expected_TO = case.expected(y_TO, x_TK)
    add_delta_(case.backend, y_TO, x_TK, case.site.table, case.tiles)
    torch.testing.assert_close(y_TO, expected_TO, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_second_step_begins_anew(deterministic):
    case = KernelCase(
        random_site(K, QKV, MIXED_RANKS), [1, 3, 5], beside=True, deterministic=deterministic
    )
    for _ in range(2):
        x_TK, y_TO = _draw(3, K), _draw(3, sum(QKV))
        case.begin()
        torch.testing.assert_close(
            case.add(y_TO, x_TK), case.expected(y_TO, x_TK), atol=1e-3, rtol=1e-4
        )


def test_a_slot_that_changes_is_seen_by_the_next_step():
    site = random_site(K, (24,), {1: (20,), 2: (3,)})
    case = KernelCase(site, [1, 2], beside=True)
    x_TK, y_TO = _draw(2, K), _draw(2, 24)
    site.page_table.clear(1)
    case.begin()
    got_TO = case.add(y_TO, x_TK)
    assert torch.equal(got_TO[0], y_TO[0])
    assert not torch.equal(got_TO[1], y_TO[1])


def test_rows_of_another_batch_are_a_bug():
    case = KernelCase(random_site(K, (24,), {1: (20,)}), [1])
    with pytest.raises(AssertionError, match="not those of the batch"):
        case.backend.shrink(_draw(1, K), case.site.table, tiles_of([1], 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("offsets", [(0, 24), (0,), (24,)], ids=["both", "gate", "up"])
def test_gated(dtype, offsets):
    """Rows without an adapter too: the op writes all of them."""
    sizes = (24,) * len(offsets)
    ranks = {1: (20, 3), 2: (0, 33), 3: (7, 70)}
    ranks = {slot: parts[: len(sizes)] for slot, parts in ranks.items()}
    site = random_site(K, sizes, ranks, dtype=dtype, offsets=offsets)
    slot_T = [1, 0, 2, 3, 3, 0, 1, 0]
    x_TK, y_TO = _draw(8, K, dtype=dtype), _draw(8, 48, dtype=dtype)
    for options in ({}, {"block": 32, "deterministic": True}):
        case = KernelCase(site, slot_T, **options)
        wanted_TI = silu_mul_torch(case.expected(y_TO, x_TK))
        ratio = 2e-6 if dtype == torch.float32 else 2e-3
        assert_close("gated", case.gated(y_TO, x_TK).float(), wanted_TI, ratio)


def test_a_gate_alone_is_refused():
    case = KernelCase(random_site(K, (24,), {1: (20,)}), [1])
    with pytest.raises(ValueError, match="are not a gate and an up"):
        case.gated(_draw(1, 24), _draw(1, K))


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("in_start", [0, 30])
def test_embedding(id_dtype, in_start):
    site = random_site(30, (16,), {1: (8,), 2: (40,)}, in_start=in_start)
    case = KernelCase(site, [2, 0, 1, 2, 2, 1])
    ids_T = torch.tensor([0, 29, 37, 59, 3, 30], dtype=id_dtype)
    y_TO = _draw(6, 16)
    expected_TO = case.expected(y_TO, ids_T)
    h = case.backend.gather(ids_T, site.table, case.tiles)
    case.backend.expand_(y_TO, h, site.table, case.tiles)
    torch.testing.assert_close(y_TO, expected_TO, atol=1e-5, rtol=1e-5)


def test_resolve_reads_the_record_of_each_tiles_slot():
    table = random_site(K, QKV, MIXED_RANKS).page_table
    slot_J = torch.tensor([3, 0, 5, 3, 1], dtype=torch.int32)
    expected_LJW = table.words_SLW[slot_J.long()].transpose(0, 1)
    assert torch.equal(resolve_tiles(table.words_SLW, slot_J), expected_LJW)


def test_operands_that_do_not_fit_are_refused():
    case = KernelCase(random_site(K, QKV, MIXED_RANKS), [1, 2], beside=True)
    with pytest.raises(ValueError, match=f"x has 3 features, the site {K}"):
        case.add(_draw(2, sum(QKV)), _draw(2, 3))
    with pytest.raises(ValueError, match=r"an operand is \(3, 56\) beside \(2, 56\)"):
        case.add(_draw(3, sum(QKV)), _draw(2, K))
    with pytest.raises(ValueError, match="do not fit an output of 55 features"):
        case.add(_draw(2, 55), _draw(2, K))
    four = random_site(K, (8, 8, 8, 8), {1: (1, 1, 1, 1)})
    with pytest.raises(ValueError, match="a site has 4 slices, kernels take 3"):
        SiteShape(four.table)
    gaps = random_site(K, (8, 8), {1: (1, 1)}, offsets=(8, 24))
    with pytest.raises(ValueError, match="do not fit an output of 40 features"):
        regions_of(gaps.table, 40)


@pytest.mark.parametrize("ranks", [1, 16, 17, 64, 65, 256])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("tiles", [1, 8, 37, 500])
def test_every_launch_has_sizes(ranks, block, tiles):
    for table in map(table_of, (None, (9, 0), (8, 0), (12, 0))):
        shrink = table.shrink(block, ranks, tiles)
        assert shrink.span % shrink.block_k == 0
        assert table.expand(block, ranks, tiles).block_n >= 16
        assert table.gated(block, ranks, tiles).block_n >= 16
    assert 16 <= tile_table.rank_block(ranks) <= 64


def test_the_first_line_that_fits_is_taken():
    lines = [(16, 8, 4, 1), (16, ANY, 4, 2), (ANY, 8, ANY, 3), (ANY, ANY, ANY, 4)]
    sizes: Any = tile_table.Sizes(lines)  # pyright: ignore[reportArgumentType]
    found = [sizes(*key) for key in ((16, 8, 4), (16, 9, 4), (16, 8, 5), (17, 9, 4))]
    assert found == [1, 2, 3, 4]
    assert sizes(16, 8, 4) == 1, "remembered"
