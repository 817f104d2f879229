"""The SDPA backend against attention written out query by query."""

from __future__ import annotations

import pytest
import torch

from lorikeet.attention.sdpa import SDPABackend
from tests.support.attention_steps import DECODE_STEPS, STEPS, WINDOWS, Step


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", STEPS)
def test_equals_the_definition(name: str, window: int | None) -> None:
    step = Step(STEPS[name])
    got = step.run(SDPABackend(), window)
    torch.testing.assert_close(got.double(), step.wanted(window), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype: torch.dtype) -> None:
    step = Step(STEPS["mixed"], dtype)
    got = step.run(SDPABackend(), 10)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), step.wanted(10), atol=0.03, rtol=0)


def test_queries_need_not_be_contiguous() -> None:
    """As they come from the packed projection."""
    for name in ("decode-ragged", "mixed"):
        step = Step(STEPS[name])
        packed = torch.cat((step.queries, step.queries), dim=1)
        step.queries = packed[:, : step.heads.num_heads]
        assert not step.queries.is_contiguous()
        torch.testing.assert_close(
            step.run(SDPABackend(), None).double(), step.wanted(None), atol=1e-5, rtol=0
        )


def test_one_backend_serves_step_after_step() -> None:
    """Windows may differ by layer, and a step that was not prepared is prepared on sight."""
    backend = SDPABackend()
    for name in ("mixed", "decode-ragged", "mixed"):
        step = Step(STEPS[name])
        if name == "decode-ragged":
            backend.prepare(step.inputs)
        for window in (None, 6, None):
            torch.testing.assert_close(
                step.run(backend, window).double(), step.wanted(window), atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", DECODE_STEPS)
def test_a_step_for_a_graph_reads_tensors_only(name: str, window: int | None) -> None:
    """Rows that pad and a page table that is wider than needed change nothing; host lists may be anything."""
    step = Step(STEPS[name], int_type=torch.int32)
    wanted = step.wanted(window)
    inputs = step.static(bucket=8, width=180)
    inputs.kv_lens[:] = [-1] * 8
    inputs.query_starts[:] = [-1] * 9
    backend = SDPABackend()
    backend.prepare(inputs)
    got = step.run(backend, window, inputs)
    assert got.shape[0] == 8
    torch.testing.assert_close(got[: len(wanted)].double(), wanted, atol=1e-5, rtol=0)


def test_a_step_for_a_graph_gathers_no_more_than_it_promises() -> None:
    """The page table has room for the longest sequence that the model may see."""
    step = Step([(1, 700), (1, 5)])
    wanted = step.wanted(None)
    inputs = step.static(bucket=2, width=2**15)
    backend = SDPABackend()
    assert backend.graph_kv_lens(2, 2**15)[-1] < 2**15
    assert backend.graph_kv_lens(2, 100) == (100,)
    torch.testing.assert_close(step.run(backend, None, inputs).double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("name", STEPS)
def test_on_a_gpu(name: str, window: int | None) -> None:
    step = Step(STEPS[name], device="cuda", int_type=torch.int32)
    got = step.run(SDPABackend(), window)
    torch.testing.assert_close(got.cpu().double(), step.wanted(window), atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 6])
def test_a_captured_step_follows_its_tensors(window: int | None) -> None:
    """Captured with rows that pad, replayed with sequences: what the capture computed must not be what replays see."""
    step = Step(STEPS["decode-ragged"], device="cuda", int_type=torch.int32)
    wanted = step.wanted(window)
    inputs = step.static(bucket=8, width=64)
    lens_N, table_NP = inputs.kv_lens_N.clone(), inputs.page_table_NP.clone()
    inputs.kv_lens_N.fill_(1)
    inputs.page_table_NP.zero_()
    backend = SDPABackend()
    backend.prepare(inputs)
    step.run(backend, window, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = step.run(backend, window, inputs)
        second = step.run(backend, window, inputs)
    inputs.kv_lens_N.copy_(lens_N)
    inputs.page_table_NP.copy_(table_NP)
    backend.prepare(inputs)
    graph.replay()
    for got in (first, second):
        torch.testing.assert_close(got[: len(wanted)].cpu().double(), wanted, atol=1e-4, rtol=0)
