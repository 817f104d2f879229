"""A step that is submitted before the one ahead of it is read changes no token. On a CPU; tests/e2e/test_gpu.py does the
same on a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lorikeet import LLM
from tests.support.failing_steps import fail_steps, first, worker_of
from tests.support.tiny_models import make_tiny_model

SHARED = [7 + 3 * i % 200 for i in range(40)]
PROMPTS = [[*SHARED, i, 2 * i + 1] for i in range(4)] + [[5], [9, 8, 7], SHARED[:17]]
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8},
    {"temperature": 0.9, "top_p": 0.8, "top_k": 30},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 0.7, "regex": "[a-f]{4,9}"},
    {"temperature": 0, "min_new_tokens": 3, "logit_bias": {"17": 4.0}},
    {"temperature": 1.0, "presence_penalty": 0.4, "min_p": 0.05},
]
COMMON = {"max_new_tokens": 11, "sampling_seed": 3}


def engine(path: Path, *, overlap: bool = True, **options: Any) -> LLM:
    llm = LLM(str(path), **({"device": "cpu", "max_total_tokens": 2048} | options))
    # A CPU gains nothing by it and does not do it by itself.
    worker_of(llm).max_ahead = int(overlap)
    return llm


def no_memory() -> None:
    raise torch.OutOfMemoryError("no memory, says the test")


def replies(llm: LLM) -> list[Any]:
    found = llm.generate(
        input_ids=PROMPTS,
        sampling_params=[COMMON | params for params in PARAMS],
        return_logprob=True,
        logprob_start_len=0,
    )
    kept = ("output_token_logprobs", "input_token_logprobs")
    return [
        (r["output_ids"], r["meta_info"]["finish_reason"], *(r["meta_info"][key] for key in kept))
        for r in found
    ]


def assert_same(got: list[Any], wanted: list[Any]) -> None:
    """Equal tokens; log-probabilities up to rounding, which depends on who shares the batch."""
    for (tokens, reason, *logprobs), (right, why, *values) in zip(got, wanted, strict=True):
        assert (tokens, reason) == (right, why)
        for entries, others in zip(logprobs, values, strict=True):
            assert [entry[1] for entry in entries] == [other[1] for other in others]
            found = [entry[0] for entry in entries]
            assert found == [other[0] and pytest.approx(other[0], abs=1e-4) for other in others]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"disable_radix_cache": True},
        {"chunked_prefill_size": 16},
        {"max_running_requests": 2},
        {"max_total_tokens": 192, "context_length": 96},  # preemptions
    ],
    ids=str,
)
def test_overlap_changes_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    path = make_tiny_model(tmp_path)
    with engine(path, overlap=False) as llm:
        wanted = replies(llm)
    for overlap in (True, False):
        with engine(path, overlap=overlap, **options) as llm:
            assert_same(replies(llm), wanted)
            llm._core.check_integrity()


@pytest.mark.parametrize("failures", [1, 2])
def test_an_allocation_that_fails(tmp_path: Path, monkeypatch, failures: int) -> None:
    """Once: the step is repeated. Twice: its largest prompt is aborted with an error, and everything else goes on."""
    with engine(make_tiny_model(tmp_path)) as llm:
        wanted = replies(llm)
        llm.flush_cache()
        fail_steps(llm, monkeypatch, no_memory, first(failures))
        if failures == 1:
            assert_same(replies(llm), wanted)
        else:
            found = replies(llm)
            lost = [row for row, reply in enumerate(found) if reply[1]["type"] == "abort"]
            assert lost == [3], "the youngest of the largest"
            reason = found.pop(3)[1]
            assert reason["status_code"] == 500
            assert re.search(r"no memory for a step of .* says the test", reason["message"])
            assert_same(found, wanted[:3] + wanted[4:])
        assert_same(replies(llm), wanted)
        llm._core.check_integrity()


def test_running_requests_outlive_a_prompt_without_memory(tmp_path: Path, monkeypatch) -> None:
    """The prompt is aborted; whoever decodes beside it goes on, with the same tokens."""
    path = make_tiny_model(tmp_path)
    with engine(path) as llm:
        core = llm._core
        params = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
        wanted = llm.generate(input_ids=[9, 8, 7], sampling_params=params)["output_ids"]
        (older,) = llm._intake.make_requests(
            {"input_ids": [9, 8, 7], "sampling_params": params}
        ).requests
        (newer,) = llm._intake.make_requests(
            {"input_ids": SHARED, "sampling_params": params}
        ).requests

        def has_both(batch: Any) -> bool:
            return bool(batch.attn.num_chunks and batch.attn.query_starts[-1] > len(SHARED))

        fail_steps(llm, monkeypatch, no_memory, has_both)
        first = core.submit(older)
        outputs = [output for _ in range(5) for output in core.step()]
        second = core.submit(newer)
        while not core.is_idle:
            outputs += core.step()
        tokens = [token for o in outputs if o.id == first for token in o.token_ids]
        assert tokens == wanted
        (end,) = [o.finish for o in outputs if o.id == second and o.finish]
        assert (end.kind, end.status_code) == ("abort", 500)
        core.check_integrity()
