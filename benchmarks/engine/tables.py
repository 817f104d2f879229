"""The results of ``benchmarks.engine`` for a person.

python -m benchmarks.engine.tables results/engine-2026-11-22.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import common
from benchmarks.common import Row

# Of the longest kernels that are listed, and of their names.
_SHOWN = 12
_NAME = 72


def main() -> None:
    """Print the tables of a result file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--short", action="store_true", help="without the profile")
    args = parser.parse_args()
    content = json.loads(args.file.read_text(encoding="utf-8"))
    if "runs" in content:
        print(tables(content, profile=not args.short))
    else:
        print("nothing was measured")


def tables(content: Row, *, profile: bool = True) -> str:
    """Every table of a result file; ``profile`` is where a step's time goes."""
    parts = [_machine(content), _loads(content)]
    if any(run["prefill"] for run in content["runs"]):
        parts.append(_prefill(content))
    if any(run["prefix_hit"] for run in content["runs"]):
        parts.append(_prefix(content))
    if profile:
        profiled = (run for run in content["runs"] if run["profile"])
        parts += [profile_table(run["name"], run["profile"]) for run in profiled]
    return "\n".join(parts)


def _machine(content: Row) -> str:
    hardware, floor = content["hardware"], content["floor"]
    name = hardware.get("gpu", {}).get("name", hardware["processor"])
    line = f"{content['model']} {content['dtype']} on {name}"
    if not content["complete"]:
        line = f"NOT COMPLETE: {line}"
    if floor is None:
        return line
    return (
        f"{line}: large matmul {floor['matmul_tflops']:.4g} TFLOP/s, "
        f"copy {floor['copy_tb_per_s']:.3g} TB/s"
    )


def _loads(content: Row) -> str:
    rows = [
        [
            f"{load['input_len']}/{load['output_len']}",
            str(load["concurrency"]),
            _who(run["name"], load),
            _number(load["prefill_ms"]),
            _number(load["inter_token_ms"]),
            _number(load["mean_inter_token_ms"]),
            _number(load["gemms_ms"]),
            _number(load["times_gemms"]),
            f"{load['output_tokens_per_s']:.0f}",
            f"{load['total_tokens_per_s']:.0f}",
            _number(load["of_base"]),
        ]
        for run in content["runs"]
        for load in run["loads"]
    ]
    header = ("in/out", "at once", "adapters", "prefill ms", "token ms", "mean ms", "GEMMs ms")
    header += ("token / GEMMs", "out tok/s", "all tok/s", "of base")
    return f"Decode; of base: output tokens/s against the engine without LoRA\n{common.table(header, rows)}"


def _prefill(content: Row) -> str:
    rows = [
        [
            f"{row['concurrency']} x {row['input_len']}",
            _who(run["name"], row),
            _number(row["ms"]),
            f"{row['tokens_per_s']:.0f}",
            _number(row["linear_tflops"]),
            _number(row["of_matmul_rate"]),
            _number(row["of_base"]),
        ]
        for run in content["runs"]
        for row in run["prefill"]
    ]
    header = ("prompts", "adapters", "ms", "tokens/s", "TFLOP/s", "of the matmul", "of base")
    return f"Prefill\n{common.table(header, rows)}"


def _prefix(content: Row) -> str:
    rows = [
        [
            f"{row['concurrency']} x {row['input_len']}",
            _who(run["name"], row),
            f"{row['cached_share']:.1%}",
            _number(row["cold_ms"]),
            _number(row["hit_ms"]),
            _number(row["times_faster"]),
        ]
        for run in content["runs"]
        for row in run["prefix_hit"]
    ]
    header = ("prompts", "adapters", "from cache", "cold ms", "hit ms", "times faster")
    return f"Prefix hits\n{common.table(header, rows)}"


def profile_table(name: str, profile: Row) -> str:
    """Where a step's time goes."""
    step = profile["profiled_step_ms"]
    rows = [
        [kind, f"{row['ms']:.3f}", f"{row['ms'] / step:.1%}", f"{row['calls']:.1f}"]
        for kind, row in profile["kinds"].items()
    ]
    for label, key in (
        ("device busy" if profile["of"] == "kernels" else "in operators", "busy_ms"),
        ("all gaps", "idle_ms"),
        ("gaps of 5 us and more", "host_gaps_ms"),
        ("host works", "host_work_ms"),
        ("step", "profiled_step_ms"),
    ):
        rows.append([label, f"{profile[key]:.3f}", f"{profile[key] / step:.1%}", ""])
    title = (
        f"Profile of {name}, {profile['concurrency']} at once; "
        f"step without the profiler {profile['unprofiled_step_ms']:.3f} ms"
    )
    header = (profile["of"], "ms a step", "of the step", "calls")
    longest = [
        [row["name"][:_NAME], row["kind"], f"{row['ms']:.3f}", f"{row['calls']:.1f}"]
        for row in profile["longest"][:_SHOWN]
    ]
    names = common.table(("longest", "kind", "ms a step", "calls"), longest)
    return f"{title}\n{common.table(header, rows)}\n{names}"


def _who(name: str, row: Row) -> str:
    return f"{name}, {row['distinct_adapters']}" if row["distinct_adapters"] else name


def _number(value: float | None) -> str:
    """Three or four digits, or a dash."""
    return "-" if value is None else f"{value:.4g}" if value < 1000 else f"{value:.0f}"


if __name__ == "__main__":
    main()
