"""From options to settings: types, ranges and combinations that are refused, and what is chosen for each None."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from lorikeet import demo
from lorikeet.config import OPTIONS, LoRAPath, ServerConfig, Settings, notes, resolve
from lorikeet.errors import ConfigError


def config(**options: object) -> Settings:
    return resolve(ServerConfig(**{"model_path": "base", **options}))  # pyright: ignore[reportArgumentType]


def refused(**options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**options)
    return str(caught.value)


A = LoRAPath("a", "path/a")
B = LoRAPath("b", "path/b")


def test_every_field_is_an_option_with_a_meaning():
    assert list(OPTIONS) == [field.name for field in fields(ServerConfig)]
    assert all(option.meaning for option in OPTIONS.values())


def test_resolve_fills_what_needs_no_model():
    resolved = config()
    assert resolved.device == "cpu"
    assert resolved.lora.lora_backend == "torch"
    assert resolved.attention_backend == "sdpa"
    assert resolved.enable_lora is False
    assert resolved.served_model_name == "base"
    assert resolved.tokenizer_path == "base"
    assert (resolved.page_size, resolved.chunked_prefill_size) == (16, 2048)
    assert (resolved.max_prefill_tokens, resolved.max_running_requests) == (16384, 48)
    assert 0 <= resolved.random_seed < 2**31


def test_what_needs_the_model_stays_open():
    resolved = config(lora_paths=(A,))
    assert resolved.context_length is None
    assert resolved.lora.max_lora_rank is None
    assert resolved.lora.lora_target_modules is None
    assert resolved.max_total_tokens is None
    assert resolved.dtype == "auto"


def test_given_values_are_kept():
    given = {"page_size": 8, "chunked_prefill_size": 64, "random_seed": 0, "tokenizer_path": "t"}
    resolved = config(**given)
    assert {name: getattr(resolved, name) for name in given} == given


def test_seed_zero_is_a_seed():
    assert config(random_seed=0).random_seed == 0


@pytest.mark.parametrize(("given", "kept"), [("half", "float16"), ("float", "float32")])
def test_dtype_aliases(given, kept):
    assert config(dtype=given).dtype == kept


def test_keys_are_not_shown():
    shown = repr(config(api_key="abc-secret", admin_api_key="def-secret"))
    assert "secret" not in shown
    assert "***" in refused(api_key=17)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"port": 0}, ["--port is 0", "at least 1", "65535"]),
        ({"port": 65536}, ["--port is 65536"]),
        ({"port": "abc"}, ["--port is 'abc'", "an integer"]),
        ({"port": True}, ["--port is True", "an integer"]),
        ({"port": 1.5}, ["--port is 1.5", "an integer"]),
        ({"host": " "}, ["--host is ' '", "text"]),
        ({"model_path": ""}, ["--model-path is ''"]),
        ({"log_level": "loud"}, ["--log-level is 'loud'", "debug, info, warning"]),
        ({"dtype": "int8"}, ["--dtype is 'int8'", "bfloat16"]),
        ({"device": "tpu"}, ["--device is 'tpu'", "auto, cpu, cuda"]),
        ({"device": "cuda"}, ["--device is cuda", "no CUDA device", "allowed: auto, cpu"]),
        ({"context_length": 1}, ["--context-length is 1", "at least 2"]),
        ({"max_loras_per_batch": 0}, ["--max-loras-per-batch is 0", "at least 1"]),
        ({"lora_eviction_policy": "mru"}, ["--lora-eviction-policy", "lru, fifo"]),
        (
            {"lora_backend": "cutlass"},
            ["--lora-backend is 'cutlass'", "auto, torch, triton, csgmv"],
        ),
        ({"lora_backend": "triton"}, ["--lora-backend is triton", "needs a GPU", "auto, torch"]),
        ({"lora_backend": "csgmv"}, ["--lora-backend is csgmv", "needs a GPU"]),
        ({"max_lora_chunk_size": 48}, ["--max-lora-chunk-size is 48", "16, 32, 64, 128"]),
        ({"tp_size": 2}, ["--tp-size is 2", "more than the devices", "1"]),
        ({"tp_size": 0}, ["--tp-size is 0"]),
        ({"mem_fraction_static": 1.0}, ["--mem-fraction-static is 1.0", "below 1"]),
        ({"mem_fraction_static": 0}, ["--mem-fraction-static is 0", "above 0"]),
        ({"mem_fraction_static": "much"}, ["--mem-fraction-static is 'much'", "a number"]),
        ({"mem_fraction_static": float("nan")}, ["--mem-fraction-static is nan"]),
        ({"max_running_requests": 0}, ["--max-running-requests is 0"]),
        ({"max_total_tokens": 8}, ["--max-total-tokens is 8", "one page", "16"]),
        ({"chunked_prefill_size": -1}, ["--chunked-prefill-size is -1"]),
        ({"max_prefill_tokens": 0}, ["--max-prefill-tokens is 0"]),
        ({"page_size": 0}, ["--page-size is 0"]),
        ({"schedule_policy": "random"}, ["--schedule-policy", "fcfs, lpm"]),
        ({"cuda_graph_bs": (1, 0)}, ["--cuda-graph-bs", "integers"]),
        ({"attention_backend": "flashinfer"}, ["--attention-backend is flashinfer", "sdpa"]),
        ({"load_format": "gguf"}, ["--load-format", "auto, safetensors, dummy"]),
        ({"random_seed": -1}, ["--random-seed is -1"]),
        ({"disable_radix_cache": "yes"}, ["--disable-radix-cache is 'yes'", "true or false"]),
        ({"served_model_name": "org:base"}, ["--served-model-name is 'org:base'", "without ':'"]),
        ({"model_path": "a:b"}, ["--served-model-name is 'a:b'"]),
        ({"lora_paths": 3.5}, ["--lora-paths is 3.5"]),
        ({"lora_disk_cache_gb": 0}, ["--lora-disk-cache-gb is 0", "above 0"]),
        ({"lora_root": ("",)}, ["--lora-root is"]),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(options, words):
    message = refused(**options)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enable_lora": False, "lora_paths": (A,)}, ["--no-enable-lora", "--lora-paths"]),
        ({"enable_lora": True}, ["--max-lora-rank and --lora-target-modules"]),
        ({"enable_lora": True, "max_lora_rank": 8}, ["needs --lora-target-modules"]),
        ({"enable_lora": True, "lora_target_modules": ("all",)}, ["needs --max-lora-rank"]),
        ({"max_lora_rank": 8}, ["--max-lora-rank given", "LoRA is off", "--enable-lora"]),
        ({"lora_target_modules": ("all",)}, ["--lora-target-modules given", "LoRA is off"]),
        ({"max_loaded_loras": 9}, ["--max-loaded-loras given", "LoRA is off"]),
        ({"lora_root": (".",)}, ["--lora-root given", "LoRA is off"]),
        ({"lora_resolver_dir": "."}, ["--lora-resolver-dir given", "LoRA is off"]),
        ({"lora_disk_cache_dir": "c"}, ["--lora-disk-cache-dir given", "LoRA is off"]),
        ({"lora_disk_cache_gb": 3}, ["--lora-disk-cache-gb given", "LoRA is off"]),
        (
            {"lora_paths": (A,), "lora_root": ("/no/such",)},
            ["--lora-root is '/no/such'", "a directory that exists"],
        ),
        (
            {"lora_paths": (A,), "lora_resolver_dir": __file__},
            ["--lora-resolver-dir is", "a directory that exists"],
        ),
        (
            {"lora_paths": (A,), "lora_root": ("a\0",)},
            ["--lora-root is", "a directory that exists"],
        ),
        (
            {"lora_paths": (A,), "max_loaded_loras": 2},
            ["--max-loaded-loras is 2", "--max-loras-per-batch (8)"],
        ),
        (
            {"lora_paths": (A, B), "max_loras_per_batch": 1, "max_loaded_loras": 1},
            ["--max-loaded-loras is 1", "number of --lora-paths (2)"],
        ),
        (
            {"lora_paths": (A,), "lora_target_modules": ("q_proj", "qq_proj")},
            ["unknown qq_proj", "known: q_proj", "lm_head"],
        ),
        ({"lora_paths": (A,), "lora_target_modules": ("all", "q_proj")}, ["all stands alone"]),
        ({"lora_paths": (A,), "lora_target_modules": ()}, ["--lora-target-modules is empty"]),
        (
            {"lora_paths": (A, LoRAPath("a", "other"))},
            ["'a' twice", "path/a", "other", "NAME=PATH"],
        ),
        (
            {"lora_paths": (A, LoRAPath("a", "s3://key:secret@bucket/a"))},
            ["'a' twice", "s3://***@bucket/a"],
        ),
        ({"lora_paths": (LoRAPath("base", "p"),)}, ["'base' like the base model"]),
        ({"lora_paths": (LoRAPath("base:x", "p"),)}, ["'base:x'", "rename it with NAME=PATH"]),
        ({"lora_paths": (LoRAPath("a\nb", "p"),)}, ["U+000A", "NAME=PATH"]),
        ({"lora_paths": (LoRAPath("n" * 257, "p"),)}, ["257 characters", "at most 256"]),
        ({"lora_paths": (LoRAPath("a", "/" * 5000),)}, ["5000 characters", "at most 4096"]),
        (
            {"lora_paths": (replace(A, pinned=True),), "max_loras_per_batch": 1},
            ["pins 1 adapters (a)", "at most --max-loras-per-batch - 1 (0)", "starvation"],
        ),
    ],
)
def test_a_bad_combination_is_refused(options, words):
    message = refused(**options)
    assert all(word in message for word in words), message


def test_lora_is_on_with_paths_and_off_without():
    assert config(lora_paths=(A,)).enable_lora is True
    assert config().enable_lora is False
    assert (
        config(enable_lora=True, max_lora_rank=4, lora_target_modules=("all",)).enable_lora is True
    )


def test_bounds_are_inclusive():
    resolved = config(lora_paths=(A, B), max_loras_per_batch=2, max_loaded_loras=2)
    assert resolved.lora.max_loaded_loras == 2
    pinned = (replace(A, pinned=True), B)
    assert config(lora_paths=pinned, max_loras_per_batch=2).lora.lora_paths == pinned


def test_directories_of_adapters_become_real_paths(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    resolved = config(lora_paths=(A,), lora_root=("link", "."), lora_resolver_dir="link")
    assert resolved.lora.lora_root == (str(tmp_path), str(tmp_path))
    assert resolved.lora.lora_resolver_dir == str(tmp_path)


def test_packed_targets_mean_their_parts():
    resolved = config(lora_paths=(A,), lora_target_modules=("qkv_proj", "q_proj", "gate_up_proj"))
    assert resolved.lora.lora_target_modules == (
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
    )


def test_options_without_effect_are_noted():
    assert notes(config()) == []
    given = config(
        cuda_graph_max_bs=2, cuda_graph_bs=(1, 2), disable_cuda_graph=True, max_lora_chunk_size=32
    )
    shown = notes(given)
    assert [line.split()[0] for line in shown] == [
        "--cuda-graph-max-bs",
        "--cuda-graph-bs",
        "--disable-cuda-graph",
        "--max-lora-chunk-size",
    ]


def test_demo_stands_for_the_embedded_model_and_adapters(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "adapter_paths", lambda: {"x": tmp_path / "x", "y": tmp_path / "y"})
    resolved = config(model_path="demo", lora_paths=("demo", "z=other"))
    assert resolved.model_path == str(demo.model_path())
    assert resolved.tokenizer_path == resolved.model_path
    assert resolved.served_model_name == "demo"
    assert resolved.lora.lora_paths == (
        LoRAPath("x", str(tmp_path / "x")),
        LoRAPath("y", str(tmp_path / "y")),
        LoRAPath("z", "other"),
    )


def test_a_directory_named_demo_can_be_an_adapter():
    assert config(lora_paths=("mine=demo",)).lora.lora_paths == (LoRAPath("mine", "demo"),)


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """As users have it; the tests of kernels run with Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("backend", ["triton", "csgmv"])
def test_kernels_on_a_cpu_need_the_interpreter(monkeypatch, backend):
    assert "TRITON_INTERPRET=1" in refused(lora_backend=backend)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve(ServerConfig(model_path="m", lora_backend=backend)).lora.lora_backend == backend


