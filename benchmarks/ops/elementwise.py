"""Each Triton op alone: ``python -m benchmarks.ops.elementwise``, on a GPU, about a minute.

A call is timed within a CUDA graph of many, as a decode step runs it: without the host, with the gap to the next kernel.
Inputs rotate through more memory than the cache holds where they are large enough for that; the small ones of a decode
step are in the cache in a model too, since the kernel before has just written them.

Shape legend: T tokens, D = 4096 features, HALF = 14336 features of the gate and of up, V = 128256
token ids (Llama-3.1-8B).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.ops.timing import graph_us
from lorikeet.ops.rope import HeadShape
from lorikeet.ops.select import select_ops

Row = dict[str, Any]
# One call on operands of its own, and the bytes that it moves.
Case = tuple[Callable[[], object], int]

TOKENS = (1, 16, 64, 256, 8192)
# Logits of a prefill are computed for each sequence's last token alone.
MOST_ROWS = 256
CALLS_PER_GRAPH = 20
ROTATED_BYTES = 2**28
D, HALF, V = 4096, 14336, 128256
HEADS = HeadShape(num_heads=32, num_kv_heads=8, head_dim=128)
EPS = 1e-5


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def rms_norm(tokens: int, *, delta: bool) -> Case:
    ops = select_ops("cuda")
    x, residual, weight = random(tokens, D), random(tokens, D), random(D)
    added = random(tokens, D) if delta else None
    moved = (5 if delta else 4) * nbytes(x) + nbytes(weight)
    return lambda: ops.rms_norm(x, weight, EPS, residual, added), moved


def silu_mul(tokens: int, *, delta: bool) -> Case:
    ops = select_ops("cuda")
    gate_up = random(tokens, 2 * HALF)
    added = random(tokens, 2 * HALF) if delta else None
    return lambda: ops.silu_mul(gate_up, added), nbytes(gate_up) * (5 if delta else 3) // 2


def rope_store(tokens: int, *, delta: bool) -> Case:
    ops = select_ops("cuda")
    rows = HEADS.num_heads + 2 * HEADS.num_kv_heads
    qkv = random(tokens, rows * HEADS.head_dim)
    added = random(*qkv.shape) if delta else None
    cos_sin = torch.randn(tokens, HEADS.head_dim, device="cuda")
    k_cache, v_cache = (random(2 * tokens, HEADS.num_kv_heads, HEADS.head_dim) for _ in range(2))
    slots = torch.randperm(2 * tokens, device="cuda")[:tokens]
    moved = (3 if delta else 2) * nbytes(qkv) + nbytes(cos_sin, slots, k_cache)
    return lambda: ops.rope_store(
        qkv, cos_sin, k_cache, v_cache, slots, HEADS, delta_TO=added
    ), moved


def embed(tokens: int) -> Case:
    ops = select_ops("cuda")
    table = random(8192, D)
    ids = torch.randint(-tokens, 8192, (tokens,), device="cuda", dtype=torch.int32)
    sampled = torch.randint(8192, (tokens,), device="cuda")
    return lambda: ops.embed(ids, table, sampled), 2 * tokens * D * 2


def draw(tokens: int, *, temperature: float) -> Case:
    ops = select_ops("cuda")
    logits = random(tokens, V)
    temperatures = torch.full((tokens,), temperature, device="cuda")
    numbers = torch.arange(tokens, device="cuda")
    sampled = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    passes = 2 if temperature else 1
    return lambda: ops.draw(
        logits, temperatures, numbers, numbers, numbers, sampled
    ), passes * nbytes(logits)


OPS: dict[str, Callable[[int], Case]] = {
    "rms_norm": lambda tokens: rms_norm(tokens, delta=False),
    "rms_norm + delta": lambda tokens: rms_norm(tokens, delta=True),
    "rope_store": lambda tokens: rope_store(tokens, delta=False),
    "rope_store + delta": lambda tokens: rope_store(tokens, delta=True),
    "silu_mul": lambda tokens: silu_mul(tokens, delta=False),
    "silu_mul + delta": lambda tokens: silu_mul(tokens, delta=True),
    "embed": embed,
    "draw, greedy": lambda tokens: draw(tokens, temperature=0.0),
    "draw, temperature 1": lambda tokens: draw(tokens, temperature=1.0),
}


def microseconds(calls: list[Callable[[], object]]) -> float:
    """Of one call, from a graph that makes them in turn."""
    return graph_us([calls[n % len(calls)] for n in range(CALLS_PER_GRAPH)]) / CALLS_PER_GRAPH


def measure(tokens: tuple[int, ...] = TOKENS) -> list[Row]:
    """One row for each op and number of tokens: ``op``, ``tokens``, ``us`` a call takes, ``gb_per_s`` it moves.

    Needs a CUDA device with 4 GB free.
    """
    rows: list[Row] = []
    for name, make in OPS.items():
        for count in tokens:
            if name.startswith("draw") and count > MOST_ROWS:
                continue
            call, moved = make(count)
            copies = min(CALLS_PER_GRAPH, max(1, ROTATED_BYTES // moved))
            us = microseconds([call, *(make(count)[0] for _ in range(copies - 1))])
            rows.append({"op": name, "tokens": count, "us": us, "gb_per_s": moved / us / 1e3})
    return rows


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, bfloat16")
    print(f"{'op':22} {'tokens':>6} {'us':>9} {'GB/s':>7}")
    for row in measure():
        print(f"{row['op']:22} {row['tokens']:6} {row['us']:9.2f} {row['gb_per_s']:7.0f}")


if __name__ == "__main__":
    main()
