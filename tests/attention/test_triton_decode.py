"""Our own decode kernel in Triton's interpreter against attention written out query by query."""

from __future__ import annotations

import pytest
import torch

from lorikeet.attention.flashinfer import FlashInferBackend
from lorikeet.ops.triton import attention as kernels
from lorikeet.ops.triton.attention import decode_attention_triton
from tests.support import fake_flashinfer
from tests.support.attention_steps import DECODE_STEPS, STEPS, WINDOWS, Heads, Step

PAGE = 16
SMALL = Heads(4, 2, 64, 64)


def make_step(shapes: list[tuple[int, int]], heads: Heads = SMALL) -> Step:
    # bfloat16 is for a GPU: the interpreter's products of it are wrong.
    return Step(shapes, torch.float16, heads=heads, page_size=PAGE, int_type=torch.int32)


def run(monkeypatch: pytest.MonkeyPatch, step: Step, window: int | None) -> torch.Tensor:
    fake_flashinfer.install(monkeypatch)
    heads = step.heads
    backend = FlashInferBackend(
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        page_size=PAGE,
        dtype=torch.float16,
        device=torch.device("cpu"),
        decode="triton",
    )
    return step.run(backend, window)


def check(got_TQH: torch.Tensor, wanted_TQH: torch.Tensor) -> None:
    torch.testing.assert_close(got_TQH.double(), wanted_TQH, atol=4e-3, rtol=2e-3)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", [*DECODE_STEPS, "mixed", "one-of-each"])
def test_equals_the_definition(name: str, window: int | None, monkeypatch) -> None:
    step = make_step(STEPS[name])
    check(run(monkeypatch, step, window), step.wanted(window))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    "heads",
    [
        Heads(4, 2, 80, 128),
        Heads(2, 1, 256, 256),
        Heads(3, 3, 64, 64),
        Heads(7, 1, 64, 64),
        Heads(20, 1, 64, 64),
    ],
    ids=["80 in 128", "256", "one query head for each", "seven", "more than a tile"],
)
def test_heads(heads: Heads, window: int | None, monkeypatch) -> None:
    """Lengths at, before and behind the edges of pages and of iterations."""
    lengths = [1, 15, 16, 17, 127, 128, 129, 260]
    step = make_step([(1, length) for length in lengths], heads)
    check(run(monkeypatch, step, window), step.wanted(window))


def test_many_rows_take_smaller_iterations(monkeypatch) -> None:
    step = make_step([(1, 1 + 7 * row) for row in range(kernels._FEW_ROWS)], Heads(2, 1, 64, 64))
    check(run(monkeypatch, step, None), step.wanted(None))


def test_any_number_of_prompts_before_the_rows_takes_the_same_kernel(monkeypatch) -> None:
    """Else the first steps with so many of them would wait for a compiler."""
    keys = set()
    launcher = kernels._attend
    monkeypatch.setattr(launcher, "_is_compiled", True)
    monkeypatch.setattr(
        launcher, "_launch", lambda _, *operands, **more: keys.add(launcher._key(operands, more))
    )
    for num_prompts in range(4):
        run(monkeypatch, make_step([(3, 20)] * num_prompts + [(1, 30)] * 2), None)
    assert len(keys) == 1


def test_operands_that_do_not_fit_are_refused() -> None:
    q_NQW = torch.zeros(2, 4, 64)
    pages = torch.zeros(3, PAGE, 2, 64)
    table, lens = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    out = torch.zeros_like(q_NQW)
    with pytest.raises(ValueError, match="an operand is"):
        decode_attention_triton(q_NQW, (pages, pages), table[:1], lens, 1.0, None, out)
    with pytest.raises(ValueError, match="an operand is"):
        decode_attention_triton(q_NQW, (pages, pages), table, lens, 1.0, None, out[:, :2])
    with pytest.raises(ValueError, match="an operand is"):
        decode_attention_triton(q_NQW, (pages, pages[..., :32]), table, lens, 1.0, None, out)