@pytest.fixture
def a_gpu(monkeypatch):
    """As on a machine with one CUDA device."""
    monkeypatch.setattr("lorikeet.config.device.num_cuda_devices", lambda: 1)


def test_what_a_gpu_changes(a_gpu):
    resolved = resolve(ServerConfig(model_path="m"))
    assert (resolved.device, resolved.attention_backend) == ("cuda", "auto")
    assert resolved.lora.lora_backend == "csgmv"
    assert (resolved.chunked_prefill_size, resolved.cuda_graph_max_bs) == (8192, 256)
    assert resolved.piecewise_cuda_graph_max_tokens == 1024
    on_cpu = resolve(ServerConfig(model_path="m", device="cpu"))
    assert on_cpu.piecewise_cuda_graph_max_tokens is None
    assert (on_cpu.device, on_cpu.cuda_graph_max_bs, on_cpu.attention_backend) == (
        "cpu",
        None,
        "sdpa",
    )


@pytest.mark.parametrize(
    ("options", "largest"),
    [
        ({"max_running_requests": 48}, 48),
        ({"max_running_requests": 512}, 256),
        ({"max_running_requests": 512, "cuda_graph_max_bs": 512}, 512),
        ({"cuda_graph_bs": (1, 8, 64)}, 64),
        ({"cuda_graph_bs": (1, 8, 64), "cuda_graph_max_bs": 32}, 8),
        ({"cuda_graph_bs": (1, 8, 64), "max_running_requests": 8}, 8),
    ],
)
def test_the_largest_graph(a_gpu, options, largest):
    assert resolve(ServerConfig(model_path="m", **options)).cuda_graph_max_bs == largest


