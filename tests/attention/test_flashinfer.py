"""The FlashInfer backend against attention written out query by query: with a stand-in for the library on the CPU, with the
library itself on a GPU."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from lorikeet.attention.flashinfer import FlashInferBackend, Planned, TritonDecode
from lorikeet.errors import ConfigError
from tests.support import fake_flashinfer
from tests.support.attention_steps import DECODE_STEPS, STEPS, WINDOWS, Heads, Step

# The library's; our own has a file for itself.
DECODE_PATHS = ("xqa", "fa2-tc")
PAGE = 16
SMALL = Heads(4, 2, 64, 64)


def make_backend(
    heads: Heads = SMALL, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", **more: Any
) -> FlashInferBackend:
    return FlashInferBackend(
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        dtype=dtype,
        device=torch.device(device),
        **{"page_size": PAGE, **more},
    )


def make_step(
    shapes: list[tuple[int, int]],
    heads: Heads = SMALL,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> Step:
    return Step(shapes, dtype, heads=heads, page_size=PAGE, device=device, int_type=torch.int32)


def check(got_TQH: torch.Tensor, wanted_TQH: torch.Tensor) -> None:
    """Within the rounding of the result and of the probabilities, which are 16 bits wide."""
    assert got_TQH.is_contiguous()
    torch.testing.assert_close(got_TQH.cpu().double(), wanted_TQH, atol=0.03, rtol=0.01)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_flashinfer.install(monkeypatch)


# ---------------------------------------------------------------------------------------------------------------------
# With the stand-in.


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("decode", DECODE_PATHS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", STEPS)
def test_describes_every_step(name: str, window: int | None, decode: str) -> None:
    step = make_step(STEPS[name])
    check(step.run(make_backend(decode=decode), window), step.wanted(window))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("decode", DECODE_PATHS)
@pytest.mark.parametrize(("head_dim", "stored_dim"), [(80, 128), (96, 128), (128, 128), (8, 64)])
def test_heads_of_other_sizes_are_padded(head_dim: int, stored_dim: int, decode: str) -> None:
    """The padding of the storage is zeros; scores are scaled for the real size."""
    heads = Heads(4, 2, head_dim, stored_dim)
    backend = make_backend(heads, decode=decode)
    assert backend.storage_head_dim(head_dim) == stored_dim
    step = make_step(STEPS["mixed"], heads)
    check(step.run(backend, 10), step.wanted(10))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("decode", DECODE_PATHS)
@pytest.mark.parametrize("name", DECODE_STEPS)
def test_a_step_for_a_graph(name: str, decode: str) -> None:
    """Rows that pad and a wide page table; one backend serves buckets in turn, as a capture does."""
    backend = make_backend(decode=decode)
    for bucket, width in ((8, 64), (6, 64), (8, 64)):
        step = make_step(STEPS[name])
        inputs = step.static(bucket, width)
        backend.prepare(inputs)
        for window in (None, 6):
            got = step.run(backend, window, inputs)
            wanted = step.wanted(window)
            check(got[: len(wanted)], wanted)


@pytest.mark.usefixtures("fake")
def test_a_replay_is_planned_without_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a bucket's layers used when they were captured is planned again for each replay, and nothing else."""
    plans: list[int | None] = []
    plan = Planned.plan

    def spy(self: Planned, *indices: torch.Tensor, window: int | None, **options: Any) -> Any:
        plans.append(window)
        return plan(self, *indices, window=window, **options)

    backend = make_backend(decode="fa2-tc")
    step = make_step(STEPS["decode-ragged"])
    inputs = step.static(8, 64)
    for window in (None, 6):
        step.run(backend, window, inputs)
    other = make_step(STEPS["decode"])
    backend.prepare(other.static(2, 64))
    monkeypatch.setattr(Planned, "plan", spy)
    backend.prepare(inputs)
    assert plans == [None, 6]
    check(step.run(backend, 6, inputs)[:4], step.wanted(6))
    assert plans == [None, 6]


