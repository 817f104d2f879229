"""Logits against transformers, over families, configs and ways to feed the same tokens."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorikeet.models.decoder import Decoder
from tests.support.paged import PagedRunner, load_model
from tests.support.tiny_models import make_tiny_model

TOLERANCE = 1e-4
LENGTHS = (37, 1, 18, 53)


def rope(kind: str, **values: object) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1, "head_dim": 24}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama-llama3": ("llama", LLAMA3),
    "llama-linear": ("llama", rope("linear", factor=4.0)),
    "llama-dynamic": ("llama", rope("dynamic", factor=2.0)),
    "llama-yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama-yarn-options": (
        "llama",
        rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=64,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
            mscale=1.5,
            mscale_all_dim=0.5,
        ),
    ),
    "mistral": ("mistral", {}),
    "mistral-window-small": ("mistral", {"sliding_window": 8}),
    "mistral-window-one": ("mistral", {"sliding_window": 1}),
    "mistral-window-large": ("mistral", {"sliding_window": 200, "head_dim": 32}),
    "qwen2": ("qwen2", {"hidden_size": 48, "head_dim": 12}),
    "qwen2-tied-mha": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2-window": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
        },
    ),
    "qwen2-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen2-yarn": ("qwen2", rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-bias": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
}


def reference(path: Path) -> Any:
    """transformers' own model, in plain attention."""
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def token_lists(vocab_size: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]


class Case:
    """A checkpoint, our model, token lists and transformers' logits of each list in one pass."""

    def __init__(self, path: Path) -> None:
        self.model: Decoder = load_model(path)
        self.tokens = token_lists(self.model.spec.vocab_size)
        oracle = reference(path)
        with torch.inference_mode():
            self.wanted = [oracle(torch.tensor([ids])).logits[0] for ids in self.tokens]


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(name: str) -> Case:
        family, overrides = CONFIGS[name]
        return Case(make_tiny_model(tmp_path_factory.mktemp("models"), family, **overrides))

    return make


def assert_close(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(ours, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_pass(case_of: Any, name: str) -> None:
    case = case_of(name)
    assert_close(PagedRunner(case.model).step({0: case.tokens[3]}), case.wanted[3])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [2, 7])
def test_in_chunks(case_of: Any, name: str, size: int) -> None:
    case = case_of(name)
    runner, ids = PagedRunner(case.model), case.tokens[0]
    parts = [runner.step({0: ids[i : i + size]}) for i in range(0, len(ids), size)]
    assert_close(torch.cat(parts), case.wanted[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_decode_from_scattered_pages(case_of: Any, name: str) -> None:
    case = case_of(name)
    runner, ids = PagedRunner(case.model, seed=3), case.tokens[0]
    parts = [runner.step({0: ids[:5]})]
    parts += [runner.step({0: [token]}) for token in ids[5:]]
    assert_close(torch.cat(parts), case.wanted[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_mixed_batches(case_of: Any, name: str) -> None:
    """Prompt chunks and decode rows of sequences of different lengths share each step, in changing order."""
    case = case_of(name)
    runner, draw = PagedRunner(case.model, seed=5), random.Random(11)
    got: dict[int, list[torch.Tensor]] = {seq: [] for seq in range(len(case.tokens))}
    done = dict.fromkeys(got, 0)
    while open_seqs := [seq for seq in got if done[seq] < len(case.tokens[seq])]:
        draw.shuffle(open_seqs)
        parts = {
            seq: case.tokens[seq][done[seq] : done[seq] + draw.choice([1, 1, 4, 9])]
            for seq in open_seqs
        }
        logits = runner.step(parts)
        for seq, rows in zip(parts, logits.split([len(p) for p in parts.values()]), strict=True):
            got[seq].append(rows)
            done[seq] += len(parts[seq])
    for seq, wanted in enumerate(case.wanted):
        assert_close(torch.cat(got[seq]), wanted)


def test_decode_rows_of_very_different_lengths(tmp_path: Path) -> None:
    """Lengths far enough apart that the backend batches them separately."""
    path = make_tiny_model(tmp_path, num_hidden_layers=1, max_position_embeddings=1024)
    model, oracle = load_model(path), reference(path)
    tokens = token_lists(model.spec.vocab_size, (700, 3, 280, 40))
    runner = PagedRunner(model, num_pages=300)
    runner.step({seq: ids[:-1] for seq, ids in enumerate(tokens)})
    logits = runner.step({seq: ids[-1:] for seq, ids in enumerate(tokens)})
    with torch.inference_mode():
        wanted = [oracle(torch.tensor([ids])).logits[0, -1] for ids in tokens]
    assert_close(logits, torch.stack(wanted))


def test_only_the_wanted_rows_in_their_order(tmp_path: Path) -> None:
    model = load_model(make_tiny_model(tmp_path))
    (ids,) = token_lists(model.spec.vocab_size, (9,))
    everything = PagedRunner(model).step({0: ids})
    some = PagedRunner(model).step({0: ids}, rows=[8, 2, 2])
    assert_close(some, everything[[8, 2, 2]])


def test_past_the_last_attention_only_wanted_rows_are_computed(tmp_path: Path) -> None:
    model = load_model(make_tiny_model(tmp_path))
    seen: list[int] = []
    for layer in model.layers:
        layer.get_submodule("mlp").register_forward_pre_hook(
            lambda _, operands: seen.append(len(operands[0]))
        )
    logits = PagedRunner(model).step({0: [5, 6, 7, 8], 1: [9, 4]}, rows=[3, 5])
    assert (seen, len(logits)) == ([6, 2], 2)
    assert len(PagedRunner(model).step({0: [5, 6, 7]}, rows=[])) == 0


def test_states_of_other_rows_beside_logits(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, "llama")
    ids = [7, 311, 4, 90, 256]
    runner = PagedRunner(load_model(path))
    batch = runner.batch({0: ids}, rows=[4, 0])
    rows = torch.tensor([1, 4, 3])
    with torch.inference_mode():
        logits, states = runner.model.forward_pooled(replace(batch, pooled_rows_P=rows))
        wanted = reference(path).model(torch.tensor([ids])).last_hidden_state[0]
    assert_close(states, wanted[rows])
    assert_close(logits, PagedRunner(load_model(path)).step({0: ids}, rows=[4, 0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_narrow_dtypes(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """A float32 checkpoint computed in a narrow type stays near float32; logits come out as they were computed."""
    path = make_tiny_model(tmp_path, family)
    exact, narrow = load_model(path), load_model(path, dtype=dtype)
    (ids,) = token_lists(exact.spec.vocab_size, (30,))
    wanted = PagedRunner(exact).step({0: ids})
    runner = PagedRunner(narrow)
    got = torch.cat([runner.step({0: ids[:20]}), *(runner.step({0: [i]}) for i in ids[20:])])
    assert got.dtype == dtype
    relative = (got.float() - wanted).norm() / wanted.norm()
    assert relative < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_weights_have_no_gradients_and_the_model_is_in_eval_mode(tmp_path: Path) -> None:
    model = load_model(make_tiny_model(tmp_path))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
