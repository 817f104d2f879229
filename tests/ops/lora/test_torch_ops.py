"""The torch backend against the reference and against dense algebra. T rows, K in, O out, R rank."""

from __future__ import annotations

import pytest
import torch

from lorikeet.ops.lora import reference
from lorikeet.ops.lora.torch_ops import TorchBackend
from tests.support.lora_tables import add_delta_, assert_close, groups_of, random_site

K = 24
QKV = (32, 8, 16)
MIXED_RANKS = {1: (1, 8, 16), 2: (17, 0, 40), 3: (64, 100, 256), 4: (0, 0, 5), 5: (33, 33, 33)}
RATIOS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def _delta(site, y_TO, x_TK, groups):
    result_TO = y_TO.clone()
    add_delta_(TorchBackend(), result_TO, x_TK, site.table, groups)
    return result_TO


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 15, 16, 17, 31, 32, 64, 100, 128, 255, 256])
@pytest.mark.parametrize("scattered", [True, False])
def test_every_rank_equals_dense_algebra(rank, scattered):
    site = random_site(K, (40,), {1: (rank,)}, seed=rank, scattered=scattered)
    x_TK, y_TO = torch.randn(5, K), torch.randn(5, 40)
    expected_TO = y_TO.double() + site.dense_delta(x_TK, 1, 0)
    assert_close(
        "y",
        _delta(site, y_TO, x_TK, groups_of([1] * 5, gathered=False)).double(),
        expected_TO,
        2e-6,
    )


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("dtype", list(RATIOS))
def test_mixed_batch_equals_reference(gathered, dtype):
    slot_T = [3, 3, 0, 1, 5, 2, 0, 3, 4, 4, 1, 0, 2]
    site = random_site(K, QKV, MIXED_RANKS, dtype=dtype)
    x_TK = torch.randn(len(slot_T), K).to(dtype)
    y_TO = torch.randn(len(slot_T), sum(QKV)).to(dtype)
    groups = groups_of(slot_T, gathered=gathered)
    actual_TO = _delta(site, y_TO, x_TK, groups)
    expected_TO = reference.delta(y_TO, x_TK, site.table, groups)
    assert_close("y", actual_TO.float(), expected_TO.float(), RATIOS[dtype])
    assert not torch.equal(actual_TO, y_TO)


@pytest.mark.parametrize("gathered", [True, False])
def test_rows_and_slices_without_an_adapter_are_not_written(gathered):
    slot_T = [0, 2, 0, 2, 4, 0, 2]
    site = random_site(K, QKV, MIXED_RANKS)
    y_TO = torch.full((len(slot_T), sum(QKV)), float("nan"))
    y_TO[[1, 3, 6], :32] = 0.0  # slot 2 changes slices 0 and 2, slot 4 only slice 2
    y_TO[[1, 3, 6, 4], 40:] = 0.0
    result_TO = _delta(
        site, y_TO, torch.randn(len(slot_T), K), groups_of(slot_T, gathered=gathered)
    )
    assert torch.equal(result_TO.isnan(), y_TO.isnan())
    assert result_TO[1, :32].abs().sum() > 0
    assert result_TO[4, 40:].abs().sum() > 0


def test_poisoned_rows_of_others_do_not_leak():
    site = random_site(K, QKV, MIXED_RANKS)
    slot_T = [1, 0, 3, 0, 1]
    x_TK, y_TO = torch.randn(5, K), torch.randn(5, sum(QKV))
    groups = groups_of(slot_T, gathered=True)
    clean_TO = _delta(site, y_TO, x_TK, groups)
    x_TK[[1, 3]] = float("nan")
    y_TO[[1, 3]] = float("nan")
    poisoned_TO = _delta(site, y_TO, x_TK, groups)
    assert torch.equal(poisoned_TO[[0, 2, 4]], clean_TO[[0, 2, 4]])
    assert poisoned_TO[[1, 3]].isnan().all()


@pytest.mark.parametrize("slot", range(1, 6))
def test_one_token(slot):
    site = random_site(K, QKV, MIXED_RANKS)
    x_TK, y_TO = torch.randn(1, K), torch.zeros(1, sum(QKV))
    groups = groups_of([slot], gathered=False)
    expected_TO = reference.delta(y_TO, x_TK, site.table, groups)
    assert_close("y", _delta(site, y_TO, x_TK, groups), expected_TO, 2e-6)


def test_no_groups_is_no_work():
    site = random_site(K, QKV, MIXED_RANKS)
    y_TO = torch.randn(4, sum(QKV))
    assert torch.equal(_delta(site, y_TO, torch.full((4, K), float("nan")), ()), y_TO)