@pytest.mark.usefixtures("fake")
def test_layers_share_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[int | None] = []
    monkeypatch.setattr(
        Planned,
        "plan",
        lambda self, *indices, window, plan=Planned.plan, **options: (
            plans.append(window) or plan(self, *indices, window=window, **options)
        ),
    )
    backend = make_backend(decode="fa2-tc")
    for name in ("mixed", "prompt", "decode"):
        step = make_step(STEPS[name])
        plans.clear()
        backend.prepare(step.inputs)
        for window in (None, 6, None, 6):
            check(step.run(backend, window), step.wanted(window))
        assert sorted(plans, key=str) == sorted([6, None] * (2 if name == "mixed" else 1), key=str)


@pytest.mark.usefixtures("fake")
def test_lengths_worth_a_graph() -> None:
    """Only where the kernel would cut a short sequence into as many parts as a long one."""
    backend = make_backend(LLAMA, decode="xqa")
    decoder: Any = backend._decoders["xqa"]
    decoder._num_blocks = 132  # multiprocessors
    assert backend.graph_kv_lens(1, 2**17) == (256, 1024, 2**17)
    assert backend.graph_kv_lens(4, 2**17) == (256, 2**17)
    assert backend.graph_kv_lens(16, 2**17) == (2**17,)
    assert backend.graph_kv_lens(1, 700) == (256, 700)
    mixed: Any = make_backend(LLAMA, decode="xqa")
    mixed._paths = ("triton", "xqa")
    mixed._decoders["triton"] = TritonDecode(mixed._shape)
    mixed._decoders["xqa"]._num_blocks = 132
    assert mixed.graph_kv_lens(1, 2**17) == (256, 1024, 2**17)
    assert mixed.graph_kv_lens(16, 2**17) == (256, 2**17)
    assert mixed.graph_kv_lens(32, 2**17) == (2**17,)
    assert mixed.graph_kv_lens(1, 256) == (256,)
    assert make_backend(decode="fa2-tc").graph_kv_lens(1, 2**17) == (2**17,)


@pytest.mark.usefixtures("fake")
def test_queries_need_not_be_contiguous() -> None:
    step = make_step(STEPS["mixed"])
    packed = torch.cat((step.queries, step.queries), dim=1)
    step.queries = packed[:, : step.heads.num_heads]
    assert not step.queries.is_contiguous()
    check(step.run(make_backend(decode="xqa"), None), step.wanted(None))


# ---------------------------------------------------------------------------------------------------------------------
# What it refuses.


@pytest.mark.usefixtures("fake")
def test_refuses_float32() -> None:
    with pytest.raises(ConfigError, match="float32; --attention-backend sdpa"):
        make_backend(dtype=torch.float32)


@pytest.mark.usefixtures("fake")
def test_refuses_fa3_without_hopper() -> None:
    with pytest.raises(ConfigError, match=r"fa3 needs .* Hopper .* allowed .* flashinfer, sdpa"):
        make_backend(prefill="fa3")


@pytest.mark.usefixtures("fake")
def test_refuses_large_heads() -> None:
    with pytest.raises(ConfigError, match="at most 256, the model's have 512"):
        make_backend(Heads(4, 2, 512, 512))


@pytest.mark.usefixtures("fake")
def test_refuses_a_decode_path() -> None:
    with pytest.raises(ConfigError, match="no decode path 'best'; there are: triton, xqa, fa2-tc"):
        make_backend(decode="best")
    with pytest.raises(ConfigError, match="not 8"):
        make_backend(decode="xqa", page_size=8)
    assert make_backend(page_size=8)._paths == ("fa2-tc", "fa2-tc")


def test_tells_how_to_get_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ConfigError, match=r"lorikeet\[gpu\]"):
        make_backend()


# ---------------------------------------------------------------------------------------------------------------------
# With the library, on a GPU.

