"""What every benchmark shares: where its figures come from, percentiles, and the file that they are written to."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorikeet import __version__

Row = dict[str, Any]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Names the commit where the tree was copied without its history.
COMMIT_VARIABLE = "LORIKEET_BENCH_COMMIT"
_SMI_FIELDS = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")


def percentiles(seconds: Sequence[float], percents: Sequence[int] = (50, 99)) -> Row:
    """Milliseconds; only ``{"n": 0}`` for no samples."""
    if not seconds:
        return {"n": 0}
    ordered = sorted(seconds)
    return {
        "n": len(ordered),
        **{f"p{percent}_ms": 1e3 * _percentile(ordered, percent) for percent in percents},
        "max_ms": 1e3 * ordered[-1],
    }


def _percentile(ordered: Sequence[float], percent: int) -> float:
    if percent == 50:
        return statistics.median(ordered)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def about(what: str, module: str, packages: Sequence[str]) -> Row:
    """Where the figures of this process come from.

    Args:
        what: one line on what is measured.
        module: as in ``python -m module``; the rest of the command is this process's.
        packages: distributions whose versions matter; those that are not installed are left out.
    """
    commit = git("rev-parse", "HEAD")
    return {
        "what": what,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "commit": commit or os.environ.get(COMMIT_VARIABLE) or "unknown",
        "uncommitted_changes": bool(git("status", "--porcelain")) if commit else None,
        "hardware": hardware(),
        "versions": {
            "python": platform.python_version(),
            "lorikeet": __version__,
            **_versions(packages),
        },
    }


def hardware() -> Row:
    """The machine: processor, memory in GB, load, and the first GPU if ``nvidia-smi`` knows one."""
    found: Row = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average": os.getloadavg()[0],
    }
    gpu = _gpu()
    return found | {"gpu": gpu} if gpu else found


def _gpu() -> Row | None:
    """Facts of the first GPU; None without one. torch is imported only where there is a driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    values = (done.stdout.splitlines() or [""])[0].split(",")
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "cuda": torch.version.cuda,
        **{name: value.strip() for name, value in zip(_SMI_FIELDS, values, strict=False)},
    }


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git(*words: str) -> str:
    """Output of a git command in this repository; empty if there is no git or no repository."""
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out text in columns, one line for each row; the first column to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, rule, *rows)
    )


def write_result(content: Row, name: str, path: Path | None = None) -> Path:
    """Write a result file and return its path.

    Args:
        path: where to; None is ``benchmarks/results/NAME-DATE.json``, with a number behind it if that is taken: a
            result is never written over.
    """
    if path is None:
        path, number = RESULTS / f"{name}-{content['date']}.json", 1
        while path.exists():
            number += 1
            path = RESULTS / f"{name}-{content['date']}-{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
