"""The sampling operations against plain loops in numpy, known constants and the true distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikeet.ops import sampling as ops


def chi_square_is_plausible(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Pearson's statistic within four standard deviations of its mean; classes with few expected counts merged."""
    total = counts.sum()
    order = np.argsort(probabilities)[::-1]
    observed, expected = [], []
    rest_observed = rest_expected = 0.0
    for index in order:
        if probabilities[index] * total >= 10:
            observed.append(counts[index])
            expected.append(probabilities[index] * total)
        else:
            rest_observed += counts[index]
            rest_expected += probabilities[index] * total
    if rest_expected >= 10:
        observed.append(rest_observed)
        expected.append(rest_expected)
    else:
        assert rest_observed <= rest_expected + 4 * math.sqrt(rest_expected + 1) + 1
    difference = np.array(observed) - np.array(expected)
    statistic = float((difference**2 / np.array(expected)).sum())
    freedom = max(len(observed) - 1, 1)
    return statistic < freedom + 4 * math.sqrt(2 * freedom) + 4


def draws(logits_V: torch.Tensor, num: int, *, seed: int = 7) -> np.ndarray:
    """Histogram of ``num`` draws with counters 0..num-1."""
    counters_N = torch.arange(num)
    keys_N = ops.row_keys(torch.full((num,), seed), counters_N)
    tokens_N = ops.draw(logits_V.expand(num, -1), keys_N)
    return np.bincount(tokens_N.numpy(), minlength=logits_V.shape[0])


# --- penalties, bias, bans ---


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits_NV = torch.tensor([[2.0, -2.0, 3.0, -torch.inf], [2.0, -2.0, 3.0, 0.0]])
    seen_NV = torch.tensor([[True, True, False, True], [False, False, True, True]])
    ops.penalise_repetition_(logits_NV, seen_NV, torch.tensor([2.0, 0.5]))
    assert logits_NV.tolist() == [[1.0, -4.0, 3.0, -math.inf], [2.0, -2.0, 6.0, 0.0]]


def test_count_penalties_follow_the_formula():
    logits_NV = torch.zeros(2, 3)
    counts_NV = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 0.0]])
    ops.penalise_counts_(
        logits_NV, counts_NV, torch.tensor([0.5, -1.0]), torch.tensor([0.25, 0.125])
    )
    assert logits_NV.tolist() == [[0.0, -0.75, -1.75], [1.875, 0.0, 0.0]]


def test_bias_and_ban_touch_only_their_entries():
    logits_NV = torch.zeros(2, 3)
    rows_E, tokens_E = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1])
    ops.add_bias_(logits_NV, rows_E, tokens_E, torch.tensor([1.5, -2.0, 100.0]))
    ops.ban_(logits_NV, torch.tensor([1]), torch.tensor([1]))
    assert logits_NV.tolist() == [[0.0, 0.0, 1.5], [-2.0, -math.inf, 0.0]]


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 70])
def test_bitmask_bits_are_tokens(vocab_size):
    generator = np.random.default_rng(vocab_size)
    allowed_NV = generator.random((3, vocab_size)) < 0.5
    padded = np.zeros((3, (vocab_size + 31) // 32 * 32), dtype=np.uint8)
    padded[:, :vocab_size] = allowed_NV
    bits_NW = torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))
    logits_NV = torch.ones(3, vocab_size)
    ops.apply_bitmask_(logits_NV, bits_NW)
    assert np.array_equal(np.isfinite(logits_NV.numpy()), allowed_NV)


# --- temperature ---


@pytest.mark.parametrize("temperature", [ops.MIN_TEMPERATURE, 1e-6, 0.5, 1.0, 7.0, 1e9])
def test_temperature_scales_differences_to_the_maximum(temperature):
    logits_NV = torch.tensor([[3.0, 1.0, -5.0, -torch.inf]])
    scaled_NV = ops.scale_temperature(logits_NV, torch.tensor([temperature]))
    expected = np.array([0.0, -2.0, -8.0, -math.inf]) / np.float32(temperature)
    np.testing.assert_allclose(scaled_NV[0].numpy(), expected.astype(np.float32), rtol=1e-6)


def test_extreme_temperatures_reach_both_limits_without_nan():
    logits_NV = torch.tensor([[1e30, 1e30, -1e30, -torch.inf], [5.0, 1.0, 1.0, -torch.inf]])
    cold_NV = ops.scale_temperature(logits_NV, torch.full((2,), ops.MIN_TEMPERATURE))
    assert cold_NV.tolist() == [
        [0.0, 0.0, -math.inf, -math.inf],
        [0.0, pytest.approx(-4e30), pytest.approx(-4e30), -math.inf],
    ]
    hot_NV = ops.scale_temperature(logits_NV, torch.full((2,), ops.MAX_TEMPERATURE))
    assert hot_NV[1, :3].abs().max() < 1e-20
    assert hot_NV[1, 3] == -math.inf


# --- filters ---