def test_slot_without_weights_is_rank_zero():
    site = random_site(K, QKV, {1: (8, 8, 8)})
    y_TO = torch.randn(2, sum(QKV))
    assert torch.equal(
        _delta(site, y_TO, torch.randn(2, K), groups_of([2, 2], gathered=False)), y_TO
    )


def test_a_rows_result_depends_on_the_company_only_by_rounding():
    site = random_site(K, QKV, MIXED_RANKS)
    x_TK, y_TO = torch.randn(6, K), torch.randn(6, sum(QKV))
    alone_O = _delta(site, y_TO[:1], x_TK[:1], groups_of([3], gathered=False))[0]
    for others in ([0] * 5, [3] * 5, [1, 2, 4, 5, 3]):
        mixed_TO = _delta(site, y_TO, x_TK, groups_of([3, *others], gathered=True))
        assert_close("row", mixed_TO[0], alone_O, 2e-6)
    # Adapters beside it change nothing at all: its own group computes the same matmuls.
    for others in ([0] * 5, [1, 2, 4, 5, 2], [5, 5, 5, 1, 1]):
        mixed_TO = _delta(site, y_TO, x_TK, groups_of([3, *others], gathered=True))
        assert torch.equal(mixed_TO[0], alone_O)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_y_is_rounded_once(dtype):
    """A delta of many small terms on a large y: each term alone would be lost in bf16. (A float32 y is what the terms are
    summed in: there is nothing left to round.)"""
    site = random_site(K, (4,), {1: (256,)}, dtype=dtype)
    x_TK = torch.randn(3, K).to(dtype)
    y_TO = torch.full((3, 4), 50.0, dtype=dtype)
    expected_TO = (y_TO.double() + site.dense_delta(x_TK, 1, 0)).to(dtype)
    actual_TO = _delta(site, y_TO, x_TK, groups_of([1, 1, 1], gathered=False))
    assert_close("y", actual_TO.float(), expected_TO.float(), RATIOS[dtype] / 8)


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("dtype", list(RATIOS))
def test_embedding_equals_reference(gathered, dtype):
    slot_T = [2, 0, 1, 2, 2, 1]
    site = random_site(30, (16,), {1: (8,), 2: (40,)}, dtype=dtype)
    ids_T = torch.tensor([0, 29, 7, 29, 3, 0])
    y_TO = torch.randn(6, 16).to(dtype)
    groups = groups_of(slot_T, gathered=gathered)
    result_TO = y_TO.clone()
    backend = TorchBackend()
    backend.expand_(result_TO, backend.gather(ids_T, site.table, groups), site.table, groups)
    expected_TO = reference.delta(y_TO, ids_T, site.table, groups)
    assert_close("y", result_TO.float(), expected_TO.float(), RATIOS[dtype])
    assert torch.equal(result_TO[1], y_TO[1])


def test_divided_embedding_adds_only_the_tokens_it_holds():
    """Two ranks hold ids [0, 30) and [30, 60); the parts add up to the delta of the whole table."""
    low = random_site(30, (16,), {1: (8,)}, seed=1)
    high = random_site(30, (16,), {1: (8,)}, seed=2, in_start=30)
    ids_T, backend = torch.tensor([5, 35, 59, 0]), TorchBackend()
    groups = groups_of([1] * 4, gathered=False)
    parts = []
    for site in (low, high):
        y_TO = torch.zeros(4, 16)
        backend.expand_(y_TO, backend.gather(ids_T, site.table, groups), site.table, groups)
        assert_close(
            "part", y_TO, reference.delta(torch.zeros(4, 16), ids_T, site.table, groups), 2e-6
        )
        parts.append(y_TO)
    assert not parts[0][[1, 2]].any()
    assert not parts[1][[0, 3]].any()
    assert parts[0][[0, 3]].any()
    assert parts[1][[1, 2]].any()


def test_halves_make_the_whole():
    site = random_site(K, QKV, MIXED_RANKS)
    slot_T = [1, 3, 3, 0, 2, 5, 1]
    x_TK, y_TO = torch.randn(7, K), torch.randn(7, sum(QKV))
    groups, backend = groups_of(slot_T, gathered=True), TorchBackend()
    shrunk = backend.shrink(x_TK, site.table, groups)
    halves_TO = y_TO.clone()
    backend.expand_(halves_TO, shrunk, site.table, groups)
    assert torch.equal(halves_TO, _delta(site, y_TO, x_TK, groups))
