"""Measure what it costs that adapters come and go.

    python -m benchmarks.lifecycle.run             # the full setting, about 15 minutes on 2 cores
    python -m benchmarks.lifecycle.run --quick     # every measurement once, about a minute

Prints tables; writes a result file and a plot (extra ``bench``) to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.lifecycle.fixtures import (
    ALL_LINEAR,
    AdapterShape,
    ModelShape,
    write_adapters,
    write_model,
)
from benchmarks.lifecycle.measure import TIERS, Bench, Row, cold_start, live_adapters, load_pause
from lorikeet.utils import format_table

SMALL = AdapterShape(rank=8, targets=("q_proj", "v_proj"))
MEASUREMENTS = ("cold_start", "live_adapters", "load_pause")
LARGE = AdapterShape(rank=64, targets=ALL_LINEAR)


def main() -> None:
    """Run every measurement and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slots", type=int, nargs="+", help="default: 2 4 16")
    parser.add_argument("--registered", type=int, nargs="+", help="default: 10 100 500 2000")
    parser.add_argument("--seconds", type=float, help="of each measurement; default: 15")
    parser.add_argument(
        "--only", choices=MEASUREMENTS, help="one of the measurements; no plot then"
    )
    parser.add_argument("--quick", action="store_true", help="other defaults: 2, 10, 2 seconds")
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    args = parser.parse_args()
    slots = args.slots or ([2] if args.quick else [2, 4, 16])
    registered = args.registered or ([10] if args.quick else [10, 100, 500, 2000])
    seconds = args.seconds or (2.0 if args.quick else 15.0)
    wanted = (args.only,) if args.only else MEASUREMENTS
    results = measure(wanted, slots, registered, seconds)
    print(f"\n{tables(results)}\n")
    content = {**about(), "seconds_of_each": seconds, **results}
    args.out.mkdir(parents=True, exist_ok=True)
    name = "-".join(["lifecycle", *([args.only] if args.only else []), str(content["date"])])
    path = args.out / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"written: {path}")
    if not args.only:
        _plot(content, path.with_suffix(".png"))


def _plot(content: dict[str, Any], path: Path) -> None:
    try:
        from benchmarks.lifecycle.plot import plot
    except ImportError as error:
        print(f"no plot: {error} (pip install -e '.[bench]')")
        return
    plot(content, path)
    print(f"written: {path}")


def measure(
    wanted: Sequence[str], slots: list[int], registered: list[int], seconds: float
) -> dict[str, list[Row]]:
    """The rows of the wanted measurements, by their names."""
    model_shape = ModelShape()
    with tempfile.TemporaryDirectory(prefix="lorikeet-lifecycle-") as temporary:
        root = Path(temporary)
        write_model(root / "model", model_shape)
        num_small = max(*registered, 4 * max(slots))
        small = write_adapters(root / "small", num_small, model_shape, SMALL)
        large = write_adapters(root / "large", 8, model_shape, LARGE)
        common = Bench(root / "model", small, SMALL, seconds)
        heavy = Bench(root / "model", large, LARGE, seconds)
        rows: dict[str, Callable[[], list[Row]]] = {
            "cold_start": lambda: _cold_rows(common, registered),
            "live_adapters": lambda: _live_rows(common, slots),
            "load_pause": lambda: _pause_rows(heavy, slots),
        }
        return {name: rows[name]() for name in wanted}


def _cold_rows(bench: Bench, registered: list[int]) -> list[Row]:
    rows: list[Row] = []
    for num in registered:
        print(f"cold start: {num} registered adapters", flush=True)
        rows.append(cold_start(bench, slots=4, registered=num))
    return rows


def _live_rows(bench: Bench, slots: list[int]) -> list[Row]:
    rows: list[Row] = []
    for num_slots in slots:
        for share in (0.5, 1, 2, 4):
            print(f"live adapters: {share:g} times {num_slots} slots", flush=True)
            rows.append(live_adapters(bench, slots=num_slots, live=int(num_slots * share)))
    return rows


def _pause_rows(bench: Bench, slots: list[int]) -> list[Row]:
    rows: list[Row] = []
    for num_slots in slots:
        print(f"pause: {num_slots} slots", flush=True)
        rows.append(load_pause(bench, slots=num_slots))
    return rows


def about() -> dict[str, Any]:
    """Where these numbers come from."""
    what = "adapters that come and go: time to first token by tier, more live adapters than slots, pauses by loads"
    packages = ("torch", "safetensors", "fastapi", "uvicorn", "pyzmq")
    return {
        **common.about(what, "benchmarks.lifecycle.run", packages),
        "model": asdict(ModelShape()),
        "adapters": {"small": asdict(SMALL), "large (load_pause)": asdict(LARGE)},
    }


def tables(results: dict[str, list[Row]]) -> str:
    """The results for a person; times are milliseconds."""
    cold = [
        (
            str(row["registered"]),
            str(row["max_loaded_loras"]),
            _times(row["load"]),
            *(_times(row[tier]) for tier in TIERS),
        )
        for row in results.get("cold_start", [])
    ]
    live = [
        (
            str(row["slots"]),
            str(row["live"]),
            f"{row['tokens_per_second']:.0f}",
            "{least} to {most}".format_map(row["requests_of_a_client"]),
            _times(row["first_token"]),
            _times(row["between_tokens"]),
        )
        for row in results.get("live_adapters", [])
    ]
    pause = [
        (
            str(row["slots"]),
            str(row["loads"]),
            _times(row["load"]),
            *(
                f"{_times(row[beside])} = {row['longest_gap_to_step'][beside]:.1f} steps"
                for beside in ("alone", "beside_requests", "beside_loads")
            ),
        )
        for row in results.get("load_pause", [])
    ]
    header = ("registered", "in host", "load", "resident", "from host", "from disk")
    live_header = ("slots", "live", "tokens/s", "requests of a client", "first token", "next token")
    pause_header = ("slots", "loads", "load", "alone", "beside requests", "beside loads")
    parts = (
        ("Time to first token by tier", header, cold),
        ("Live adapters", live_header, live),
        ("Gaps of a running stream", pause_header, pause),
    )
    lines = [
        f"{title}\n{format_table(head, rows, width=150)}" for title, head, rows in parts if rows
    ]
    return "\n".join(["Times: median / 99th percentile / longest, in ms.", *lines])


def _times(row: Row) -> str:
    if not row["n"]:
        return "-"
    return f"{row['p50_ms']:.1f} / {row['p99_ms']:.1f} / {row['max_ms']:.1f}"


if __name__ == "__main__":
    main()