@pytest.mark.parametrize(
    ("most", "chunk", "tokens"),
    [(None, None, 1024), (None, 256, 256), (4096, None, 4096), (4096, 64, 64)],
)
def test_the_largest_step_in_pieces(a_gpu, most, chunk, tokens):
    options = {"piecewise_cuda_graph_max_tokens": most, "chunked_prefill_size": chunk}
    resolved = resolve(ServerConfig(model_path="m", **options))
    assert resolved.piecewise_cuda_graph_max_tokens == tokens


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"cuda_graph_bs": (64,), "max_running_requests": 8},
            ["--cuda-graph-bs", "up to 8", "--disable-cuda-graph"],
        ),
        (
            {"attention_backend": "fa4"},
            ["--attention-backend is fa4", "cuda", "flashinfer, fa3, sdpa"],
        ),
    ],
)
def test_what_a_gpu_refuses(a_gpu, options, words):
    message = refused(**options)
    assert all(word in message for word in words), message


def test_flags_of_graphs_are_noted_on_a_cpu_alone(monkeypatch):
    config = ServerConfig(model_path="m", disable_cuda_graph=True)
    assert "--disable-cuda-graph has no effect: a CPU has no CUDA graphs" in notes(resolve(config))
    monkeypatch.setattr("lorikeet.config.device.num_cuda_devices", lambda: 1)
    assert notes(resolve(config)) == []


def test_sources_of_requests():
    everything = ("local", "hub", "http", "https", "s3", "gs")
    assert config().lora.lora_sources == everything
    assert ", ".join(everything) in refused(lora_sources=("local", "ftp"))
    assert "--lora-sources given, but LoRA is off" in refused(lora_sources=("local",))
