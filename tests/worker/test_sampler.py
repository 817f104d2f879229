"""The sampler: parameters per row, seeds, masks, errors of single rows and log-probabilities."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from lorikeet.core.plan import SequenceStart
from lorikeet.core.request import SamplingParams
from lorikeet.worker.grammar.compiler import GrammarCompiler
from lorikeet.worker.sampling import state as sampling_state
from lorikeet.worker.sampling.rules import LogitRules
from lorikeet.worker.sampling.sampler import Sampler
from lorikeet.worker.staging import upload
from tests.support.sampling import prompt_logprobs, sample

VOCAB = 64
EOS = (3, 9)


def make_sampler(vocab_size: int = VOCAB) -> Sampler:
    return Sampler(grammars=GrammarCompiler("none", vocab_size, EOS), device="cpu")


def start(seq: int, *, prompt=(1, 2), outputs=(), seed=0, top=-1, logprob_start=-1, **params):
    return SequenceStart(
        seq=seq,
        token_ids=[*prompt, *outputs],
        num_prompt=len(prompt),
        num_cached=0,
        page_ids=[],
        slot=0,
        sampling=SamplingParams(**params),
        seed=seed,
        logprob_start=logprob_start,
        num_top_logprobs=top,
    )


def random_logits(rows: int, *, seed: int = 0, columns: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 3


def one_token(logits_V: torch.Tensor, **params) -> int:
    sampler = make_sampler(logits_V.shape[0])
    sampler.start(start(1, **params))
    (result,) = sample(sampler, logits_V[None], [1])
    assert result.error is None
    return result.token_id


def test_bias_and_bans_are_made_once_and_not_touched_on_the_host(monkeypatch):
    """A step costs the host the same whatever number of tokens they name."""
    sizes: list[int] = []
    ints = LogitRules._ints
    monkeypatch.setattr(
        LogitRules, "_ints", lambda self, values: (sizes.append(len(values)), ints(self, values))[1]
    )
    sampler = make_sampler()
    bias = dict.fromkeys(range(50), 1.0)
    for seq in range(3):
        sampler.start(
            start(seq, min_new_tokens=5, logit_bias=bias, stop_token_ids=tuple(range(40)))
        )
    logits_NV = random_logits(3)
    tokens = [result.token_id for result in sample(sampler, logits_NV, [0, 1, 2])]
    assert min(tokens) >= 40
    assert max(sizes) == 3


@pytest.mark.parametrize("num_failures", [1, 2])
def test_a_start_without_memory_fails_its_own_sequence(monkeypatch, num_failures):
    failures = iter([True] * num_failures)

    def upload_if_there_is_memory(array, device):
        if next(failures, False):
            raise torch.OutOfMemoryError("no memory, says the test")
        return upload(array, device)

    monkeypatch.setattr(sampling_state, "upload", upload_if_there_is_memory)
    sampler = make_sampler()
    sampler.start(start(0, temperature=0.0, logit_bias={5: 100.0}))
    sampler.start(start(1, temperature=0.0))
    rich, plain = sample(sampler, random_logits(2), [0, 1])
    assert plain.error is None
    if num_failures == 1:
        assert (rich.error, rich.token_id) == (None, 5)
    else:
        assert rich.error is not None
        assert "no memory for penalties, logit_bias or stop tokens" in rich.error


def test_a_launch_that_fails_and_is_repeated_counts_its_token_once(monkeypatch):
    logits_NV = random_logits(2)
    sampler, other = make_sampler(), make_sampler()
    for each in (sampler, other):
        for seq in range(2):
            each.start(start(seq, frequency_penalty=1.0, repetition_penalty=1.1, seed=seq, top=2))

    def fail(*arguments):
        raise torch.OutOfMemoryError("no memory, says the test")

    with monkeypatch.context() as patch:
        patch.setattr("lorikeet.worker.sampling.sampler.PendingSample", fail)
        with pytest.raises(torch.OutOfMemoryError):
            sample(sampler, logits_NV, [0, 1])
    for _ in range(5):
        assert sample(sampler, logits_NV, [0, 1]) == sample(other, logits_NV, [0, 1])


# --- greedy ---


def test_greedy_is_the_argmax_and_ties_go_to_the_lowest_id():
    logits_NV = random_logits(3)
    logits_NV[1, [40, 7, 22]] = 100.0
    sampler = make_sampler()
    for seq in range(3):
        sampler.start(start(seq, temperature=0.0))
    tokens = [result.token_id for result in sample(sampler, logits_NV, [0, 1, 2])]
    assert tokens == [int(logits_NV[0].argmax()), 7, int(logits_NV[2].argmax())]


@pytest.mark.parametrize("params", [{"top_k": 1}, {"temperature": 1e-40}, {"temperature": 1e-4}])
def test_limits_that_are_greedy(params):
    logits_NV = random_logits(20, seed=4)
    for row in range(20):
        assert one_token(logits_NV[row], seed=row, **params) == int(logits_NV[row].argmax())


def test_the_plain_greedy_path_and_the_general_path_agree():
    logits_NV = random_logits(8, seed=5)
    plain, general = make_sampler(), make_sampler()
    for seq in range(8):
        plain.start(start(seq, temperature=0.0))
        general.start(start(seq, temperature=0.0))
    general.start(start(99, temperature=0.7, top_p=0.5, repetition_penalty=1.5))
    mixed_NV = torch.cat([logits_NV, random_logits(1)])
    expected = [result.token_id for result in sample(plain, logits_NV, list(range(8)))]
    found = [result.token_id for result in sample(general, mixed_NV, [*range(8), 99])]
    assert found[:8] == expected


# --- what a feature does, and that it is done for its row alone ---


def reference_logits(logits: np.ndarray, first: SequenceStart) -> np.ndarray:
    """The documented order of modifications, token by token."""
    p = first.sampling
    outputs = first.token_ids[first.num_prompt :]
    x = logits.astype(np.float64).copy()
    for token in range(len(x)):
        if token in first.token_ids:
            x[token] = (
                x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
            )
        count = outputs.count(token)
        x[token] -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
        x[token] += p.logit_bias.get(token, 0.0)
        if len(outputs) < p.min_new_tokens and (token in EOS or token in p.stop_token_ids):
            x[token] = -math.inf
    return x


MODIFIERS = [
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.4},
    {"frequency_penalty": 2.0},
    {"presence_penalty": 2.0},
    {"frequency_penalty": -1.5, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"logit_bias": {5: 30.0, 6: -50.0}},
    {"logit_bias": {9: 90.0, 4: 80.0}, "min_new_tokens": 10, "stop_token_ids": (4,)},
    {"min_new_tokens": 3},
    {},
]


def test_modifiers_of_mixed_rows_match_the_reference():
    sampler = make_sampler()
    generator = np.random.default_rng(0)
    starts = []
    for seq, params in enumerate(MODIFIERS):
        outputs = generator.integers(0, VOCAB, size=4 * (seq % 3)).tolist()
        starts.append(start(seq, prompt=(5, 6, 7, 8), outputs=outputs, temperature=0.0, **params))
        sampler.start(starts[-1])
    for step in range(6):
        logits_NV = random_logits(len(starts), seed=step)
        before = logits_NV.clone()
        order = generator.permutation(len(starts)).tolist()
        results = sample(sampler, logits_NV[order], order)
        assert torch.equal(logits_NV, before)
        for seq, result in zip(order, results, strict=True):
            want = int(reference_logits(logits_NV[seq].numpy(), starts[seq]).argmax())
            assert (result.seq, result.token_id, result.error) == (seq, want, None)
            starts[seq].token_ids.append(want)


def test_min_new_tokens_ends_exactly_when_it_is_reached():
    logits_NV = torch.zeros(1, VOCAB)
    logits_NV[0, EOS[0]] = 50.0
    logits_NV[0, 20] = 40.0
    logits_NV[0, 30] = 30.0
    sampler = make_sampler()
    sampler.start(start(1, temperature=0.0, min_new_tokens=2, stop_token_ids=(20,)))
    tokens = [sample(sampler, logits_NV, [1])[0].token_id for _ in range(4)]
    assert tokens == [30, 30, EOS[0], EOS[0]]


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0, 1}),
        ({"min_p": 0.4}, {0, 1}),
        ({"top_k": 3, "top_p": 0.6}, {0, 1}),
        ({"top_k": VOCAB + 100}, set(range(5))),
        ({"temperature": 0.2, "top_p": 0.9}, {0}),
    ],
)
def test_filters_restrict_what_is_drawn(params, allowed):
    logits_V = torch.full((VOCAB,), -50.0)
    logits_V[:5] = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04]).log()
    found = {one_token(logits_V, seed=seed, **params) for seed in range(400)}
    assert found == allowed


def test_temperature_changes_the_distribution_as_it_should():
    logits_V = torch.tensor([1.0, 0.0, -1.0, -2.0])
    for temperature in (0.5, 1.0, 2.5, 1e30):
        sampler = Sampler(grammars=GrammarCompiler("none", 4, ()), device="cpu")
        num = 6000
        for seq in range(num):
            sampler.start(start(seq, seed=seq, temperature=temperature))
        results = sample(sampler, logits_V.expand(num, -1), list(range(num)))
        counts = np.bincount([result.token_id for result in results], minlength=4)
        p = torch.softmax(logits_V.double() / temperature, 0).numpy()
        statistic = ((counts - num * p) ** 2 / (num * p)).sum()
        assert statistic < 21.1  # 0.9999 quantile of chi-square with 3 degrees of freedom


# --- seeds ---


def generate(sampler: Sampler, seq: int, num: int, others: list[int], *, place: int) -> list[int]:
    """Tokens of one sequence while others share the batch; its logits depend on its own step alone."""
    tokens = []
    for step in range(num):
        own_NV = random_logits(1, seed=1000 + step)
        other_NV = random_logits(len(others), seed=step) if others else own_NV[:0]
        batch_NV = torch.cat([other_NV[:place], own_NV, other_NV[place:]])
        seqs = [*others[:place], seq, *others[place:]]
        tokens.append(sample(sampler, batch_NV, seqs)[place].token_id)
    return tokens


MIXED = {"temperature": 1.3, "top_p": 0.9, "top_k": 30, "min_p": 0.01, "presence_penalty": 0.4}


@pytest.mark.parametrize("params", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, MIXED])
def test_a_seed_gives_the_same_tokens_whatever_shares_the_batch(params):
    alone = make_sampler()
    alone.start(start(1, seed=42, **params))
    expected = generate(alone, 1, 25, [], place=0)
    assert len(set(expected)) > 5
    for others, place in [([2], 0), ([2, 3, 4], 3), ([2, 3, 4, 5], 2)]:
        shared = make_sampler()
        kinds = [
            {"temperature": 0.0},
            {"top_p": 0.3},
            {"top_k": 50, "seed": 42},
            {"logit_bias": {1: 9.0}},
        ]
        for seq, kind in zip(others, kinds, strict=False):
            shared.start(start(seq, **kind))
        shared.start(start(1, seed=42, **params))
        assert generate(shared, 1, 25, others, place=place) == expected


def test_different_seeds_and_different_steps_give_different_tokens():
    sampler = make_sampler()
    for seq in range(200):
        sampler.start(start(seq, seed=seq))
    flat_NV = torch.zeros(200, VOCAB)
    first = [r.token_id for r in sample(sampler, flat_NV, list(range(200)))]
    second = [r.token_id for r in sample(sampler, flat_NV, list(range(200)))]
    assert len(set(first)) > 50
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20


def test_the_global_random_state_is_neither_read_nor_changed():
    logits_V = random_logits(1)[0]
    torch.manual_seed(1)
    first = one_token(logits_V, seed=5)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert one_token(logits_V, seed=5) == first
    torch.set_rng_state(state)
    one_token(logits_V, seed=6)
    assert torch.equal(torch.get_rng_state(), state)


# --- rows that fail, and logits that are odd but fine ---


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, MIXED, {"logit_bias": {1: 3.0}}])
def test_a_bad_row_fails_alone(bad, params):
    logits_NV = random_logits(3, seed=9)
    healthy, broken = make_sampler(), make_sampler()
    for sampler in (healthy, broken):
        for seq in range(3):
            sampler.start(start(seq, seed=seq, top=2, **params))
    broken_NV = logits_NV.clone()
    broken_NV[1, 50] = bad
    expected = sample(healthy, logits_NV, [0, 1, 2])
    found = sample(broken, broken_NV, [0, 1, 2])
    assert [found[0], found[2]] == [expected[0], expected[2]]
    assert found[1].error is not None
    assert "not finite" in found[1].error
    assert found[1].logprobs is None
    assert 0 <= found[1].token_id < VOCAB


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, MIXED])
def test_minus_infinity_is_never_sampled(params):
    logits_V = torch.full((VOCAB,), -torch.inf)
    logits_V[[11, 17]] = torch.tensor([0.0, 0.1])
    assert {one_token(logits_V, seed=seed, **params) for seed in range(50)} <= {11, 17}


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, MIXED])
def test_a_row_without_any_possible_token_is_an_error(params):
    sampler = make_sampler()
    sampler.start(start(1, **params))
    sampler.start(start(2, min_new_tokens=1, **params))
    logits_NV = torch.full((2, VOCAB), -torch.inf)
    logits_NV[1, EOS[0]] = 0.0
    for result in sample(sampler, logits_NV, [1, 2]):
        assert result.error is not None
        assert "no token is possible" in result.error


def test_padding_columns_do_not_exist():
    padded_NV = random_logits(1, columns=VOCAB + 16)
    padded_NV[0, VOCAB:] = 1000.0
    padded_NV[0, VOCAB] = math.nan
    sampler = make_sampler()
    sampler.start(start(1, temperature=0.0, top=3))
    (result,) = sample(sampler, padded_NV, [1])
    assert result.error is None
    assert result.token_id == int(padded_NV[0, :VOCAB].argmax())
    assert result.logprobs is not None
    want = torch.log_softmax(padded_NV[0, :VOCAB], 0)[result.token_id].item()
    assert result.logprobs.logprob == pytest.approx(want)


def test_bfloat16_logits_are_accepted():
    logits_V = random_logits(1)[0].to(torch.bfloat16)
    assert one_token(logits_V, temperature=0.0) == int(logits_V.float().argmax())


def test_wrong_use_is_refused():
    sampler = make_sampler()
    sampler.start(start(1))
    with pytest.raises(ValueError, match="open already"):
        sampler.start(start(1))
    with pytest.raises(ValueError, match="expected 1 rows"):
        sample(sampler, random_logits(2), [1])
    with pytest.raises(ValueError, match="at least 64 columns"):
        sample(sampler, random_logits(1, columns=63), [1])
    sampler.end(1)
    with pytest.raises(KeyError):
        sampler.end(1)
    with pytest.raises(KeyError):
        sample(sampler, random_logits(1), [1])
    assert sample(sampler, random_logits(0), []) == []


def test_a_grammar_without_a_compiler_fails_its_sequence_alone():
    sampler = make_sampler()
    sampler.start(start(1, regex="a+", temperature=0.0))
    sampler.start(start(2, temperature=0.0))
    refused, served = sample(sampler, random_logits(2), [1, 2])
    assert refused.error is not None
    assert "regex" in refused.error
    assert served.error is None


# --- log-probabilities ---


def test_logprobs_are_of_the_raw_distribution():
    logits_NV = random_logits(3, seed=12)
    sampler = make_sampler()
    sampler.start(start(0, temperature=0.3, logit_bias={5: 100.0}, repetition_penalty=2.0, top=3))
    sampler.start(start(1, temperature=0.0))
    sampler.start(start(2, temperature=0.0, top=0))
    biased, without, chosen_only = sample(sampler, logits_NV, [0, 1, 2])
    raw_NV = torch.log_softmax(logits_NV, dim=-1)
    assert biased.token_id == 5
    assert biased.logprobs is not None
    assert biased.logprobs.token_id == 5
    assert biased.logprobs.logprob == pytest.approx(raw_NV[0, 5].item())
    top = torch.topk(raw_NV[0], 3)
    assert [token for _, token in biased.logprobs.top] == top.indices.tolist()
    assert [value for value, _ in biased.logprobs.top] == pytest.approx(top.values.tolist())
    assert without.logprobs is None
    assert chosen_only.logprobs is not None
    assert chosen_only.logprobs.top == []
    assert chosen_only.logprobs.logprob == pytest.approx(raw_NV[2].max().item())


def test_the_most_likely_token_is_the_greedy_one_even_among_equals():
    logits_NV = torch.zeros(1, VOCAB)
    logits_NV[0, [60, 31, 33]] = 2.0
    sampler = make_sampler()
    sampler.start(start(1, temperature=0.0, top=2))
    (result,) = sample(sampler, logits_NV, [1])
    assert result.logprobs is not None
    assert [token for _, token in result.logprobs.top] == [31, 33]
    assert result.token_id == 31


def test_impossible_tokens_are_not_listed_as_likely():
    logits_NV = torch.full((1, VOCAB), -torch.inf)
    logits_NV[0, 4] = 1.0
    sampler = make_sampler()
    sampler.start(start(1, top=5))
    (result,) = sample(sampler, logits_NV, [1])
    assert result.logprobs is not None
    assert result.logprobs.top == [(0.0, 4)]


def test_prompt_logprobs_by_position_and_in_chunks():
    prompt = (7, 8, 9, 10, 11, 12)
    logits_TV = random_logits(5, seed=20)
    raw_TV = torch.log_softmax(logits_TV, dim=-1)
    sampler = make_sampler()
    sampler.start(start(1, prompt=prompt, top=2, logprob_start=0))
    whole = prompt_logprobs(sampler, logits_TV, 1, 1)
    assert [entry.token_id for entry in whole] == list(prompt)
    assert (whole[0].logprob, whole[0].top) == (None, [])
    for position in range(1, 6):
        entry = whole[position]
        assert entry.logprob == pytest.approx(raw_TV[position - 1, prompt[position]].item())
        assert [t for _, t in entry.top] == torch.topk(raw_TV[position - 1], 2).indices.tolist()
    parts = prompt_logprobs(sampler, logits_TV[:2], 1, 1)
    parts += prompt_logprobs(sampler, logits_TV[2:], 1, 3)
    assert parts == whole


def test_prompt_logprobs_from_a_later_position_have_no_leading_entry():
    sampler = make_sampler()
    sampler.start(start(1, prompt=(7, 8, 9), top=0, logprob_start=1))
    entries = prompt_logprobs(sampler, random_logits(2), 1, 1)
    assert [entry.token_id for entry in entries] == [8, 9]


def test_prompt_logprobs_of_a_prompt_of_one_token():
    sampler = make_sampler()
    sampler.start(start(1, prompt=(7,), top=0, logprob_start=0))
    (entry,) = prompt_logprobs(sampler, random_logits(0), 1, 1)
    assert (entry.logprob, entry.token_id, entry.top) == (None, 7, [])


def test_prompt_logprobs_outside_the_prompt_are_refused():
    sampler = make_sampler()
    sampler.start(start(1, prompt=(7, 8), logprob_start=0))
    for first, rows in [(0, 1), (1, 2), (2, 1)]:
        with pytest.raises(ValueError, match="positions"):
            prompt_logprobs(sampler, random_logits(rows), 1, first)


def test_prompt_logprobs_of_odd_logits_stay_valid_json():
    logits_TV = torch.zeros(2, VOCAB)
    logits_TV[0, 8] = -torch.inf
    logits_TV[1, 0] = math.nan
    sampler = make_sampler()
    sampler.start(start(1, prompt=(7, 8, 9), top=1, logprob_start=1))
    lowest, missing = prompt_logprobs(sampler, logits_TV, 1, 1)
    assert lowest.logprob is not None
    assert math.isfinite(lowest.logprob)
    assert lowest.logprob < -1e30
    assert missing.logprob is None
    assert all(not math.isnan(value) for value, _ in missing.top)


def test_prompt_logprobs_in_blocks_of_rows(monkeypatch):
    monkeypatch.setattr("lorikeet.worker.sampling.sampler._BLOCK_ELEMENTS", 3 * VOCAB)
    prompt = tuple(range(10, 21))
    logits_TV = random_logits(10, seed=3)
    sampler = make_sampler()
    sampler.start(start(1, prompt=prompt, top=0, logprob_start=1))
    raw_TV = torch.log_softmax(logits_TV, dim=-1)
    found = prompt_logprobs(sampler, logits_TV, 1, 1)
    assert [e.logprob for e in found] == pytest.approx(
        [raw_TV[i, prompt[i + 1]].item() for i in range(10)]
    )


# --- cost ---


@pytest.mark.parametrize(
    ("params", "unused"),
    [
        (
            {"temperature": 0.0},
            [
                (Sampler, "_by_rules"),
                (Sampler, "_choose"),
                (Sampler, "_draw"),
                (LogitRules, "filter_"),
            ],
        ),
        (
            {"temperature": 0.0, "logit_bias": {1: 1.0}},
            [
                (Sampler, "_draw"),
                (LogitRules, "_penalise_counts_"),
                (LogitRules, "_ban_stops_"),
            ],
        ),
    ],
)
def test_features_that_nobody_uses_are_not_computed(monkeypatch, params, unused):
    def fail(*_):
        raise AssertionError("an unused feature was computed")

    for owner, name in unused:
        monkeypatch.setattr(owner, name, fail)
    monkeypatch.setattr("lorikeet.ops.sampling.token_logprobs", fail)
    sampler = make_sampler()
    sampler.start(start(1, **params))
    assert sample(sampler, random_logits(1), [1])[0].error is None


def test_importing_the_sampler_does_not_import_the_grammar_libraries():
    code = (
        "import sys, lorikeet.worker.sampling.sampler\n"
        "loaded = {'xgrammar', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "print(sorted(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
