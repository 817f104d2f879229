"""The whole engine on a GPU: the same tokens as on a CPU and as transformers', however a step is run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorikeet import LLM
from lorikeet.errors import ConfigError
from tests.support.failing_steps import fail_attention, fail_steps, first
from tests.support.peft_adapters import make_adapter
from tests.support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

NEW_TOKENS = 12
# Longer than a page, than a chunk of the runs with small chunks, and with a prefix in common.
SHARED = [7 + 3 * i % 200 for i in range(40)]
PROMPTS = [[*SHARED, i, 2 * i + 1] for i in range(5)] + [[5], [9, 8, 7], SHARED[:17]]
GREEDY = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
SWITCHES: dict[str, dict[str, Any]] = {
    "everything-on": {},
    "no-overlap": {"disable_overlap_schedule": True},
    "no-graphs": {"disable_cuda_graph": True},
    "no-graphs-of-prompts": {"disable_piecewise_cuda_graph": True},
    "no-radix": {"disable_radix_cache": True},
    "chunked": {"chunked_prefill_size": 16},
    "few-rows": {"max_running_requests": 3},
    "everything-off": {
        "disable_overlap_schedule": True,
        "disable_cuda_graph": True,
        "disable_radix_cache": True,
    },
}


def engine(path: Path, **options: Any) -> LLM:
    small = {
        "max_total_tokens": 4096,
        "max_running_requests": 8,
        "cuda_graph_bs": (1, 2, 4, 8),
        "piecewise_cuda_graph_max_tokens": 256,
    }
    return LLM(str(path), **({"device": "cuda", "dtype": "float32"} | small | options))


def tokens_of(llm: LLM, sampling: dict[str, Any] | None = None, **options: Any) -> list[list[int]]:
    replies = llm.generate(input_ids=PROMPTS, sampling_params=sampling or GREEDY, **options)
    return [reply["output_ids"] for reply in replies]


def of_transformers(path: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(path).to(torch.float32)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_float32_tokens_are_those_of_the_cpu_and_of_transformers(
    tmp_path: Path, family: str
) -> None:
    path = make_tiny_model(tmp_path, family)
    wanted = of_transformers(path)
    with engine(path, device="cpu") as llm:
        assert tokens_of(llm) == wanted
    for options in SWITCHES.values():
        with engine(path, dtype="float32", **options) as llm:
            assert llm.info["attention_backend"] == "sdpa"
            assert tokens_of(llm) == wanted, options
            assert tokens_of(llm) == wanted, f"{options}, from the prefix cache"


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [("bfloat16", 64), ("bfloat16", 80), ("bfloat16", 128), ("float16", 128)],
)
def test_narrow_tokens_do_not_depend_on_how_steps_are_run(
    tmp_path: Path, head_dim: int, dtype: str
) -> None:
    path = make_tiny_model(tmp_path, "qwen3", head_dim=head_dim, num_key_value_heads=1)
    wanted = None
    switches = SWITCHES if head_dim == 64 else {"on": {}, "off": SWITCHES["everything-off"]}
    for name, options in switches.items():
        with engine(path, dtype=dtype, **options) as llm:
            assert llm.info["attention_backend"] == "flashinfer"
            got = tokens_of(llm)
        wanted = wanted or got
        # Rounding in another order may turn a near tie: rarely, and then a sequence goes its own way from there on.
        same = sum(a == b for a, b in zip(got, wanted, strict=True))
        assert same >= len(wanted) - 2, f"{name}: {got} against {wanted}"


def test_sliding_windows(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, "mistral", sliding_window=24, num_key_value_heads=1)
    wanted = of_transformers(path)
    for options in (SWITCHES["everything-on"], SWITCHES["everything-off"], SWITCHES["chunked"]):
        with engine(path, dtype="float32", **options) as llm:
            assert tokens_of(llm) == wanted
    results = []
    for options in (SWITCHES["everything-on"], SWITCHES["everything-off"]):
        with engine(path, dtype="bfloat16", **options) as llm:
            results.append(tokens_of(llm))
    same = sum(a == b for a, b in zip(*results, strict=True))
    assert same >= len(PROMPTS) - 2


def test_few_rows_with_many_keys(tmp_path: Path) -> None:
    """Beyond the lengths that our own decode kernel serves; generated across that edge, too."""
    path = make_tiny_model(tmp_path, head_dim=128, max_position_embeddings=2048)
    prompts = [[1 + i % 300 for i in range(length)] for length in (250, 700, 1100)]
    found = []
    for options in (SWITCHES["everything-on"], SWITCHES["everything-off"]):
        with engine(path, dtype="bfloat16", **options) as llm:
            replies = llm.generate(input_ids=prompts, sampling_params=GREEDY)
        found.append([reply["output_ids"] for reply in replies])
    assert sum(a == b for a, b in zip(*found, strict=True)) >= 2


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.8},
        {"temperature": 0.8, "top_p": 0.8, "top_k": 20},
        {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.3},
        {"temperature": 0.0, "frequency_penalty": 0.9, "presence_penalty": 0.3},
        {"temperature": 0.0, "logit_bias": {"17": 4.0}, "min_new_tokens": 4},
        {"temperature": 0.7, "regex": "[a-f]{4,9}"},
    ],
)
def test_sampling_is_that_of_the_cpu(tmp_path: Path, sampling: dict[str, Any]) -> None:
    path = make_tiny_model(tmp_path)
    params = sampling | {"max_new_tokens": NEW_TOKENS, "sampling_seed": 11}
    with engine(path, device="cpu") as llm:
        wanted = tokens_of(llm, params)
    for options in (SWITCHES["everything-on"], SWITCHES["everything-off"]):
        with engine(path, dtype="float32", **options) as llm:
            assert tokens_of(llm, params) == wanted


def test_logprobs_are_those_of_the_cpu(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path)
    asked = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 3}
    with engine(path, device="cpu") as cpu, engine(path, dtype="float32") as gpu:
        replies = [
            llm.generate(input_ids=PROMPTS, sampling_params=GREEDY, **asked) for llm in (cpu, gpu)
        ]
    for wanted, got in zip(*replies, strict=True):
        for key in ("input_token_logprobs", "output_token_logprobs"):
            pairs = zip(wanted["meta_info"][key], got["meta_info"][key], strict=True)
            for (value, token, _), (other, same, _) in pairs:
                assert token == same
                assert (value is None) == (other is None)
                assert value is None or abs(value - other) < 1e-3


def test_adapters_beside_the_base(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path)
    adapters = {
        f"a{seed}": str(make_adapter(path, tmp_path / f"a{seed}", seed=seed)) for seed in (1, 2)
    }
    names = [None, "a1", "a2", "a1", None, "a2", "a1", None]
    found = []
    for device in ("cpu", "cuda"):
        with engine(path, device=device, dtype="float32", lora_paths=adapters) as llm:
            found.append((tokens_of(llm, lora_path=names), tokens_of(llm)))
    assert found[0] == found[1]
    assert found[0][0] != found[0][1], "the adapters change something"


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_vectors_are_those_of_the_cpu(tmp_path: Path, kind: Any) -> None:
    path = make_tiny_model(tmp_path)
    adapters = {
        f"a{seed}": str(make_adapter(path, tmp_path / f"a{seed}", seed=seed)) for seed in (1, 2)
    }
    names = [None, "a1", "a2", "a1", None, "a2", "a1", None]
    asked = {"input_ids": PROMPTS, "lora_path": names, "pooling": kind}
    with engine(path, device="cpu", lora_paths=adapters) as llm:
        wanted = torch.tensor(llm.embed(**asked))
    for options in SWITCHES.values():
        with engine(path, lora_paths=adapters, **options) as llm:
            for _ in range(2):  # the second time with what the first has cached
                got = torch.tensor(llm.embed(**asked))
                assert (got - wanted).abs().max() < 1e-4, options
    with engine(path, dtype="bfloat16", lora_paths=adapters) as llm:
        got = torch.tensor(llm.embed(**asked))
    assert (got * wanted).sum(-1).min() > 0.99, "vectors of length 1 with the same direction"


def test_a_prefix_is_found_again(tmp_path: Path) -> None:
    with engine(make_tiny_model(tmp_path)) as llm:
        first = llm.generate(input_ids=SHARED, sampling_params=GREEDY)
        again = llm.generate(input_ids=SHARED, sampling_params=GREEDY)
    assert again["meta_info"]["cached_tokens"] >= 32
    assert again["output_ids"] == first["output_ids"]


def test_too_little_memory_is_refused_at_start(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path)
    with pytest.raises(ConfigError, match=r"--mem-fraction-static 0.9999.* allowed: at most"):
        engine(path, mem_fraction_static=0.9999, max_total_tokens=None)
    with pytest.raises(ConfigError, match=r"weights need .* K/V for \d+ tokens"):
        engine(path, max_total_tokens=10**12)


@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize("failures", [1, 2])
def test_an_allocation_that_fails(
    tmp_path: Path, monkeypatch, failures: int, is_captured: bool
) -> None:
    """Once: the step is repeated. Twice: its largest prompt is aborted, and everything else goes on. In a captured step it
    is attention that fails, between two graphs."""
    path = make_tiny_model(tmp_path)
    with engine(path, disable_piecewise_cuda_graph=not is_captured) as llm:
        wanted = tokens_of(llm)
        llm.flush_cache()
        too_much = partial(torch.empty, 2**60, device="cuda")
        if is_captured:
            fail_attention(llm, monkeypatch, too_much, first(failures))
        else:
            fail_steps(llm, monkeypatch, too_much, first(failures))
        if failures == 1:
            assert tokens_of(llm) == wanted
        else:
            replies = llm.generate(input_ids=PROMPTS, sampling_params=GREEDY)
            reasons = [reply["meta_info"]["finish_reason"] for reply in replies]
            (lost,) = [row for row, reason in enumerate(reasons) if reason["type"] == "abort"]
            assert lost == 0, "the largest: it computes the prefix that the others share"
            assert "no memory for a step" in reasons[lost]["message"]
            found = [reply["output_ids"] for reply in replies]
            assert found[:lost] + found[lost + 1 :] == wanted[:lost] + wanted[lost + 1 :]
        assert tokens_of(llm) == wanted
        llm._core.check_integrity()


def test_log_probabilities_of_a_long_prompt_need_little_memory(tmp_path: Path) -> None:
    """Of all 8,191 positions at once they would take 4 GiB of float32; and the row beside them goes on."""
    path = make_tiny_model(tmp_path, vocab_size=131_072, max_position_embeddings=16_384)
    options = {"max_total_tokens": 16_384, "context_length": 8_256, "chunked_prefill_size": 8_192}
    with engine(path, dtype="bfloat16", **options) as llm:
        prompts = [[5 + i % 1_000 for i in range(8_192)], [9, 8, 7]]
        sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
        wanted = llm.generate(input_ids=prompts[1], sampling_params=sampling)["output_ids"]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        long, short = llm.generate(
            input_ids=prompts,
            sampling_params=sampling,
            return_logprob=[True, False],
            logprob_start_len=[0, -1],
        )
        assert torch.cuda.max_memory_allocated() - before < 2**29
        assert len(long["meta_info"]["input_token_logprobs"]) == 8_192
        assert short["output_ids"] == wanted