# The step's warnings are the library's and its build's, not ours.
on_gpu = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]
LLAMA = Heads(32, 8, 128, 128)
HEADS = {
    "64": Heads(8, 2, 64, 64),
    "80": Heads(8, 2, 80, 128),
    "96": Heads(8, 2, 96, 128),
    "128": LLAMA,
    "256": Heads(8, 2, 256, 256),
    "group-of-7": Heads(14, 2, 128, 128),
}
GPU_STEPS = {**STEPS, "long": [(40, 1500), (1, 900), (1, 2500)], "many": [(1, 60)] * 160}
_BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def compiled() -> None:
    """Compile what the tests use side by side: the first call of each would do it one after the other."""
    wanted: list[tuple[Heads, torch.dtype, int | None, str | None]] = [
        (heads, _BF16, None, None) for heads in HEADS.values()
    ]
    wanted += [(LLAMA, _BF16, 6, None), (LLAMA, torch.float16, None, None)]
    wanted += [(LLAMA, _BF16, window, path) for path in ("xqa", "fa2-tc") for window in (None, 6)]

    def once(heads: Heads, dtype: torch.dtype, window: int | None, decode: str | None) -> None:
        step = make_step(STEPS["one-of-each"], heads, dtype, "cuda")
        step.run(make_backend(heads, dtype, "cuda", decode=decode), window)

    with ThreadPoolExecutor(len(wanted)) as pool:
        for done in [pool.submit(once, *arguments) for arguments in wanted]:
            done.result()
    torch.cuda.synchronize()


@pytest.mark.usefixtures("compiled")
class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("heads", HEADS)
    @pytest.mark.parametrize("name", GPU_STEPS)
    def test_equals_the_definition(self, name: str, heads: str) -> None:
        step = make_step(GPU_STEPS[name], HEADS[heads], device="cuda")
        check(step.run(make_backend(HEADS[heads], device="cuda"), None), step.wanted(None))

    @pytest.mark.parametrize("decode", [None, "triton", "xqa", "fa2-tc"])
    @pytest.mark.parametrize("window", [1, 6, 500])
    @pytest.mark.parametrize("name", GPU_STEPS)
    def test_windows(self, name: str, window: int, decode: str | None) -> None:
        step = make_step(GPU_STEPS[name], LLAMA, device="cuda")
        backend = make_backend(LLAMA, device="cuda", decode=decode)
        check(step.run(backend, window), step.wanted(window))

    def test_float16(self) -> None:
        step = make_step(GPU_STEPS["mixed"], LLAMA, torch.float16, "cuda")
        check(step.run(make_backend(LLAMA, torch.float16, "cuda"), None), step.wanted(None))

    @pytest.mark.parametrize("decode", [None, "triton", "xqa", "fa2-tc"])
    def test_a_captured_step_follows_its_tensors(self, decode: str | None) -> None:
        """Captured with rows that pad, replayed with sequences, for two layers of different windows."""
        backend = make_backend(LLAMA, device="cuda", decode=decode)
        step = make_step(STEPS["decode-far-apart"], LLAMA, device="cuda")
        inputs = step.static(8, 64)
        lens_N, table_NP = inputs.kv_lens_N.clone(), inputs.page_table_NP.clone()
        kv_lens = list(inputs.kv_lens)
        inputs.kv_lens[:] = [1] * 8
        inputs.kv_lens_N.fill_(1)
        inputs.page_table_NP.zero_()
        backend.prepare(inputs)
        for window in (None, 6):
            step.run(backend, window, inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = {window: step.run(backend, window, inputs) for window in (None, 6)}
        inputs.kv_lens[:] = kv_lens
        inputs.kv_lens_N.copy_(lens_N)
        inputs.page_table_NP.copy_(table_NP)
        for _ in range(3):
            backend.prepare(inputs)
            graph.replay()
        for window, got_TQH in got.items():
            wanted = step.wanted(window)
            check(got_TQH[: len(wanted)], wanted)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", GPU_STEPS)
    def test_prompts_by_fa3(self, name: str) -> None:
        step = make_step(GPU_STEPS[name], LLAMA, device="cuda")
        backend = make_backend(LLAMA, device="cuda", prefill="fa3")
        assert backend.name == "fa3"
        check(step.run(backend, None), step.wanted(None))

    def test_steps_follow_each_other_without_waiting(self) -> None:
        """Plans of later steps must not change those of earlier ones that the device has not reached."""
        backend = make_backend(LLAMA, device="cuda", decode="fa2-tc")
        steps = [make_step(GPU_STEPS[name], LLAMA, device="cuda") for name in GPU_STEPS] * 2
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        results = []
        for step in steps:
            backend.prepare(step.inputs)
            results.append(step.run(backend, None))
        for step, got in zip(steps, results, strict=True):
            check(got, step.wanted(None))
