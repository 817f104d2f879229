"""Compiles every LoRA kernel for a GPU that need not be there: ``python -m tests.support.compile_lora``.

The interpreter runs kernels as Python and so accepts more than the compiler does. A process of its own, because Triton
decides for one of the two when it is imported. Prints, per kernel, the shared memory that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorikeet.ops.lora import tiles
from lorikeet.ops.lora.triton import expand, gated, resolve, shrink

TARGET = GPUTarget("cuda", 90, 32)
# What a multiprocessor of an H100 has for one program.
MOST_SHARED = 227 * 1024

POINTERS = {
    "pool_ptr": "*bf16",
    "x_ptr": "*bf16",
    "y_ptr": "*bf16",
    "out_ptr": "*bf16",
    "words_ptr": "*i64",
    "ids_ptr": "*i64",
    "rows_ptr": "*i32",
    "slots_ptr": "*i32",
    "h_ptr": "*fp32",
}
ALIGNED = {"x_stride", "y_stride", "h_part_stride", "h_slice_stride"}
INTEGERS = {*ALIGNED, "num_tiles", "first_slice", "in_start"}


def compile_kernel(kernel: Any, constants: dict[str, Any], tile: Any, **pointers: str) -> int:
    """Bytes of shared memory."""
    names = kernel._function.arg_names
    types = {**POINTERS, **pointers}
    signature = {
        name: types.get(name) or ("i32" if name in INTEGERS else "constexpr") for name in names
    }
    divisible = [["tt.divisibility", 16]]
    attributes = {
        (index,): divisible for index, name in enumerate(names) if name in types or name in ALIGNED
    }
    values = {name: constants[name] for name in names if signature[name] == "constexpr"}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    source = ASTSource(kernel._function, signature, values, attributes)
    return triton.compile(source, target=TARGET, options=options).metadata.shared


def cases() -> Iterator[tuple[str, int]]:
    """Name and shared memory of each kernel, at gate and up of an 8B model."""
    words = {"L": 226, "W": 2, "B": 1024}
    plain = tiles.ExpandTile(1024, 4, 1)
    yield "resolve", compile_kernel(resolve._resolve, words, plain, out_ptr="*i64")
    for block, ranks, count in ((16, 16, 8), (16, 64, 37), (64, 16, 130), (128, 256, 64)):
        shape = {"K": 4096, "M": block, "C": ranks, "P": ranks // 16, "PAGE": 16, "ALIGN": 16}
        shape |= {"R": tiles.rank_block(ranks), "O0": 14336, "O1": 14336, "O2": 0, "H": 1}
        name = f"rank {ranks}, {block} rows"
        tile = tiles.table_of(None).shrink(block, ranks, count)
        span = min(tile.span, 4096)
        values = {
            **shape,
            "B": tile.block_k,
            "SPAN": span,
            "ADD": span < 4096,
            "EARLY": True,
            "LINES": 4 if block == 16 else 0,
        }
        yield f"shrink, {name}", compile_kernel(shrink._shrink, values, tile)
        tile = tiles.table_of(None).expand(block, ranks, count)
        parts = {"AT0": 0, "AT1": 14336, "AT2": 0, "PART0": 0, "PART1": 1, "PART2": -1}
        for add in (True, False):
            values = {**shape, **parts, "B": tile.block_n, "ALIGN_O": 16, "ADD": add}
            yield f"expand, {name}", compile_kernel(expand._expand, values, tile)
        tile = tiles.table_of(None).gated(block, ranks, count)
        values = {**shape, "HALF": 14336, "GATE": 0, "UP": 1, "B": tile.block_n}
        yield f"gated, {name}", compile_kernel(gated._silu_mul, values, tile)
        yield f"gather, {name}", compile_kernel(shrink._gather, {**shape, "R": 16}, plain)


def main() -> None:
    for name, shared in cases():
        assert shared <= MOST_SHARED, f"{name}: {shared} bytes of shared memory"
        print(name, shared)


if __name__ == "__main__":
    main()
