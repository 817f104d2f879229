"""Each LoRA kernel alone: ``python -m benchmarks.ops.lora``, on a GPU, about two minutes.

A call is timed within a CUDA graph of many, as a decode step runs it. Every call of a graph has a layer of its own, so
that weights come from memory and not from the cache. The floor is the larger of two times, at the rates that are
measured first: that of the bytes which have to move (the adapters' A or B once, activations once), and that of the
products.

Shape legend: T tokens, K input features, O output features, R rank (Llama-3.1-8B's sites, bfloat16).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import about, table, write_result
from benchmarks.ops.timing import graph_us
from lorikeet.adapters.layout import PAGE_RANKS
from lorikeet.ops.lora.cutting import RowRuns, cut_tiles, most_tiles, padded
from lorikeet.ops.lora.metadata import LoRABatch, RankPageTable, SiteTable, SliceTable, Tiles
from lorikeet.ops.lora.tiles import (
    DECODE_BLOCK_ROWS,
    ExpandTile,
    ShrinkTile,
    prefill_block,
)
from lorikeet.ops.lora.triton.backend import TritonBackend

Row = dict[str, Any]

SITES = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
# Tokens and adapters among them.
BATCHES = ((256, 8), (64, 32), (256, 32), (8192, 8), (1, 1), (16, 8))
RANKS = (16, 64)
LARGEST_DECODE = 512
# More than the caches of any card.
ROTATED_BYTES = 2**28
MOST_LAYERS = 24


class Layers:
    """Some layers' copies of one site, with adapters of one rank in every slot.

    Args:
        num_layers: how many.
    """

    def __init__(self, name: str, rank: int, num_adapters: int, num_layers: int) -> None:
        self.in_features, self.sizes = SITES[name]
        num_pages = rank // PAGE_RANKS
        widths = [PAGE_RANKS * (self.in_features + size) for size in self.sizes]
        total = num_layers * num_adapters * num_pages * sum(widths)
        pool_E = torch.randn(total, device="cuda", dtype=torch.bfloat16) / 64
        self.table = RankPageTable(
            num_slots=num_adapters + 1,
            num_slices=num_layers * len(self.sizes),
            max_pages=num_pages,
            device=pool_E.device,
        )
        records: list[dict[int, tuple[Sequence[int], int, float]]] = [
            {} for _ in range(num_adapters)
        ]
        self.sites: list[SiteTable] = []
        end = 0
        for layer in range(num_layers):
            slices = []
            for part, size in enumerate(self.sizes):
                index = layer * len(self.sizes) + part
                slices.append(self._slice(pool_E, part, index))
                for record in records:
                    pages = [end + page * widths[part] for page in range(num_pages)]
                    record[index] = (pages, rank, 1.0)
                    end = pages[-1] + PAGE_RANKS * (self.in_features + size)
            self.sites.append(SiteTable(tuple(slices)))
        for slot, record in enumerate(records, 1):
            self.table.put(slot, record)

    @property
    def out_features(self) -> int:
        return sum(self.sizes)

    def _slice(self, pool_E: torch.Tensor, part: int, index: int) -> SliceTable:
        return SliceTable(
            pool_E,
            in_features=self.in_features,
            out_features=self.sizes[part],
            offset=sum(self.sizes[:part]),
            page_ranks=PAGE_RANKS,
            table=self.table,
            index=index,
        )


class Case:
    """One site, rank and batch.

    Args:
        shrink, expand: sizes to use in place of those of ``tiles.py``.
        block: rows of a tile; None is what the engine takes.
        num_layers: None for as many as no cache holds.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        tokens: int,
        adapters: int,
        *,
        shrink: ShrinkTile | None = None,
        expand: ExpandTile | None = None,
        block: int | None = None,
        num_layers: int | None = None,
    ) -> None:
        self.rank, self.tokens, self.adapters = rank, tokens, adapters
        in_features, sizes = SITES[name]
        weights = 2 * rank * adapters * (len(sizes) * in_features + sum(sizes))
        moved = weights + 2 * tokens * (in_features + sum(sizes))
        self.num_layers = num_layers or max(2, min(MOST_LAYERS, ROTATED_BYTES // moved))
        self.layers = Layers(name, rank, adapters, self.num_layers)
        self.is_decode = tokens <= LARGEST_DECODE
        self.tiles = self._tiles(block)
        self.batch = LoRABatch(self.tiles, self.tiles, is_beside=self.is_decode)
        self.backend = TritonBackend(
            self.layers.table, page_ranks=PAGE_RANKS, shrink_tile=shrink, expand_tile=expand
        )
        self.x_TK = _random(tokens, in_features)
        self.y_TO = _random(tokens, sum(sizes))

    def _tiles(self, block: int | None) -> Tiles:
        slots = np.arange(self.tokens) * self.adapters // self.tokens + 1
        runs = RowRuns(slots, np.ones_like(slots))
        if block is None:
            block = DECODE_BLOCK_ROWS
            if not self.is_decode:
                block = prefill_block(self.tokens, self.adapters, 128)
        cut = cut_tiles(runs, block, by_adapter=True)
        if self.is_decode:
            cut = padded(cut, most_tiles(self.tokens, self.adapters, block, by_adapter=True))
        slot_J, rows_JM = (torch.from_numpy(array).cuda() for array in (cut.slot_J, cut.rows_JM))
        return Tiles(slot_J, rows_JM, self.tokens, len(cut.slot_J))

    @property
    def block(self) -> int:
        return self.tiles.rows_JM.shape[1]

    def begin(self) -> None:
        self.backend.begin(self.batch)

    def shrink(self, layer: int) -> Any:
        return self.backend.shrink(self.x_TK, self.layers.sites[layer], self.tiles)

    def expand(self, layer: int, h: Any) -> None:
        write = self.backend.expand_into if self.is_decode else self.backend.expand_
        write(self.y_TO, h, self.layers.sites[layer], self.tiles)

    def gated(self, layer: int, h: Any) -> None:
        self.backend.silu_mul(self.y_TO, h, self.layers.sites[layer], self.tiles)

    def time_begin(self) -> float:
        """Microseconds of what a step does before its first layer, for the layers of this case."""
        return microseconds(self.begin, [self.begin] * self.num_layers)

    def time_shrink(self) -> float:
        calls = [lambda layer=layer: self.shrink(layer) for layer in range(self.num_layers)]
        return microseconds(self.begin, calls)

    def time_expand(self) -> float:
        return self._time_with_h(self.expand)

    def time_gated(self) -> float:
        """Of the expand of gate and up that ends in silu-mul."""
        return self._time_with_h(self.gated)

    def _time_with_h(self, call: Callable[[int, Any], object]) -> float:
        self.begin()
        h = [self.shrink(layer) for layer in range(self.num_layers)]
        calls = [lambda layer=layer: call(layer, h[layer]) for layer in range(len(h))]
        # One more, to be the part that is taken off.
        return microseconds(lambda: call(0, h[0]), calls)

    def work(self, op: str) -> tuple[int, int]:
        """Bytes and products that a call cannot do without."""
        size = 2
        slices, T = len(self.layers.sizes), self.tokens
        h = 4 * T * self.rank * slices
        if op == "shrink":
            K = self.layers.in_features
            weights = size * self.adapters * self.rank * K * slices
            return weights + size * T * K + h, 2 * T * self.rank * K * slices
        O = self.layers.out_features  # noqa: E741  (as everywhere in shapes)
        weights = size * self.adapters * self.rank * O
        if op == "gated":
            return weights + h + 3 * size * T * O // 2, 2 * T * self.rank * O
        passes = 1 if self.is_decode else 2
        return weights + h + passes * size * T * O, 2 * T * self.rank * O


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def microseconds(prepare: Callable[[], object], calls: Sequence[Callable[[], object]]) -> float:
    """Median over rounds of the time of one call, from a graph that makes all of them after ``prepare``, which is timed
    by itself and taken off."""
    return (graph_us([prepare, *calls]) - graph_us([prepare])) / len(calls)


def bandwidth() -> float:
    """Bytes per second that a plain copy reads and writes."""
    source, target = torch.empty(2, 2**29, dtype=torch.uint8, device="cuda")
    us = graph_us([lambda: target.copy_(source)] * 4) / 4
    return 2 * source.numel() / us * 1e6


def matmul_rate() -> float:
    """Operations per second of a large product."""
    a, b = _random(8192, 8192), _random(8192, 8192)
    us = graph_us([lambda: a @ b] * 4) / 4
    return 2 * 8192**3 / us * 1e6


def measure(
    batches: tuple[tuple[int, int], ...] = BATCHES, ranks: tuple[int, ...] = RANKS
) -> list[Row]:
    """One row for each kernel, site, rank and batch: ``us`` a call takes, ``floor_us``, and their ratio ``of_floor``.

    Needs a CUDA device with 8 GB free.
    """
    bytes_per_s, operations_per_s = bandwidth(), matmul_rate()
    rows: list[Row] = []
    for rank in ranks:
        for tokens, adapters in batches:
            for site in SITES:
                case = Case(site, rank, tokens, adapters)
                about_case = {"rank": rank, "tokens": tokens, "adapters": adapters}
                if site == "qkv":
                    us = case.time_begin()
                    rows.append({"op": "begin", "site": "all", **about_case, "us": us})
                times = {"shrink": case.time_shrink(), "expand": case.time_expand()}
                if site == "gate_up" and not case.is_decode:
                    times["gated"] = case.time_gated()
                for op, us in times.items():
                    moved, operations = case.work(op)
                    floor = 1e6 * max(moved / bytes_per_s, operations / operations_per_s)
                    rows.append(
                        {
                            "op": op,
                            "site": site,
                            **about_case,
                            "us": us,
                            "floor_us": floor,
                            "of_floor": floor / us,
                        }
                    )
                del case
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA kernels against their floor")
    parser.add_argument("--write", action="store_true", help="also write a result file")
    parser.add_argument("--json", type=Path, help="where to write it")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, bfloat16")
    rows = measure(ranks=tuple(arguments.ranks))
    header = ("op", "site", "rank", "tokens", "adapters", "us", "floor us", "of floor")
    print(table(header, [_cells(row) for row in rows]))
    if arguments.write or arguments.json:
        content = about(
            "LoRA kernels against their floor", "benchmarks.ops.lora", ("torch", "triton")
        )
        print(write_result({**content, "rows": rows}, "ops-lora", arguments.json))


def _cells(row: Row) -> list[str]:
    names = ("op", "site", "rank", "tokens", "adapters")
    if "floor_us" not in row:
        return [*(str(row[name]) for name in names), f"{row['us']:.2f}", "", ""]
    return [
        *(str(row[name]) for name in names),
        f"{row['us']:.2f}",
        f"{row['floor_us']:.2f}",
        f"{row['of_floor']:.0%}",
    ]


if __name__ == "__main__":
    main()
