"""Which library's attention is fastest here: decode and prefill over paged keys and values.

    FLASHINFER_WORKSPACE_BASE=/tmp/fi python -m benchmarks.ops.attention --json FILE

Needs a CUDA device; a library that is not installed is reported and left out. Every path is first compared with fp32
arithmetic, then timed in a CUDA graph over more keys and values than the L2 cache holds. First all kernels are compiled,
side by side; then each path runs in a process of its own, so that one that fails or hangs takes no other with it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_ERROR = 1e-2
_BUILD_SECONDS = 200
_PATH_SECONDS = 75
_REPLAYS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--paths", nargs="+", help="only these paths")
    parser.add_argument("--seconds", type=float, default=330, help="start nothing after this long")
    parser.add_argument("--build", metavar="MODULE", help="compile one module and stop")
    parser.add_argument("--one", metavar="PATH", help="measure one path in this process and stop")
    args = parser.parse_args()
    if args.build:
        from benchmarks.ops.attention_paths import build

        build(args.build)
    elif args.one:
        args.json.write_text(json.dumps(measure_path(args.one)))
    else:
        run_all(args.paths, args.seconds, args.json)


def run_all(names: list[str] | None, seconds: float, json_file: Path | None) -> None:
    """Build, then measure, each in processes of its own; print the tables last."""
    from benchmarks.ops.attention_paths import MODULES, PATHS

    find_cuda()
    deadline = time.monotonic() + seconds
    paths = [path for path in PATHS if names is None or path.name in names]
    wanted = [module for module in MODULES if any(path.module == module for path in paths)]
    record: dict[str, Any] = {"machine": machine(), "builds": build_all(wanted), "paths": []}

    def add(path: Any, result: dict[str, Any]) -> None:
        record["paths"].append({"kind": path.kind, **result})
        note = result.get("error") or f"{result['seconds']:.0f} s"
        print(f"[path] {path.name}: {note}", flush=True)
        save(record, json_file)

    ready = []
    for path in paths:
        problem = record["builds"].get(path.module, {}).get("error")
        if problem:
            add(path, {"name": path.name, "error": f"build failed: {problem}"})
        else:
            ready.append(path)
    with tempfile.TemporaryDirectory() as folder:
        # The next process imports its libraries while this one measures.
        upcoming = PathProcess(ready[0].name, Path(folder)) if ready else None
        for path, following in zip(ready, [*ready[1:], None], strict=True):
            assert upcoming is not None
            current = upcoming
            upcoming = PathProcess(following.name, Path(folder)) if following else None
            add(path, current.result(deadline))
    print_tables(record)


class PathProcess:
    """Measures one path; imports at once, touches the device only when its result is asked for."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.out = folder / f"{name}.json"
        command = [sys.executable, "-m", "benchmarks.ops.attention", "--one", name]
        self.process = subprocess.Popen(
            [*command, "--json", str(self.out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def result(self, deadline: float) -> dict[str, Any]:
        """Let it run and wait for it; what went wrong is ``error`` of the result."""
        begin = time.monotonic()
        if begin > deadline:
            self.process.kill()
            self.process.communicate()
            return {"name": self.name, "error": "left out: no time"}
        try:
            log, _ = self.process.communicate("go\n", timeout=_PATH_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            log, _ = self.process.communicate()
            return {
                "name": self.name,
                "error": f"not done after {_PATH_SECONDS} s: {log.strip()[-200:]}",
            }
        if not self.out.exists():
            code = self.process.returncode
            return {"name": self.name, "error": f"exit {code}: {log.strip()[-300:]}"}
        return {**json.loads(self.out.read_text()), "seconds": time.monotonic() - begin}


def save(record: dict[str, Any], json_file: Path | None) -> None:
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=1))


def machine() -> dict[str, Any]:
    """Hardware and versions, and the bandwidth of a plain copy: bytes read plus bytes written."""
    import torch

    source = torch.empty(2**31, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source))
    found = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "copy_tb_s": 2 * source.nbytes / seconds / 1e12,
        "command": sys.argv,
    }
    for package in ("flashinfer-python", "sglang-kernel", "flash-attn-4", "nvidia-cutlass-dsl"):
        found[package] = installed_version(package)
    print(f"[machine] {found}", flush=True)
    return found


