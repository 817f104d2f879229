"""Whole models against PEFT: every supported configuration, in mixed batches with the base, over four families."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.lora_runner import LoRARunner
from tests.support.peft_adapters import (
    LINEAR,
    edit_config,
    make_adapter,
    peft_generate,
    peft_logits,
)
from tests.support.tiny_models import FAMILIES, make_tiny_model

LOGITS, LOGPROBS = 1e-4, 2e-3

# Every supported kind of configuration; a batch holds all of them and the base.
KINDS: dict[str, dict[str, Any]] = {
    "q and v": {"r": 8, "alpha": 16},
    "all linear": {"r": 16, "alpha": 32, "targets": "all-linear"},
    "rank 64": {"r": 64, "alpha": 64, "targets": list(LINEAR)},
    "odd rank, k and up": {"r": 5, "alpha": 3, "targets": ["k_proj", "up_proj"]},
    "rslora": {"r": 17, "alpha": 4, "use_rslora": True, "targets": ["o_proj", "gate_proj"]},
    "patterns": {
        "r": 4,
        "targets": ["q_proj", "k_proj", "v_proj", "down_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 33, "down_proj": 1},
        "alpha_pattern": {"v_proj": 40, r"layers\.0\.mlp\.down_proj": 2},
        "use_rslora": True,
    },
    "regex": {"r": 3, "targets": r".*layers\.1\.(self_attn\.v|mlp\.gate)_proj"},
    "exclude": {"r": 8, "targets": list(LINEAR), "exclude_modules": ["k_proj", "mlp.up_proj"]},
    "exclude by regex": {"r": 8, "targets": list(LINEAR), "exclude_modules": r".*layers\.0.*"},
    "one layer": {"r": 8, "targets": list(LINEAR), "layers_to_transform": [1]},
    "fan_in_fan_out, dropout": {"r": 8, "fan_in_fan_out": True, "lora_dropout": 0.5},
    "bf16": {"r": 8, "targets": list(LINEAR), "dtype": torch.bfloat16},
    "fp16": {"r": 8, "targets": list(LINEAR), "dtype": torch.float16},
    "embedding": {"r": 6, "targets": ["embed_tokens"]},
    "head": {"r": 20, "targets": ["lm_head"]},
    "everything": {"r": 10, "targets": [*LINEAR, "embed_tokens", "lm_head"]},
    "negative alpha": {"r": 4, "alpha": -8, "targets": ["q_proj", "down_proj"]},
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "llama-tied": {"tie_word_embeddings": True},
}


@pytest.fixture(scope="module", params=list(MODELS))
def world(request, tmp_path_factory) -> tuple[Path, dict[str, Path], LoRARunner]:
    """A model, an adapter of each kind, and a runner with all of them resident."""
    path = tmp_path_factory.mktemp("world")
    model = make_tiny_model(path, request.param.split("-")[0], **MODELS[request.param])
    adapters = {
        kind: make_adapter(model, path / f"adapter{number}", seed=number, **fields)
        for number, (kind, fields) in enumerate(KINDS.items())
    }
    return model, adapters, LoRARunner(model, adapters)


def _prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(320) for _ in range(length)]


def _oracle(model: Path, adapter: Path | None, tokens: list[int]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft_logits(model, adapter, tokens)


def _check(name: str, actual_TV: torch.Tensor, expected_TV: torch.Tensor) -> None:
    logits = (actual_TV - expected_TV).abs().max()
    logprobs = (actual_TV.log_softmax(-1) - expected_TV.log_softmax(-1)).abs().max()
    assert logits <= LOGITS, f"{name}: logits differ by {logits:.2e}"
    assert logprobs <= LOGPROBS, f"{name}: log-probabilities differ by {logprobs:.2e}"


def test_one_batch_of_every_kind_and_the_base_equals_peft(world):
    model, adapters, runner = world
    names = [None, *adapters, None]
    prompts = {seq: _prompt(seq, 5 + seq % 7) for seq in range(100, 100 + len(names))}
    adapter_of = dict(zip(prompts, names, strict=True))
    logits_TV = runner.step(prompts, adapter_of)
    start = 0
    for seq, name in adapter_of.items():
        rows_TV = logits_TV[start : start + len(prompts[seq])]
        start += len(prompts[seq])
        expected_TV = _oracle(model, adapters[name] if name else None, prompts[seq])
        _check(str(name), rows_TV, expected_TV)
        if name:  # an adapter that hardly changes anything would prove nothing
            assert (expected_TV - _oracle(model, None, prompts[seq])).abs().max() > 0.1, name
    assert start == len(logits_TV)


def test_decoding_in_mixed_batches_equals_peft(world):
    """Prompts in two chunks, then greedy steps; rows of one adapter lie apart from each other."""
    model, adapters, runner = world
    names = ["everything", None, "rslora", "everything", "rank 64", "rslora", None, "everything"]
    prompts = {seq: _prompt(seq, 6 + seq % 3) for seq in range(200, 200 + len(names))}
    adapter_of = dict(zip(prompts, names, strict=True))
    runner.step({seq: tokens[:4] for seq, tokens in prompts.items()}, adapter_of, rows=[0])
    parts = {seq: tokens[4:] for seq, tokens in prompts.items()}
    answers: dict[int, list[int]] = {seq: [] for seq in prompts}
    logprobs: dict[int, list[float]] = {seq: [] for seq in prompts}
    for _ in range(4):
        ends = torch.tensor([len(tokens) for tokens in parts.values()]).cumsum(0) - 1
        logits_NV = runner.step(parts, adapter_of, rows=ends.tolist())
        for seq, row_V in zip(parts, logits_NV.log_softmax(-1), strict=True):
            answers[seq].append(int(row_V.argmax()))
            logprobs[seq].append(float(row_V.max()))
        parts = {seq: tokens[-1:] for seq, tokens in answers.items()}
    for seq, name in adapter_of.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = peft_generate(
                model, adapters[name] if name else None, prompts[seq], max_new_tokens=4
            )
        assert answers[seq] == expected[0], name
        assert logprobs[seq] == pytest.approx(expected[1], abs=LOGPROBS), name


def test_a_result_does_not_depend_on_the_company(world):
    _, adapters, runner = world
    tokens = _prompt(1, 9)
    alone_TV = runner.step({300: tokens}, {300: "all linear"})
    others = {seq: _prompt(seq, 3) for seq in range(310, 310 + len(adapters))}
    adapter_of = {300: "all linear", **dict(zip(others, adapters, strict=True))}
    mixed_TV = runner.step({301: tokens, **others}, {**adapter_of, 301: "all linear"})[:9]
    assert (mixed_TV - alone_TV).abs().max() <= 2e-5
    base_TV = runner.step({302: tokens}, {})
    mixed_TV = runner.step(
        {303: tokens, **{seq + 100: t for seq, t in others.items()}},
        {seq + 100: name for seq, name in zip(others, adapters, strict=True)},
    )[:9]
    assert (mixed_TV - base_TV).abs().max() <= 2e-5


def test_base_only_batches_have_no_lora_work(world):
    runner = world[2]
    assert runner.lora([0, 0], [3, 1], [2, 3]) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_that_come_and_go_leave_nothing_behind(family, tmp_path):
    """Slots and pages are used again by adapters of other ranks and modules."""
    model = make_tiny_model(tmp_path, family)
    fields: list[dict[str, Any]] = [
        {"r": 40, "targets": list(LINEAR)},
        {"r": 3, "targets": ["v_proj"]},
        {"r": 18, "targets": ["down_proj", "k_proj", "lm_head"]},
        {"r": 64, "targets": list(LINEAR)},
    ]
    adapters = [
        make_adapter(model, tmp_path / str(n), seed=n, **given) for n, given in enumerate(fields)
    ]
    runner = LoRARunner(model, {}, max_loras_per_batch=2)
    tokens, rng, seq = _prompt(5, 7), random.Random(0), 0
    for _ in range(12):
        for name in list(runner.adapters.slots):
            if name is not None and rng.random() < 0.5:
                runner.adapters.evict(name)
        absent = [n for n in range(4) if str(n) not in runner.adapters.slots]
        if len(absent) > 2:
            number = rng.choice(absent)
            runner.adapters.add(str(number), runner.load(str(number), adapters[number]))
        adapter_of = {seq + n: name for n, name in enumerate(runner.adapters.slots)}
        logits_TV = runner.step(dict.fromkeys(adapter_of, tokens), adapter_of)
        runner.adapters.pool.check_integrity()
        for rows_TV, name in zip(logits_TV.split(len(tokens)), adapter_of.values(), strict=True):
            _check(
                str(name), rows_TV, _oracle(model, adapters[int(name)] if name else None, tokens)
            )
        seq += len(adapter_of)


def test_bfloat16_stays_near_peft_in_float32(tmp_path):
    """The model's own rounding is all that differs: base and adapter rows err alike."""
    model = make_tiny_model(tmp_path, "llama")
    adapter = make_adapter(model, tmp_path / "a", targets=list(LINEAR))
    runner = LoRARunner(model, {"a": adapter}, dtype=torch.bfloat16)
    tokens = _prompt(3, 20)
    base_TV, lora_TV = runner.step({0: tokens, 1: tokens}, {1: "a"}).split(20)
    base_error = (base_TV - _oracle(model, None, tokens)).square().mean().sqrt()
    lora_error = (lora_TV - _oracle(model, adapter, tokens)).square().mean().sqrt()
    assert lora_error <= 2.5 * base_error


def test_what_the_configuration_says_is_what_counts(tmp_path):
    """The same weights under another alpha: PEFT and the runner change alike."""
    model = make_tiny_model(tmp_path, "llama")
    adapter = make_adapter(model, tmp_path / "a", r=8, alpha=16)
    edit_config(adapter, lora_alpha=5, use_rslora=True, alpha_pattern={"v_proj": 1.5})
    tokens = _prompt(4, 11)
    logits_TV = LoRARunner(model, {"a": adapter}).step({0: tokens}, {0: "a"})
    _check("a", logits_TV, _oracle(model, adapter, tokens))
