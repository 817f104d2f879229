"""What it costs the engine's loop to give an adapter its place on the device: victims, pages, slot. No GPU, no weights.

    python -m benchmarks.lifecycle.placement                      # about a minute
    python -m benchmarks.lifecycle.placement --json before.json

The layout is that of Llama-3.1-8B with adapters on all linear layers. Four times as many adapters as the pool has room for
are taken in random order, each for a moment, so that each one that is not there puts others out. Copies end at once;
what is timed is the decision alone, ``Residency.admit`` until the plan has its copy, in CPU time of the thread. Prints a
table and writes a result file.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import common
from benchmarks.engine.fixtures import LLAMA_8B, model_directory
from lorikeet.adapters.layout import PoolLayout
from lorikeet.adapters.rank_pages import RankPageAllocator
from lorikeet.adapters.residency import AdapterAdmission, Residency
from lorikeet.core.sites import LoRASite
from lorikeet.models.spec import read_model_spec

NUM_PLACEMENTS = 150
WARM_UP = 0.5  # times the number of adapters


@dataclass(frozen=True)
class Case:
    """A pool for ``room`` adapters of the largest rank, and the ranks of those that come."""

    room: int
    ranks: tuple[int, ...]

    @property
    def name(self) -> str:
        low, high = min(self.ranks), max(self.ranks)
        return f"{self.room} x {high}, ranks {low if low == high else f'{low} to {high}'}"


CASES = (
    Case(32, (16,)),
    Case(32, (8, 16, 32, 64)),
    Case(64, (64,)),
    Case(64, (8, 16, 32, 64)),
    Case(128, (64,)),
    Case(32, (8, 16, 32, 64, 128, 256)),
)


def page_classes(sites: tuple[LoRASite, ...], layout: PoolLayout, rank: int) -> list[int]:
    """The class of each page of an adapter on all enabled modules."""
    return [
        layout.classes[site, part]
        for site, parts in enumerate(sites)
        for part in range(len(parts.slices))
        if (site, part) in layout.classes
        for _ in range(layout.num_pages(rank))
    ]


def take(residency: Residency, version: int) -> tuple[float, int] | None:
    """Bring a version to the device, use it and let it go. Seconds of its placement and victims; None if it was there."""
    found = None
    if not residency.is_resident(version):
        victims = residency.device.num_evictions
        begin = time.thread_time()
        answer = residency.admit(version)
        residency.take_decisions()
        found = time.thread_time() - begin, residency.device.num_evictions - victims
        assert answer is AdapterAdmission.WAIT, f"no room for version {version}"
        residency.copies_done([version], {})
    residency.admit(version)
    residency.release(version)
    return found


def measure(sites: tuple[LoRASite, ...], case: Case) -> common.Row:
    """Milliseconds of a placement, and how many adapters it puts out."""
    targets = frozenset(part.name for site in sites for part in site.slices) - {
        "embed_tokens",
        "lm_head",
    }
    layout = PoolLayout.make(
        sites, targets, max_rank=max(case.ranks), max_loras_per_batch=case.room, element_size=2
    )
    residency = Residency(
        allocator=RankPageAllocator(
            layout.class_elems, layout.slab_elems, layout.num_slabs, layout.reserved_slabs
        ),
        num_slots=layout.num_slots,
        policy="lru",
        max_pinned=case.room - 1,
    )
    rng = random.Random(0)
    classes = {rank: page_classes(sites, layout, rank) for rank in case.ranks}
    mean_rank = statistics.mean(case.ranks)
    versions = range(1, 1 + int(4 * case.room * max(case.ranks) / mean_rank))
    for version in versions:
        residency.add(version, classes[rng.choice(case.ranks)])
    for _ in range(int(WARM_UP * len(versions))):
        take(residency, rng.choice(versions))
    taken: list[tuple[float, int]] = []
    while len(taken) < NUM_PLACEMENTS:
        one = take(residency, rng.choice(versions))
        if one is not None:
            taken.append(one)
    residency.check_integrity()
    return {
        "case": case.name,
        "slabs": layout.num_slabs,
        "pages": {rank: len(pages) for rank, pages in classes.items()},
        "mean_ms": 1e3 * statistics.mean(seconds for seconds, _ in taken),
        **common.percentiles([seconds for seconds, _ in taken]),
        "mean_victims": statistics.mean(victims for _, victims in taken),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorikeet-placement-") as temporary:
        directory, _ = model_directory(LLAMA_8B, Path(temporary))
        sites = read_model_spec(directory).lora_sites
    rows = [measure(sites, case) for case in CASES]
    content = common.about("placing an adapter on the device", "benchmarks.lifecycle.placement", ())
    path = common.write_result({**content, "placements": rows}, "placement", args.json)
    columns = ("mean_ms", "p99_ms", "max_ms", "mean_victims")
    cells = [[row["case"], *(f"{row[column]:.2f}" for column in columns)] for row in rows]
    print(common.table(("pool", "mean ms", "p99 ms", "max ms", "victims"), cells))
    print(f"written: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