def installed_version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def find_cuda() -> None:
    """Say where CUDA and its headers are, for the compilers of this process and its children.

    ``nvcc`` in the path may be a script that lies elsewhere, and a toolkit may come without headers that Python packages
    bring along.
    """
    nvcc = shutil.which("nvcc")
    homes = [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    if nvcc is not None:
        homes.insert(0, Path(nvcc).resolve().parent.parent)
    for home in homes:
        if (home / "include" / "cuda.h").exists() and (home / "bin" / "nvcc").exists():
            os.environ.setdefault("CUDA_HOME", str(home))
            break
    known = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    folders = [os.environ.get("CPLUS_INCLUDE_PATH", "")]
    for header in ("cuda.h", "curand_kernel.h"):
        if not (known / header).exists():
            folders += [str(path.parent) for path in header_in_packages(header)]
    # Searched after all that the compilers are told otherwise.
    os.environ["CPLUS_INCLUDE_PATH"] = ":".join(dict.fromkeys(filter(None, folders)))
    print(f"[cuda] {known.parent}, more headers: {os.environ['CPLUS_INCLUDE_PATH'] or 'none'}")


def header_in_packages(header: str) -> list[Path]:
    """Where the packages nvidia-* or Triton keep a header of CUDA; the first find."""
    for package, pattern in (("nvidia", "*/include"), ("triton", "backends/nvidia/include")):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            found = sorted(Path(folder).glob(f"{pattern}/{header}"))
            if found:
                return found[:1]
    return []


def build_all(modules: list[str]) -> dict[str, dict[str, Any]]:
    """Compile side by side.

    Returns:
        By module, ``seconds`` and, if it failed, ``error`` in one line.
    """
    jobs = str(max(2, (os.cpu_count() or 2) // max(1, len(modules)) + 1))
    begin = time.monotonic()
    running, done = {}, {}
    for module in modules:
        log = tempfile.NamedTemporaryFile("w+", suffix=f"-{module}.log", delete=False)  # noqa: SIM115
        command = [sys.executable, "-m", "benchmarks.ops.attention", "--build", module]
        environment = {**os.environ, "MAX_JOBS": jobs}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        running[module] = (process, log.name)
    while running:
        time.sleep(0.2)
        for module, (process, log_name) in list(running.items()):
            passed = time.monotonic() - begin
            code = process.poll()
            if code is None and passed < _BUILD_SECONDS:
                continue
            done[module] = {"seconds": passed}
            if code is None:
                process.kill()
                done[module]["error"] = f"not done after {passed:.0f} s"
            elif code != 0:
                done[module]["error"] = last_error(Path(log_name).read_text())
            del running[module]
            print(f"[build] {module}: {done[module]}", flush=True)
    return done


def last_error(log: str) -> str:
    """The line of a log that says most about why it ended: the compiler's first complaint, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\berror: |fatal error|cannot find -l", line)]
    return (telling[0] if telling else (lines or ["no output"])[-1])[:300]


def measure_path(name: str) -> dict[str, Any]:
    """Check and time one path in this process; an error ends it, what was measured before is kept."""
    from benchmarks.ops.attention_cases import DECODE, PREFILL, RAGGED, RAGGED_PREFILL, make_case
    from benchmarks.ops.attention_paths import PATHS

    path = next(path for path in PATHS if path.name == name)
    if path.module is not None:
        import flashinfer  # noqa: F401 - slow: before the device is this process's
    sys.stdin.readline()
    decodes = path.kind == "decode"
    result: dict[str, Any] = {"name": name, "kind": path.kind, "checks": {}, "cases": {}}
    try:
        ragged = RAGGED if decodes else RAGGED_PREFILL
        for poison in (False, True):
            case = make_case(ragged, path.page_size, sets=1, poison=poison)
            label = "ragged-nan" if poison else "ragged"
            result["checks"][label] = check(path.prepare, case)
        for shape in DECODE if decodes else PREFILL:
            case = make_case(shape, path.page_size)
            result["cases"][shape.name] = measure_case(path, case)
    except Exception as error:  # noqa: BLE001 - whatever a library throws is a line of the table
        result["error"] = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
        traceback.print_exc()
    return result


def check(prepare: Callable[[Any], Any], case: Any) -> float:
    import torch

    from benchmarks.ops.attention_cases import error_of

    out_TQH = prepare(case).run(0)
    torch.cuda.synchronize()
    return error_of(case, out_TQH)


def measure_case(path: Any, case: Any) -> dict[str, float]:
    """Error, microseconds of one call, TB/s of keys and values or TFLOP/s, and microseconds of host time for a plan."""
    import torch

    from benchmarks.ops.attention_cases import error_of

    prepared = path.prepare(case)
    found = {"error": error_of(case, prepared.run(len(case.k) - 1), at=len(case.k) - 1)}
    sets = range(len(case.k))
    if path.kind == "decode":
        replay = captured(prepared.run, sets)
        seconds = median_seconds(replay) / len(sets)
        found["tb_s"] = case.shape.kv_bytes / seconds / 1e12
    else:
        # Calls of this length hide the host's work, so they need no graph.
        seconds = median_seconds(lambda: [prepared.run(i) for i in sets]) / len(sets)
        found["tflop_s"] = case.shape.flops / seconds / 1e12
    found["us"] = seconds * 1e6
    if prepared.plan is not None:
        times = []
        for _ in range(10):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            prepared.plan()
            times.append(time.perf_counter() - begin)
        found["plan_us"] = statistics.median(times) * 1e6
    return found


def captured(run: Callable[[int], Any], sets: range) -> Callable[[], None]:
    """A graph of one call for each set, and what replays it."""
    import torch

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for i in sets[:2]:
            run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in sets:
            run(i)
    return graph.replay


def median_seconds(work: Callable[[], Any]) -> float:
    import torch

    for _ in range(3):
        work()
    times = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def print_tables(record: dict[str, Any]) -> None:
    from benchmarks.ops.attention_cases import DECODE, PREFILL

    copy = record["machine"]["copy_tb_s"]
    results = record["paths"]
    print(f"\ndevice copy, read plus written: {copy:.2f} TB/s")
    print("\nrelative error over ragged lengths; with NaN in the places that nobody owns")
    for result in results:
        checks = result.get("checks", {})
        print(f"{result['name']:>12}", {name: f"{value:.1e}" for name, value in checks.items()})
    for kind, shapes, unit in (("decode", DECODE, "tb_s"), ("prefill", PREFILL, "tflop_s")):
        names = [shape.name for shape in shapes]
        print(f"\n{kind}: us | {'TB/s of K/V | share of copy' if kind == 'decode' else 'TFLOP/s'}")
        print(" " * 12 + "".join(f"{name:>20}" for name in names))
        for result in results:
            if result.get("kind") != kind:
                continue
            cells = [cell(result.get("cases", {}).get(name), unit, copy) for name in names]
            print(f"{result['name']:>12}" + "".join(f"{text:>20}" for text in cells))
    print("\nhost time of plan(), us")
    for result in results:
        plans = {
            name: round(case["plan_us"])
            for name, case in result.get("cases", {}).items()
            if "plan_us" in case
        }
        if plans:
            print(f"{result['name']:>12}", plans)
    print("\nfailures")
    for result in results:
        if "error" in result:
            print(f"{result['name']:>12}: {result['error']}")


def cell(case: dict[str, float] | None, unit: str, copy: float) -> str:
    if case is None:
        return "-"
    if not case["error"] < MAX_ERROR:
        return f"WRONG {case['error']:.0e}"
    share = f" {case[unit] / copy:4.0%}" if unit == "tb_s" else ""
    return f"{case['us']:.1f} {case[unit]:.3g}{share}"


if __name__ == "__main__":
    main()