def kept_by_loop(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The definition in ``keep_likely_``, token by token, in float64."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    p = weights / weights.sum()
    kept = set()
    for token in range(len(p)):
        more_likely = p[logits > logits[token]]
        if (
            len(more_likely) < top_k
            and (top_p >= 1 or more_likely.sum() < top_p)
            and p[token] >= min_p * p.max()
            and p[token] > 0
        ):
            kept.add(token)
    return kept


def kept_by_op(logits_NV: torch.Tensor, params: list[tuple[int, float, float]]) -> list[set[int]]:
    top_ks, top_ps, min_ps = zip(*params, strict=True)
    scaled_NV = ops.scale_temperature(logits_NV, torch.ones(len(params)))
    ops.keep_likely_(
        scaled_NV,
        top_k_N=torch.tensor(top_ks),
        top_p_N=torch.tensor(top_ps),
        min_p_N=torch.tensor(min_ps),
        max_top_k=max(top_ks),
    )
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in scaled_NV]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("vocab_size", [1, 2, 17, 300])
def test_filters_keep_what_the_definition_keeps(seed, vocab_size):
    generator = np.random.default_rng([seed, vocab_size])
    params = [
        (
            int(generator.integers(1, vocab_size + 1)),
            float(generator.choice([1.0, 0.05, 0.3, 0.77, 0.95])),
            float(generator.choice([0.0, 0.01, 0.2, 1.0])),
        )
        for _ in range(6)
    ]
    params[0] = (vocab_size, 1.0, 0.0)
    logits_NV = torch.from_numpy(generator.normal(scale=3, size=(6, vocab_size)).astype(np.float32))
    logits_NV[2, 1:] = -torch.inf
    expected = [kept_by_loop(row, *p) for row, p in zip(logits_NV.numpy(), params, strict=True)]
    assert kept_by_op(logits_NV, params) == expected


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    values=st.lists(st.integers(-4, 4), min_size=1, max_size=12),
    top_k=st.integers(1, 12),
    top_p=st.sampled_from([0.11, 0.33, 0.61, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.4]),
)
def test_filters_with_many_equal_logits(values, top_k, top_p, min_p):
    logits = np.array(values, dtype=np.float32)
    params = [(min(top_k, len(values)), top_p, min_p)]
    assert kept_by_op(torch.from_numpy(logits)[None], params) == [kept_by_loop(logits, *params[0])]


@pytest.mark.parametrize("scale", [0.0, 0.05, 2.0, 8.0])
def test_top_p_over_a_large_vocabulary(scale):
    """Flat rows keep more than the partial sort sees, peaked ones do not; both must be right, mixed or alone."""
    generator = np.random.default_rng(3)
    logits_NV = torch.from_numpy((scale * generator.normal(size=(2, 9000))).astype(np.float32))
    logits_NV[1] *= 20
    params = [(9000, 0.9, 0.0), (9000, 0.4, 0.0)]
    together = kept_by_op(logits_NV.clone(), params)
    alone = [kept_by_op(logits_NV[i : i + 1].clone(), params[i : i + 1])[0] for i in range(2)]
    assert together == alone
    for row, (_, top_p, _), kept in zip(logits_NV.double().numpy(), params, together, strict=True):
        weights = np.exp(row - row.max())
        p = weights / weights.sum()
        mass = p[sorted(kept)].sum()
        least = p[sorted(kept)].min()
        assert mass >= top_p - 1e-5
        ties = (row == row[sorted(kept)].min()).sum()
        assert mass - ties * least < top_p + 1e-5


@pytest.mark.parametrize("used", ["top_k", "top_p", "min_p"])
def test_each_filter_alone(used):
    logits_NV = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]])
    p = torch.softmax(logits_NV[0], dim=0)
    arguments = {
        "top_k": {"top_k_N": torch.tensor([2]), "max_top_k": 2},
        "top_p": {"top_p_N": p[:1] + p[1] / 2},
        "min_p": {"min_p_N": torch.tensor([0.3])},
    }[used]
    scaled_NV = ops.scale_temperature(logits_NV, torch.ones(1))
    ops.keep_likely_(scaled_NV, **arguments)
    assert scaled_NV.isfinite().tolist() == [[True, True, False, False, False]]


def test_no_filter_changes_nothing():
    scaled_NV = torch.tensor([[0.0, -1.0, -2.0]])
    ops.keep_likely_(scaled_NV)
    assert scaled_NV.tolist() == [[0.0, -1.0, -2.0]]


# --- noise and draws ---


