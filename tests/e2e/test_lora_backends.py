"""The kernels of ``--lora-backend`` in the whole engine against PEFT: by Triton's interpreter, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lorikeet import LLM
from tests.e2e.conftest import KINDS, World
from tests.e2e.test_parity import GREEDY, check, prompts

BACKENDS = ["triton", "csgmv"]


def run(llm: LLM, world: World, names: list[str | None]) -> None:
    ids = prompts(len(names))
    replies = llm.generate(
        input_ids=ids, sampling_params=GREEDY, lora_path=names, return_logprob=True
    )
    check(world, names, ids, replies)
    llm._core.check_integrity()


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_the_interpreter(world: World, make_llm: Callable[..., LLM], backend: str) -> None:
    names = ["big", "head", "patterns", "qv"]
    llm = make_llm(*names, lora_backend=backend, max_loras_per_batch=3)
    run(llm, world, ["qv", None, *names, "qv"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_by_the_interpreter(make_llm: Callable[..., LLM], backend: str) -> None:
    names = ["qv", None, "head"]
    vectors = [
        make_llm("qv", "head", lora_backend=each).embed(
            input_ids=prompts(len(names)), lora_path=names, pooling="mean"
        )
        for each in (backend, "torch")
    ]
    for got, wanted in zip(*vectors, strict=True):
        assert got == pytest.approx(wanted, abs=2e-5)


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("options", [{}, {"disable_cuda_graph": True}], ids=["graphs", "eager"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_gpu(
    world: World, make_llm: Callable[..., LLM], backend: str, options: dict[str, Any]
) -> None:
    """Every kind of adapter and the base in one call, with room for all and for four; then the base alone."""
    for room in (len(KINDS), 4):
        llm = make_llm(
            *KINDS,
            device="cuda",
            dtype="float32",
            lora_backend=backend,
            max_loras_per_batch=room,
            cuda_graph_bs=(1, 2, 4, 8, 16, 32),
            **options,
        )
        run(llm, world, [None, *KINDS, "qv", None, "qv"])
        run(llm, world, [None, None])
        run(llm, world, ["qv"])
        llm.shutdown()
