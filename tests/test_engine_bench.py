"""``benchmarks/engine``: its figures from made-up times and traces, and one whole run on a tiny model."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from benchmarks import common
from benchmarks.engine import floor, measure, run
from benchmarks.engine.fixtures import (
    LLAMA_8B,
    linear_sites,
    model_directory,
    write_adapters,
    write_model,
)
from benchmarks.engine.floor import Machine, linear_shapes, measure_floor
from benchmarks.engine.measure import Load, Timeline
from benchmarks.engine.profiling import gaps, kind_of, read_trace, union
from benchmarks.engine.tables import tables
from benchmarks.engine.traffic import Traffic, choose_adapters
from lorikeet.adapters.layout import PoolLayout
from lorikeet.core.failure import Failure
from lorikeet.core.request import FinishReason, RequestOutput
from lorikeet.engine.core import EngineCore
from lorikeet.lora.loader import load_adapter
from lorikeet.models.spec import read_model_spec
from lorikeet.text.tokenizer import Tokenizer

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    write_model(path, TINY)
    return path


# ---- models, adapters, traffic ----


def test_shape_of_the_8b_model(tmp_path):
    path, load_format = model_directory(LLAMA_8B, tmp_path)
    spec = read_model_spec(path)
    assert (load_format, spec.rope.kind, spec.max_context_length) == ("dummy", "llama3", 131072)
    # Everything but the embedding table and the norms, which are no GEMMs.
    linear = sum(rows * columns for rows, columns in linear_shapes(spec))
    norms = 65 * 4096
    assert linear == spec.num_parameters - 128256 * 4096 - norms
    assert len(linear_shapes(spec)) == 32 * 4 + 1


def test_tokenizer_has_every_id_and_keeps_text(tiny):
    tokenizer = Tokenizer.load(tiny)
    assert tokenizer.decode(tokenizer.encode("Grüße, 2 m")) == "Grüße, 2 m"
    assert tokenizer.decode([319]) == " w319"


def test_adapters_fit_and_differ(tiny, tmp_path):
    spec = read_model_spec(tiny)
    targets = frozenset(part.name for site in linear_sites(spec) for part in site.slices)
    layout = PoolLayout.make(
        spec.lora_sites, targets, max_rank=4, max_loras_per_batch=1, element_size=4
    )
    first, second = (
        load_adapter("a", path, spec.lora_sites, layout, torch.float32)
        for path in write_adapters(tmp_path / "adapters", 2, spec, rank=4)
    )
    assert first.digest != second.digest
    assert len(first.modules) == 2 * 7


def test_distributions():
    names = [f"a{number}" for number in range(4)]

    def counts(distribution: str, num: int = 4000) -> Counter[str | None]:
        return Counter(choose_adapters(names, num, distribution, random.Random(0)))

    assert set(counts("distinct").values()) == {1000}
    assert counts("identical") == {"a0": 4000}
    assert counts("none") == {None: 4000}
    assert all(abs(count - 1000) < 120 for count in counts("uniform").values())
    zipf = counts("zipf")
    assert zipf["a0"] / zipf["a3"] == pytest.approx(4, rel=0.2)
    assert choose_adapters([], 2, "zipf", random.Random(0)) == [None, None]
    with pytest.raises(ValueError, match="known: uniform"):
        choose_adapters(names, 1, "even", random.Random(0))


# ---- times ----


def outputs(*ids: int, tokens: int = 1) -> list[RequestOutput]:
    return [RequestOutput(id=number, token_ids=[1] * tokens) for number in ids]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)
    return clock


def test_timeline_counts_only_steps_in_which_all_decode(clock):
    timeline = Timeline(2, 0.0)
    steps = [(1.0, [0]), (3.0, [0, 1]), (4.0, [0, 1]), (4.5, [0, 1]), (9.0, [1])]
    for now, ids in steps:
        clock.now = now
        assert timeline.note(outputs(*ids))
    clock.now = 20.0
    assert not timeline.note([])
    assert timeline.prefill_s == 3.0
    assert timeline.step_seconds() == [1.0, 0.5]
    assert timeline.decode_s() == 6.0
    assert timeline.total_s == 9.0
    assert timeline.num_tokens == 8


def test_timeline_shares_a_step_among_its_tokens(clock):
    timeline = Timeline(1, 0.0)
    for now, tokens in ((1.0, 1), (2.0, 2)):
        clock.now = now
        timeline.note(outputs(0, tokens=tokens))
    assert timeline.step_seconds() == [0.5]


def test_timeline_refuses_a_failed_request():
    failed = RequestOutput(
        id=7, token_ids=[], finish=FinishReason(kind="abort", failure=Failure("aborted", "full"))
    )
    with pytest.raises(RuntimeError, match="7: full"):
        Timeline(1, 0.0).note([failed])


def test_median_of_runs(monkeypatch):
    runs = iter([Timeline(1, 0.0), *(_timeline(step) for step in (0.1, 0.3, 0.2))])
    monkeypatch.setattr(measure, "generate", lambda core, requests: next(runs))
    monkeypatch.setattr(measure, "forget_prefixes", lambda core: None)
    row = measure.measure_load(cast("EngineCore", None), Traffic(8), Load(4, 3, ("a",)), repeats=3)
    assert row["inter_token_ms"] == pytest.approx(200)
    assert row["mean_inter_token_ms"] == pytest.approx(200)
    assert row["output_tokens_per_s"] == pytest.approx(3 / 1.4)
    assert row["total_tokens_per_s"] == pytest.approx(7 / 1.4)
    assert (row["distinct_adapters"], len(row["runs"])) == (1, 3)


def _timeline(step: float) -> Timeline:
    """One request: first token after a second, then two more."""
    times = [1.0, 1.0 + step, 1.0 + 2 * step]
    return Timeline(
        1, 0.0, [(time, 1, 1) for time in times], {"a": times[0]}, {"a": times[-1]}, num_tokens=3
    )


# ---- profile ----


def test_kinds():
    names = {
        "nvjet_tst_64x8_64x16_4x2_h_bz_TNT": "gemm",
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>": "attention",
        "void flashinfer::BatchDecodeWithPagedKVCacheKernel<...>": "attention",
        "_attend": "attention",
        "_rms_norm_kernel": "norm",
        "rope_and_store_kv_kernel": "rope",
        "silu_mul_kernel": "silu-mul",
        "_lora_shrink": "lora",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "void at::native::reduce_kernel<512, 1, ArgMaxOps<float>>": "sampling",
        "embedding_gather": "embedding",
        "vectorized_elementwise_kernel": "other",
    }
    assert {name: kind_of(name) for name in names} == names


def test_union_and_gaps():
    busy = union([(5, 6), (1, 3), (2, 4), (4, 4.5)])
    assert busy == [(1, 4.5), (5, 6)]
    assert gaps(busy, 0, 10) == [1, 0.5, 4]
    assert gaps([], 0, 2) == [2]


def _event(category: str, name: str, begin: float, length: float, tid: int = 1) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": length, "tid": tid}


def test_trace_of_a_gpu(tmp_path):
    events = [
        _event("user_annotation", "lorikeet.measured_steps", 100, 100),
        _event("gpu_user_annotation", "lorikeet.measured_steps", 0, 500),
        _event("kernel", "nvjet_a", 90, 20),  # half of it lies before the window
        _event("kernel", "nvjet_a", 112, 38, tid=7),
        _event("kernel", "_lora_expand", 130, 40, tid=8),  # beside the GEMM
        _event("gpu_memcpy", "Memcpy HtoD", 180, 20),
        _event("kernel", "late", 250, 10),
        _event("cpu_op", "aten::mm", 100, 100),
        _event("cuda_runtime", "cudaEventSynchronize", 120, 60),
        _event("cuda_runtime", "cudaEventSynchronize", 120, 60, tid=2),
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = read_trace(path, num_steps=2)
    assert found["of"] == "kernels"
    # 10 + 58 + 20 of 100 us are busy; the gaps are 2 and 10 us.
    assert found["profiled_step_ms"] == pytest.approx(0.050)
    assert found["busy_ms"] == pytest.approx(0.044)
    assert found["idle_ms"] == pytest.approx(0.006)
    assert found["host_gaps_ms"] == pytest.approx(0.005)
    assert found["host_work_ms"] == pytest.approx(0.020)
    assert list(found["kinds"]) == ["gemm", "lora", "copies"]
    assert found["kinds"]["gemm"] == pytest.approx({"ms": 0.029, "calls": 1.0})
    assert found["longest"][0]["name"] == "nvjet_a"


# ---- whole runs ----


def test_whole_run_on_a_tiny_model(tiny, tmp_path, capsys):
    file = tmp_path / "result.json"
    options = f"--model {tiny} --device cpu --concurrency 1,3 --lengths 16/8 --prefill 2/64"
    options += " --prefix-hit 2/320 --repeats 1 --lora-adapters 2 --rank 4 --active 1,2 --with-base"
    options += f" --distribution distinct none --json {file} --profile {tmp_path / 'profile'}"
    run.main([*options.split(), "--option", "page_size=8"])
    content = json.loads(file.read_text())
    assert content["complete"]
    assert content["options"] == {"page_size": "8"}
    assert content["versions"]["torch"] == torch.__version__
    base, distinct, none = content["runs"]
    assert [base["name"], distinct["name"], none["name"]] == ["base", "LoRA distinct", "LoRA none"]
    assert base["engine"]["page_size"] == 8
    assert [load["distinct_adapters"] for load in distinct["loads"]] == [1, 2]
    assert [load["distinct_adapters"] for load in none["loads"]] == [0, 0]
    _check_ratios(content, base, distinct)
    (hit,) = base["prefix_hit"]
    assert hit["cached_share"] == pytest.approx(0.9)
    assert hit["times_faster"] == hit["cold_ms"] / hit["hit_ms"]
    profile = distinct["profile"]
    assert (profile["of"], profile["concurrency"]) == ("operators", 3)
    assert profile["kinds"]["gemm"]["calls"] >= len(linear_shapes(read_model_spec(tiny)))
    assert profile["busy_ms"] + profile["idle_ms"] == pytest.approx(profile["profiled_step_ms"])
    assert (tmp_path / "profile" / profile["trace"]).exists()
    shown = capsys.readouterr().out
    assert tables(content) in shown
    assert "LoRA distinct, 2" in shown


def _check_ratios(content: dict, base: dict, distinct: dict) -> None:
    for own, other in zip(distinct["loads"], base["loads"], strict=True):
        gemms = content["floor"]["gemms_ms"][str(own["concurrency"])]
        assert own["times_gemms"] == own["inter_token_ms"] / gemms
        assert own["of_base"] == own["output_tokens_per_s"] / other["output_tokens_per_s"]
        assert other["of_base"] is None
        assert own["steps_measured"] == own["output_len"] - 1
    (prefill,) = base["prefill"]
    assert prefill["of_matmul_rate"] == prefill["linear_tflops"] / content["floor"]["matmul_tflops"]


def test_a_failing_run_keeps_what_it_has(tiny, tmp_path, capsys):
    file = tmp_path / "result.json"
    options = f"--model {tiny} --device cpu --concurrency 1 --lengths 16/4 600/4 --no-floor"
    with pytest.raises(RuntimeError, match="600"):
        run.main([*options.split(), "--json", str(file)])
    content = json.loads(file.read_text())
    assert not content["complete"]
    assert len(content["runs"][0]["loads"]) == 1
    assert "NOT COMPLETE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--active 1,2 --concurrency 1", "--active has 2 numbers"),
        ("--active 3 --lora-adapters 2", "more than the 2 adapters"),
        ("--profile-concurrency 5", "none of --concurrency"),
        ("--option speed=1", "is not NAME=VALUE of an engine option"),
        ("--prefill many", "PROMPTS/LENGTH"),
    ],
)
def test_options_that_contradict(words, message, capsys):
    with pytest.raises(SystemExit):
        run.main(words.split())
    assert message in capsys.readouterr().err


def test_results_are_never_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    content = {"date": "2026-11-25"}
    paths = [common.write_result(content, "engine") for _ in range(2)]
    assert [path.name for path in paths] == ["engine-2026-11-25.json", "engine-2026-11-25-2.json"]


def test_commit_of_a_copy_without_history(monkeypatch):
    monkeypatch.setattr(common, "git", lambda *words: "")
    assert common.about("x", "m", ())["commit"] == "unknown"
    monkeypatch.setenv(common.COMMIT_VARIABLE, "abc")
    about = common.about("x", "m", ("torch", "no-such-package"))
    assert (about["commit"], about["uncommitted_changes"]) == ("abc", None)
    assert about["versions"].keys() == {"python", "lorikeet", "torch"}


@pytest.mark.gpu
def test_floor_on_a_gpu(tiny):
    floor = measure_floor(
        Machine(torch.device("cuda"), torch.bfloat16), read_model_spec(tiny), (1, 4)
    )
    assert floor["matmul_tflops"] > 10
    assert floor["copy_tb_per_s"] > 0.2
    assert all(ms > 0 for ms in floor["gemms_ms"].values())


@pytest.mark.gpu
def test_whole_run_on_a_gpu(tiny, tmp_path, monkeypatch):
    # Other tests may have taken most of the device's memory.
    monkeypatch.setitem(floor._COPY_BYTES, "cuda", 2**26)
    file = tmp_path / "result.json"
    options = f"--model {tiny} --device cuda --concurrency 1,3 --lengths 16/8 --prefill 2/64"
    options += f" --prefix-hit none --repeats 1 --json {file} --profile {tmp_path / 'profile'}"
    run.main(options.split())
    content = json.loads(file.read_text())
    profile = content["runs"][0]["profile"]
    assert content["hardware"]["gpu"]["multiprocessors"] > 0
    assert profile["of"] == "kernels"
    assert {"gemm", "attention"} <= profile["kinds"].keys()
