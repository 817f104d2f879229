"""When an engine has started on a GPU, no request waits for a compiler: every kernel that a step may launch is there."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lorikeet import LLM
from lorikeet.ops.triton.launcher import Launcher
from tests.e2e.conftest import KINDS
from tests.support.peft_adapters import make_adapter
from tests.support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

CONTEXT = 768
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 30},
    {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.2},
]


def launchers() -> dict[str, Launcher]:
    """Every kernel that was declared so far, by module and name."""
    return {
        f"{module_name}.{name}": value
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("lorikeet.")
        for name, value in vars(module).items()
        if isinstance(value, Launcher)
    }


def compiled() -> set[tuple[object, ...]]:
    return {(name, *key) for name, each in launchers().items() for key in each._kernels}


def serve(llm: LLM, adapters: Sequence[str | None]) -> None:
    """Prompts and rows that decode, in all proportions: as some end, others begin."""
    chance = random.Random(3)
    for count in (1, 2, 5, 40, 120):
        prompts = [
            [chance.randrange(256) for _ in range(chance.choice((1, 7, 40, 100, 300, 700)))]
            for _ in range(count)
        ]
        params = [
            chance.choice(SAMPLING)
            | {"max_new_tokens": chance.choice((1, 3, 20, 50)), "ignore_eos": True}
            for _ in range(count)
        ]
        names = [chance.choice(adapters) for _ in range(count)]
        llm.generate(input_ids=prompts, sampling_params=params, lora_path=names)
    llm.generate(
        input_ids=[[1, 2, 3], [5] * 40],
        sampling_params={"temperature": 0, "max_new_tokens": 3},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=3,
    )
    llm.embed(input_ids=[[1, 2, 3], [4, 5]], pooling="mean")


@pytest.mark.parametrize("vocab_size", [320, 331], ids=["aligned", "odd"])
@pytest.mark.parametrize("backend", [None, "csgmv", "triton"])
def test_no_request_waits_for_a_compiler(
    tmp_path: Path, backend: str | None, vocab_size: int
) -> None:
    path = make_tiny_model(
        tmp_path, vocab_size=vocab_size, max_position_embeddings=CONTEXT, head_dim=64
    )
    options: dict[str, Any] = {}
    names: list[str | None] = [None]
    if backend is not None:
        names += ["qv", "all", "head"]
        options["lora_backend"] = backend
        options["lora_paths"] = {
            name: str(make_adapter(path, tmp_path / name, **KINDS[name])) for name in names if name
        }
    for each in launchers().values():
        each._kernels.clear()
    with LLM(
        str(path),
        device="cuda",
        dtype="bfloat16",
        max_total_tokens=2**16,
        max_running_requests=64,
        piecewise_cuda_graph_max_tokens=512,
        **options,
    ) as llm:
        before = compiled()
        assert before, "start-up runs every kind of step"
        serve(llm, names)
        late = compiled() - before
    assert not late