def test_token_noise_is_a_splitmix64_stream():
    """Published first outputs of SplitMix64 with seed 0: token noise is that stream, hashed from token ids."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    noise_V = ops.gumbel_noise(torch.zeros(1, dtype=torch.int64), 3)[0]
    uniform = [(value >> 24) / 2**40 for value in expected]
    want = [-math.log(-math.log1p(-u)) for u in uniform]
    np.testing.assert_allclose(noise_V.numpy(), want, rtol=1e-5)


def test_noise_of_a_row_ignores_the_other_rows_and_the_width():
    keys_N = ops.row_keys(torch.tensor([5, 6, 5]), torch.tensor([0, 0, 1]))
    together_NV = ops.gumbel_noise(keys_N, 100)
    for row in range(3):
        assert torch.equal(ops.gumbel_noise(keys_N[row : row + 1], 64)[0], together_NV[row, :64])
    assert len(set(keys_N.tolist())) == 3


def test_noise_is_standard_gumbel_and_uncorrelated():
    keys_N = ops.row_keys(torch.full((400,), 11), torch.arange(400))
    noise_NV = ops.gumbel_noise(keys_N, 500).double()
    assert noise_NV.isfinite().all()
    assert noise_NV.mean().item() == pytest.approx(0.57722, abs=0.015)
    assert noise_NV.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    for a, b in [(noise_NV[:, :-1], noise_NV[:, 1:]), (noise_NV[:-1], noise_NV[1:])]:
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation.item()) < 0.01
    uniform = np.exp(-np.exp(-noise_NV.numpy().ravel()))
    counts = np.histogram(uniform, bins=64, range=(0, 1))[0]
    assert chi_square_is_plausible(counts, np.full(64, 1 / 64))


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_noise_of_neighbouring_seeds_is_unrelated(seed):
    seeds_N = torch.tensor([seed, max(seed - 1, 0) if seed else 1])
    noise_NV = ops.gumbel_noise(ops.row_keys(seeds_N, torch.zeros(2, dtype=torch.int64)), 20000)
    assert abs(torch.corrcoef(noise_NV)[0, 1].item()) < 0.03


@pytest.mark.parametrize("shape", ["random", "uniform", "peaked", "masked", "zipf"])
def test_draws_follow_the_softmax(shape):
    generator = torch.Generator().manual_seed(1)
    logits_V = {
        "random": torch.randn(40, generator=generator) * 2,
        "uniform": torch.zeros(64),
        "peaked": torch.tensor([12.0] + [0.0] * 30),
        "masked": torch.tensor([0.0, -torch.inf, 1.0, -torch.inf, -1.0]),
        "zipf": -torch.arange(1, 200).float().log(),
    }[shape]
    counts = draws(logits_V, 30000)
    p = torch.softmax(logits_V.double(), dim=0).numpy()
    assert counts[p == 0].sum() == 0
    assert chi_square_is_plausible(counts, p)


def test_draws_of_different_seeds_follow_the_softmax_too():
    """One draw for each of many consecutive seeds: what n > 1 and fresh requests look like."""
    logits_V = torch.tensor([1.0, 0.0, 2.0, -1.0])
    keys_N = ops.row_keys(torch.arange(20000), torch.zeros(20000, dtype=torch.int64))
    counts = np.bincount(ops.draw(logits_V.expand(20000, -1), keys_N).numpy(), minlength=4)
    assert chi_square_is_plausible(counts, torch.softmax(logits_V.double(), 0).numpy())


def test_rare_tokens_are_drawn_as_often_as_they_should():
    """20,000 tokens share a probability of 1 %, each 5e-7: noise of 16 bits would hardly ever draw them."""
    logits_V = torch.full((20001,), math.log(5e-7))
    logits_V[0] = math.log(0.99)
    counts = np.zeros(20001, dtype=np.int64)
    for part in range(10):
        counts += draws(logits_V, 100, seed=100 + part)
    assert 0 < 1000 - counts[0] < 25


# --- log-probabilities ---


def test_logprobs_are_the_log_softmax():
    generator = torch.Generator().manual_seed(2)
    logits_NV = torch.randn(5, 50, generator=generator) * 4
    tokens_N = torch.tensor([0, 3, 49, 7, 7])
    chosen_N, values_NK, ids_NK = ops.token_logprobs(logits_NV, tokens_N, 4)
    x = logits_NV.double().numpy()
    want = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(chosen_N.numpy(), want[range(5), tokens_N], atol=1e-5)
    order = np.argsort(-x, axis=1)[:, :4]
    assert np.array_equal(ids_NK.numpy(), order)
    np.testing.assert_allclose(values_NK.numpy(), np.take_along_axis(want, order, 1), atol=1e-5)


def test_most_likely_tokens_put_equals_in_order_of_id():
    logits_NV = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0], [0.0, -0.0, 0.0, -0.0, -1.0, -0.0]])
    for num_top in range(1, 7):
        ids_NK = ops.token_logprobs(logits_NV, torch.zeros(2, dtype=torch.int64), num_top)[2]
        assert ids_NK.tolist() == [[1, 2, 4, 0, 5, 3][:num_top], [0, 1, 2, 3, 5, 4][:num_top]]


def test_more_most_likely_tokens_than_the_vocabulary_has():
    chosen_N, values_NK, ids_NK = ops.token_logprobs(
        torch.tensor([[0.0, -torch.inf, 1.0]]), torch.tensor([1]), 10
    )
    assert chosen_N.tolist() == [-math.inf]
    assert ids_NK.tolist() == [[2, 0, 1]]
    assert values_NK[0, 2] == -math.inf


def test_bfloat16_logits_are_computed_in_float32():
    logits_NV = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    chosen_N, _, _ = ops.token_logprobs(logits_NV, torch.tensor([0]), 0)
    assert chosen_N.dtype == torch.float32
    assert chosen_N.item() == pytest.approx(-2.40761, abs=1e-5)
