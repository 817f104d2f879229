"""Measure the engine without a server: fixed lengths, all requests at once.

    python -m benchmarks.engine.run --model llama-3.1-8b
    python -m benchmarks.engine.run --lora-adapters 32 --active 1,8,32,32 --with-base
    python -m benchmarks.engine.run --model demo --concurrency 1,4 --lengths 32/16 --prefill 4/64 --prefix-hit none

Prints tables; writes a result file to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from benchmarks import common
from benchmarks.common import Row
from benchmarks.engine.fixtures import LLAMA_8B, model_directory, write_adapters
from benchmarks.engine.floor import Machine, measure_floor
from benchmarks.engine.measure import (
    Load,
    generate,
    measure_load,
    measure_prefill,
    measure_prefix_hit,
)
from benchmarks.engine.profiling import profile_decode
from benchmarks.engine.session import Adapters, describe_engine, engine_values, with_engine
from benchmarks.engine.tables import tables
from benchmarks.engine.traffic import DISTRIBUTIONS, Traffic, choose_adapters
from lorikeet.config import OPTIONS
from lorikeet.engine.core import EngineCore
from lorikeet.models.spec import ModelSpec, read_model_spec

WHAT = "engine without a server: prefill and decode at fixed lengths, all requests at once"
PACKAGES = ("torch", "triton", "flashinfer-python", "sglang-kernel", "flash-attn-4", "safetensors")
PROFILED_STEPS = 20
Lengths = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """What is measured on each engine.

    Attributes:
        concurrency: requests at a time.
        active: for each concurrency, how many of the adapters its requests may name.
        lengths: prompt and output tokens.
        prefill, prefix_hit: number of prompts and their length; None leaves the measurement out.
        profile_dir: where traces go; None profiles nothing.
        profiled: concurrency of the profile.
    """

    concurrency: tuple[int, ...]
    active: tuple[int, ...]
    lengths: tuple[Lengths, ...]
    prefill: Lengths | None
    prefix_hit: Lengths | None
    repeats: int
    profile_dir: Path | None
    profiled: int


@dataclass(frozen=True)
class Setting:
    """An engine and what its requests ask for: a name for the tables, and the adapters."""

    name: str
    adapters: Adapters | None
    distribution: str

    def choose(self, num_requests: int, active: int) -> tuple[str | None, ...]:
        """The same adapters in every run, so that runs can be compared."""
        names = self.adapters.names[:active] if self.adapters else []
        return tuple(choose_adapters(names, num_requests, self.distribution, random.Random(0)))


def main(argv: Sequence[str] | None = None) -> None:
    """Run everything that the options ask for and write the result file."""
    parser = _parser()
    args = parser.parse_args(argv)
    plan = _plan(parser, args)
    content = {**common.about(WHAT, "benchmarks.engine.run", PACKAGES), "complete": False}
    try:
        with tempfile.TemporaryDirectory(prefix="lorikeet-engine-") as temporary:
            measure(args, plan, content, Path(temporary))
    finally:
        # What was measured before a failure is kept: time on a GPU is dear.
        path = common.write_result(content, "engine", args.json)
        if "runs" in content:
            print(f"\n{tables(content)}\n")
        print(f"written: {path}")


def measure(args: argparse.Namespace, plan: Plan, content: Row, scratch: Path) -> None:
    """Fill the content of the result file.

    Args:
        scratch: an empty directory for models and adapters.
    """
    directory, load_format = model_directory(args.model, scratch)
    spec = read_model_spec(directory)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    options: dict[str, object] = {
        "model_path": str(directory),
        "load_format": load_format,
        "device": device,
        "dtype": dtype,
        **dict(args.option),
    }
    floor = None
    if not args.no_floor:
        _say("floor: GEMMs alone, a large matmul, a copy")
        machine = Machine(torch.device(device), getattr(torch, dtype))
        floor = measure_floor(machine, spec, plan.concurrency)
    content |= {
        "model": args.model,
        "dtype": dtype,
        "options": {name: str(value) for name, value in args.option},
        "lora": {"adapters": args.lora_adapters, "rank": args.rank} if args.lora_adapters else None,
        "floor": floor,
        "runs": [],
    }
    runs: list[Row] = content["runs"]
    try:
        for settings in _settings(args, spec, scratch):
            adapters = settings[0].adapters
            _say(f"engine {'with LoRA' if adapters else 'without LoRA'}")
            values = engine_values(options, spec, adapters, max(plan.concurrency))
            work = functools.partial(
                _measure_all, spec=spec, plan=plan, settings=settings, runs=runs
            )
            with_engine(values, work)
    finally:
        compare(runs, floor)
    content["complete"] = True


def _settings(args: argparse.Namespace, spec: ModelSpec, scratch: Path) -> list[list[Setting]]:
    """The settings of each engine, in the order in which the engines are built."""
    base = [Setting("base", None, "none")]
    if not args.lora_adapters:
        return [base]
    _say(f"writing {args.lora_adapters} adapters of rank {args.rank}")
    paths = write_adapters(scratch / "adapters", args.lora_adapters, spec, args.rank)
    adapters = Adapters(tuple(paths), args.rank)
    with_lora = [Setting(f"LoRA {name}", adapters, name) for name in args.distribution]
    return [base, with_lora] if args.with_base else [with_lora]


def _measure_all(
    core: EngineCore,
    start_s: float,
    *,
    spec: ModelSpec,
    plan: Plan,
    settings: Sequence[Setting],
    runs: list[Row],
) -> None:
    """Add one entry to ``runs`` for each setting, all on one engine."""
    traffic = Traffic(spec.vocab_size)
    if settings[0].adapters is not None:
        # Their first use copies them to the device; that is not what is measured here.
        generate(core, traffic.requests(8, 2, settings[0].adapters.names))
    for setting in settings:
        run: Row = {
            "name": setting.name,
            "engine": {"start_s": start_s, **describe_engine(core)},
            "loads": [],
            "prefill": [],
            "prefix_hit": [],
            "profile": None,
        }
        runs.append(run)
        _measure_one(core, spec, plan, setting, traffic, run)


def _measure_one(
    core: EngineCore, spec: ModelSpec, plan: Plan, setting: Setting, traffic: Traffic, run: Row
) -> None:
    """Fill ``run`` with the rows of one setting."""
    for input_len, output_len in plan.lengths:
        for concurrency, active in zip(plan.concurrency, plan.active, strict=True):
            _say(f"{setting.name}: {concurrency} x {input_len}/{output_len}")
            load = Load(input_len, output_len, setting.choose(concurrency, active))
            run["loads"].append(measure_load(core, traffic, load, plan.repeats))
    everyone = max(plan.active)
    if plan.prefill:
        num_prompts, length = plan.prefill
        _say(f"{setting.name}: prefill of {num_prompts} x {length}")
        load = Load(length, 1, setting.choose(num_prompts, everyone))
        run["prefill"].append(measure_prefill(core, traffic, spec, load, plan.repeats))
    if plan.prefix_hit:
        num_prompts, length = plan.prefix_hit
        _say(f"{setting.name}: prefix hits of {num_prompts} x {length}")
        load = Load(length, 1, setting.choose(num_prompts, everyone))
        run["prefix_hit"].append(measure_prefix_hit(core, traffic, load, plan.repeats))
    if plan.profile_dir:
        run["profile"] = _profile(core, plan, setting, traffic)


def _profile(core: EngineCore, plan: Plan, setting: Setting, traffic: Traffic) -> Row:
    assert plan.profile_dir is not None
    _say(f"{setting.name}: profile at {plan.profiled}")
    index = plan.concurrency.index(plan.profiled)
    adapters = setting.choose(plan.profiled, plan.active[index])
    input_len = plan.lengths[0][0]
    # Sequences that begin first decode while the others are in prefill.
    num_tokens = 3 * PROFILED_STEPS + len(adapters) * input_len // 1024 + 16
    name = setting.name.lower().replace(" ", "-")
    trace = plan.profile_dir / f"{name}-{plan.profiled}.json.gz"
    return profile_decode(
        core, traffic.requests(input_len, num_tokens, adapters), trace, PROFILED_STEPS
    )


def compare(runs: Sequence[Row], floor: Row | None) -> None:
    """Add to every row its ratio to the floor and to the same row of the engine without LoRA, where there is one."""
    base = runs[0] if runs and runs[0]["name"] == "base" else None
    for run in runs:
        other = None if run is base else base
        for number, row in enumerate(run["loads"]):
            gemms, token = None, row["inter_token_ms"]
            if floor is not None:
                gemms = floor["gemms_ms"][str(row["concurrency"])]
            row["gemms_ms"] = gemms
            row["times_gemms"] = token / gemms if token and gemms else None
            row["of_base"] = _of_base(row, other, "loads", number, "output_tokens_per_s")
        for number, row in enumerate(run["prefill"]):
            rate = row["linear_tflops"]
            row["of_matmul_rate"] = rate / floor["matmul_tflops"] if floor else None
            row["of_base"] = _of_base(row, other, "prefill", number, "tokens_per_s")


def _of_base(row: Row, base: Row | None, kind: str, number: int, rate: str) -> float | None:
    """Quotient of a rate and the same one of the base; None if the base has no such row."""
    if base is None or number >= len(base[kind]):
        return None
    return row[rate] / base[kind][number][rate]


def _say(text: str) -> None:
    print(f"-- {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--model",
        default=LLAMA_8B,
        help=f"directory with a config.json, demo, or {LLAMA_8B} (default)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU")
    add("--concurrency", type=_numbers, default=(1, 16, 64, 256), help="default: 1,16,64,256")
    add("--lengths", type=_lengths, nargs="+", default=[(128, 128), (1024, 128)])
    add("--prefill", default="8/1024", help="prompts/length, or none")
    add("--prefix-hit", default="8/1000", help="prompts/length, or none")
    add("--lora-adapters", type=int, default=0, metavar="N", help="0: LoRA stays off")
    add("--rank", type=int, default=16)
    add("--distribution", choices=DISTRIBUTIONS, nargs="+", default=["distinct"])
    add(
        "--active",
        type=_numbers,
        help="adapters in use at each concurrency; one number for all (default: every adapter)",
    )
    add("--with-base", action="store_true", help="measure an engine without LoRA first, to compare")
    add("--repeats", type=int, default=2)
    add("--no-floor", action="store_true", help="skip the GEMMs alone")
    add("--profile", type=Path, metavar="DIR", help="write traces of decode steps there")
    add("--profile-concurrency", type=int, help="default: 64, or the largest")
    add("--json", type=Path, metavar="FILE", help="default: a new file in benchmarks/results")
    add(
        "--option",
        type=option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the engine, as in a YAML file",
    )
    return parser


def _plan(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Plan:
    concurrency = args.concurrency
    active = args.active or (args.lora_adapters,)
    if len(active) == 1:
        active *= len(concurrency)
    if len(active) != len(concurrency):
        parser.error(f"--active has {len(active)} numbers, --concurrency {len(concurrency)}")
    if max(active) > args.lora_adapters:
        parser.error(f"--active is more than the {args.lora_adapters} adapters of --lora-adapters")
    profiled = args.profile_concurrency or (64 if 64 in concurrency else max(concurrency))
    if profiled not in concurrency:
        parser.error(f"--profile-concurrency {profiled} is none of --concurrency")
    try:
        prefill, prefix_hit = _maybe_lengths(args.prefill), _maybe_lengths(args.prefix_hit)
    except ValueError:
        parser.error("--prefill and --prefix-hit are PROMPTS/LENGTH or none")
    return Plan(
        concurrency=concurrency,
        active=active,
        lengths=tuple(args.lengths),
        prefill=prefill,
        prefix_hit=prefix_hit,
        repeats=args.repeats,
        profile_dir=args.profile,
        profiled=profiled,
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _lengths(text: str) -> Lengths:
    first, second = text.split("/")
    return int(first), int(second)


def _maybe_lengths(text: str) -> Lengths | None:
    return None if text == "none" else _lengths(text)


def option(text: str) -> tuple[str, object]:
    """``NAME=VALUE`` of an engine option, the value as in a YAML file.

    Raises:
        argparse.ArgumentTypeError: it is no such thing.
    """
    name, separator, value = text.partition("=")
    name = name.replace("-", "_")
    if not separator or name not in OPTIONS:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE of an engine option")
    return name, yaml.safe_load(value)


if __name__ == "__main__":
    main()
