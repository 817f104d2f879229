"""What the machine could do at best, measured in the same run: the model's GEMMs alone, a large matmul, a copy.

Shape legend: N rows of the batch, D input features, O output features.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.common import Row
from benchmarks.engine.fixtures import linear_sites
from lorikeet.models.spec import ModelSpec

_WARMUPS = 5
_SCALE = 0.02
_MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
_COPY_BYTES = {"cuda": 4 * 10**9, "cpu": 64 * 10**6}


@dataclass(frozen=True)
class Machine:
    """Where the floor is measured: the device and element type of the engine that is compared with it."""

    device: torch.device
    dtype: torch.dtype

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def random(self, *shape: int) -> torch.Tensor:
        """Small random numbers: a matmul of zeros takes less power, so it runs faster than a real one."""
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=_SCALE)


def linear_shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """(O, D) of every linear layer as the engine packs it, the LM head last."""
    shapes = [(site.out_features, site.in_features) for site in linear_sites(spec)]
    return [*shapes, (spec.vocab_size, spec.hidden_size)]


def measure_floor(machine: Machine, spec: ModelSpec, batches: Sequence[int]) -> Row:
    """Everything in this module, as a part of the result file.

    Run it before the engine starts: it needs the memory of the weights once more, and gives it back.
    """
    with torch.inference_mode():
        found = _measure(machine, spec, batches)
    if machine.is_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return found


def _measure(machine: Machine, spec: ModelSpec, batches: Sequence[int]) -> Row:
    flops, bandwidth = matmul_flops(machine), copy_bandwidth(machine)
    weights = [machine.random(*shape) for shape in linear_shapes(spec)]
    return {
        "matmul_tflops": flops / 1e12,
        "copy_tb_per_s": bandwidth / 1e12,
        "gemm_weights_gb": sum(weight.nbytes for weight in weights) / 1e9,
        "gemms_ms": {
            str(batch): gemms_ms(machine, weights, batch) for batch in sorted(set(batches))
        },
    }


def gemms_ms(machine: Machine, weights_OD: Sequence[torch.Tensor], batch: int) -> float:
    """Milliseconds of one ``torch.mm`` of ``batch`` rows with each weight, one after the other.

    On a GPU all of them are one CUDA graph, so that no launch is waited for. Inputs and outputs are few and stay in the
    cache; the weights are all distinct and do not.
    """
    inputs_ND = {size: machine.random(batch, size) for size in {w.shape[1] for w in weights_OD}}
    outputs_NO = {size: machine.random(batch, size) for size in {w.shape[0] for w in weights_OD}}

    def run() -> None:
        for weight_OD in weights_OD:
            num_outputs, num_inputs = weight_OD.shape
            torch.mm(inputs_ND[num_inputs], weight_OD.t(), out=outputs_NO[num_outputs])

    repeats = 30 if machine.is_gpu else 5
    return 1e3 * _seconds(machine, _captured(run) if machine.is_gpu else run, repeats)


def matmul_flops(machine: Machine) -> float:
    """Floating-point operations per second of one large square matmul."""
    size = _MATMUL_SIZE[machine.device.type]
    a, b, c = (machine.random(size, size) for _ in range(3))
    seconds = _seconds(machine, lambda: torch.mm(a, b.t(), out=c), 20)
    return 2 * size**3 / seconds


def copy_bandwidth(machine: Machine) -> float:
    """Bytes per second, read and written together, of one large copy on the device."""
    size = _COPY_BYTES[machine.device.type]
    source, target = (torch.empty(size, dtype=torch.uint8, device=machine.device) for _ in range(2))
    source.fill_(1)
    return 2 * size / _seconds(machine, lambda: target.copy_(source), 10)


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    """``run`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Libraries allocate their workspaces at the first call, which a capture must not see.
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _seconds(machine: Machine, run: Callable[[], object], repeats: int) -> float:
    """Median time of one call."""
    for _ in range(_WARMUPS):
        run()
    if not machine.is_gpu:
        return statistics.median(_cpu_seconds(run) for _ in range(repeats))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    # The calls are queued faster than they run, so from mark to mark there is nothing but the work.
    return statistics.median(
        1e-3 * begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)
    )


def _cpu_seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
