"""Measures tile sizes of the LoRA kernels on a GPU: ``python -m scripts.tune_lora``, some minutes.

For each line of the tables in ``lorikeet/ops/lora/tiles.py`` it times candidates on the sites of an 8B model, weighs the
sites alike, and prints the lines with the sizes that won, ready to be put into the file.
``--quick`` tries fewer candidates.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.ops.lora import LARGEST_DECODE, SITES, Case
from lorikeet.ops.lora.tiles import ANY, ExpandTile, ShrinkTile

Tile = ShrinkTile | ExpandTile


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the tables: its limits, and the batch that stands for it."""

    block: int
    ranks: int
    tiles: int
    batch: tuple[int, int]


# What stands for "any".
LARGEST_RANK, LARGEST_BLOCK = 64, 128

# A batch's rank is the line's largest, or 64.
LINES = (
    Line(16, 16, 4, (1, 1)),
    Line(16, 16, 16, (16, 8)),
    Line(16, 16, ANY, (64, 32)),
    Line(16, 32, 4, (1, 1)),
    Line(16, 32, ANY, (64, 32)),
    Line(16, ANY, 4, (1, 1)),
    Line(16, ANY, ANY, (64, 32)),
    Line(32, ANY, ANY, (2048, 8)),
    Line(64, 16, 32, (1024, 8)),
    Line(64, 16, ANY, (8192, 8)),
    Line(64, ANY, 32, (1024, 8)),
    Line(64, ANY, ANY, (8192, 8)),
    Line(ANY, ANY, ANY, (8192, 8)),
)


def shrink_candidates(line: Line, *, quick: bool) -> Iterator[ShrinkTile]:
    is_decode = line.block <= 16
    blocks = (128, 256, 512) if is_decode else (64, 128)
    iterations = (2, 4, 8) if is_decode else (4, 8, ANY)
    warps = (4,) if quick else (2, 4, 8)
    stages = (3,) if quick else (2, 3, 4)
    for block, times, num_warps, num_stages in itertools.product(blocks, iterations, warps, stages):
        yield ShrinkTile(block, ANY if times == ANY else block * times, num_warps, num_stages)


def expand_candidates(line: Line, *, quick: bool) -> Iterator[ExpandTile]:
    blocks = (64, 128, 256, 512, 1024) if line.block <= 16 else (64, 128, 256)
    for block, num_warps in itertools.product(blocks, (4, 8) if quick else (2, 4, 8)):
        yield ExpandTile(block, num_warps, 1)


@dataclass(frozen=True, slots=True)
class Job:
    """One measurement."""

    op: str
    line: Line
    tile: Tile
    site: str

    def case(self, num_layers: int | None = None) -> Case:
        return Case(
            self.site,
            min(self.line.ranks, LARGEST_RANK),
            *self.line.batch,
            shrink=self.tile if isinstance(self.tile, ShrinkTile) else None,
            expand=self.tile if isinstance(self.tile, ExpandTile) else None,
            block=min(self.line.block, LARGEST_BLOCK),
            num_layers=num_layers,
        )


def compile_job(job: Job) -> bool:
    """Compile a job's kernel into Triton's cache on the disk; False if it needs more than the device has."""
    case = job.case(num_layers=1)
    case.begin()
    try:
        h = case.shrink(0)
        if job.op == "expand":
            case.expand(0, h)
        if job.op == "gated":
            case.gated(0, h)
        torch.cuda.synchronize()
    except OutOfResources:
        return False
    return True


def measure_job(job: Job) -> float:
    """Microseconds of one call."""
    case = job.case()
    times = {"shrink": case.time_shrink, "expand": case.time_expand, "gated": case.time_gated}
    return times[job.op]()


def sites_of(op: str) -> list[str]:
    return ["gate_up"] if op == "gated" else list(SITES)


def best_of(jobs: list[Job]) -> tuple[Tile, dict[str, float]]:
    """The size with the least sum over sites of time relative to the site's best, and its times."""
    times: dict[Tile, dict[str, float]] = {}
    for job in jobs:
        times.setdefault(job.tile, {})[job.site] = measure_job(job)
    sites = sites_of(jobs[0].op)
    whole = {tile: row for tile, row in times.items() if len(row) == len(sites)}
    least = {site: min(row[site] for row in whole.values()) for site in sites}
    best = min(whole, key=lambda tile: sum(whole[tile][site] / least[site] for site in sites))
    return best, whole[best]


def text_of(line: Line, tile: Tile) -> str:
    def number(value: int) -> str:
        return "ANY" if value == ANY else str(value)

    if isinstance(tile, ShrinkTile):
        sizes = (
            f"ShrinkTile({tile.block_k}, {number(tile.span)}, {tile.num_warps}, {tile.num_stages})"
        )
    else:
        sizes = f"ExpandTile({tile.block_n}, {tile.num_warps}, {tile.num_stages})"
    limits = ", ".join(number(limit) for limit in (line.block, line.ranks, line.tiles))
    return f"    ({limits}, {sizes}),"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure tile sizes of the LoRA kernels")
    parser.add_argument("--quick", action="store_true", help="fewer candidates")
    parser.add_argument("--only", choices=("shrink", "expand", "gated"), help="one table")
    parser.add_argument("--processes", type=int, default=12, help="that compile")
    parser.add_argument("--lines", default="", help="numbers of lines, with commas; all by default")
    arguments = parser.parse_args()
    numbers = [int(text) for text in arguments.lines.split(",") if text]
    lines = [LINES[number] for number in numbers] or list(LINES)
    tables = {"shrink": shrink_candidates, "expand": expand_candidates, "gated": expand_candidates}
    jobs = {
        (op, line): [
            Job(op, line, tile, site)
            for tile in candidates(line, quick=arguments.quick)
            for site in sites_of(op)
        ]
        for op, candidates in tables.items()
        if arguments.only in (None, op)
        for line in lines
        if op != "gated" or line.batch[0] > LARGEST_DECODE
    }
    print(f"# {torch.cuda.get_device_name()}, {torch.cuda.get_device_capability()}", flush=True)
    # Compiling takes nearly all of the time, and has to be done by other processes: a GPU is timed by one alone.
    everything = [job for group in jobs.values() for job in group]
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        fits = dict(zip(everything, pool.map(compile_job, everything), strict=True))
    for (op, line), group in jobs.items():
        tile, times = best_of([job for job in group if fits[job]])
        found = ", ".join(f"{site} {us:.1f}" for site, us in times.items())
        print(text_of(line, tile), f" # {op}, us: {found}", flush=True)


if __name__ == "__main__":
    main()
