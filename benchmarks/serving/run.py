"""Measure a server under load: requests arrive as a Poisson process and their tokens are streamed.

    python -m benchmarks.serving.run --rate 2 8 inf
    python -m benchmarks.serving.run --lora-adapters 32 --distribution zipf uniform
    python -m benchmarks.serving.run --url http://localhost:30000 --lora-adapters 4

Prints tables; writes a result file and a plot (extra ``bench``) to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from benchmarks import common
from benchmarks.common import Row
from benchmarks.engine.fixtures import LLAMA_8B
from benchmarks.engine.run import option
from benchmarks.engine.traffic import DISTRIBUTIONS, Traffic, choose_adapters
from benchmarks.serving.client import Client
from benchmarks.serving.measure import Load, run_load, summarize
from benchmarks.serving.target import Target, forget_prefixes, running, started

WHAT = "server under load: Poisson arrivals, streamed; milliseconds from the arrival of a request"
PACKAGES = ("torch", "triton", "flashinfer-python", "fastapi", "uvicorn", "uvloop", "pyzmq")
# Rows of the table by adapter; the file holds them all.
_SHOWN_ADAPTERS = 12


def main(argv: Sequence[str] | None = None) -> None:
    """Run every rate with every distribution and write the results."""
    args = _parser().parse_args(argv)
    content = {**common.about(WHAT, "benchmarks.serving.run", PACKAGES), **_setting(args)}
    rows: list[Row] = []
    content["rows"] = rows
    if args.url:
        target = nullcontext(running(args.url.rstrip("/"), args.lora_adapters))
    else:
        target = started(args.model, args.lora_adapters, args.rank, dict(args.option))
    try:
        with target as server:
            content["server"] = {k: v for k, v in server.info.items() if k != "adapters"}
            measure(server, args, rows)
    finally:
        # What was measured before a failure is kept.
        path = common.write_result(content, "serving", args.json)
        print(f"\n{tables(rows)}\n\nwritten: {path}")
    if args.plot:
        _plot(content, path.with_suffix(".png"))


def measure(target: Target, args: argparse.Namespace, rows: list[Row]) -> None:
    """Add one row for each distribution and rate."""
    client = Client(target.url)
    traffic = Traffic(target.vocab_size)
    _say("warm-up")
    warm = Load(
        target.adapters or (None,) * 4, args.input_len, min(8, args.output_len), float("inf")
    )
    run_load(client, traffic, warm)
    for distribution in args.distribution if target.adapters else ["none"]:
        chosen = choose_adapters(target.adapters, args.requests, distribution, random.Random(0))
        for rate in args.rate:
            _say(f"{distribution}: {args.requests} requests at {rate:g} a second")
            forget_prefixes(target.url)
            load = Load(tuple(chosen), args.input_len, args.output_len, rate)
            records = run_load(client, traffic, load)
            rows.append({"distribution": distribution, **summarize(records, load)})


def _setting(args: argparse.Namespace) -> Row:
    return {
        "model": None if args.url else args.model,
        "url": args.url,
        "lora": {"adapters": args.lora_adapters, "rank": args.rank} if args.lora_adapters else None,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "options": {name: str(value) for name, value in args.option},
    }


def tables(rows: Sequence[Row]) -> str:
    """The results for a person."""
    header = (
        "adapters",
        "req/s asked",
        "req/s",
        "out tok/s",
        "errors",
        "first token",
        "next token",
    )
    header += ("each token", "whole reply", "client late")
    lines = [
        [
            row["distribution"],
            str(row["rate"]),
            _number(row["requests_per_s"]),
            _number(row["output_tokens_per_s"]),
            str(row["errors"]),
            *(_times(row[key]) for key in ("first_token", "between_tokens", "per_token")),
            _times(row["end_to_end"]),
            _times(row["client_lag"]),
        ]
        for row in rows
    ]
    parts = [
        "Times: median / 90th / 99th percentile in ms, from the arrival of a request.",
        common.table(header, lines),
    ]
    parts += [_adapter_table(row) for row in rows if len(row["by_adapter"]) > 1]
    parts += [f"errors: {text}" for row in rows for text in row["error_examples"]]
    return "\n".join(parts)


def _adapter_table(row: Row) -> str:
    items = list(row["by_adapter"].items())
    lines = [
        [
            name or "base model",
            str(some["requests"]),
            str(some["errors"]),
            _times(some["first_token"]),
            _times(some["between_tokens"]),
        ]
        for name, some in items[:_SHOWN_ADAPTERS]
    ]
    header = ("adapter", "requests", "errors", "first token", "next token")
    more = len(items) - len(lines)
    title = f"By adapter: {row['distribution']} at {row['rate']} requests a second"
    return f"{title}{f', {more} more in the file' if more else ''}\n{common.table(header, lines)}"


def _times(times: Row) -> str:
    if not times["n"]:
        return "-"
    return " / ".join(f"{times[f'p{percent}_ms']:.1f}" for percent in (50, 90, 99))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _plot(content: Row, path: Path) -> None:
    try:
        from benchmarks.serving.plot import plot
    except ImportError as error:
        print(f"no plot: {error} (pip install -e '.[bench]')")
        return
    plot(content, path)
    print(f"written: {path}")


def _say(text: str) -> None:
    print(f"-- {text}", file=sys.stderr, flush=True)


def _rate(text: str) -> float:
    rate = float(text)
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a rate above 0")
    return rate


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--url", help="a server that runs already; its adapters are used as they are")
    add(
        "--model",
        default=LLAMA_8B,
        help=f"directory with a config.json, demo, or {LLAMA_8B} (default)",
    )
    add("--rate", type=_rate, nargs="+", default=[2.0, 8.0, float("inf")], help="requests a second")
    add("--requests", type=int, default=200, help="at each rate")
    add("--input-len", type=int, default=128)
    add("--output-len", type=int, default=128)
    add("--lora-adapters", type=int, default=0, metavar="N", help="0: the base model alone")
    add("--rank", type=int, default=16)
    add("--distribution", choices=DISTRIBUTIONS, nargs="+", default=["zipf"])
    add("--json", type=Path, metavar="FILE", help="default: a new file in benchmarks/results")
    add("--plot", action="store_true", help="write a picture beside the result file")
    add("--option", type=option, action="append", default=[], metavar="NAME=VALUE")
    return parser


if __name__ == "__main__":
    main()
