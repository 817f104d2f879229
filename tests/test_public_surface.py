"""What others rely on, frozen: names, options, HTTP fields, environment variables.

A change here is a change for users. It is made on purpose, with a line in CHANGELOG.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

import lorikeet
import lorikeet.server.app
from lorikeet import envs
from lorikeet.cli import COMMANDS
from lorikeet.config import OPTIONS
from lorikeet.core.request import SamplingParams
from lorikeet.server import protocol

NAMES = [
    "LLM",
    "AdapterError",
    "AdapterNotFoundError",
    "ConfigError",
    "EngineDeadError",
    "EngineFault",
    "LoRADisabledError",
    "LoRAPath",
    "LorikeetError",
    "ModelError",
    "OutOfMemoryError",
    "RequestError",
    "SamplingParams",
    "ServerConfig",
    "UnavailableError",
    "UserError",
    "__version__",
]

FLAGS = [
    "--model-path",
    "--model",
    "--tokenizer-path",
    "--served-model-name",
    "--host",
    "--port",
    "--api-key",
    "--admin-api-key",
    "--allowed-origins",
    "--cors-allow-origins",
    "--allowed-hosts",
    "--log-level",
    "--tool-call-parser",
    "--sampling-defaults",
    "--dtype",
    "--device",
    "--context-length",
    "--enable-lora",
    "--lora-paths",
    "--max-loras-per-batch",
    "--max-loaded-loras",
    "--lora-eviction-policy",
    "--lora-backend",
    "--max-lora-rank",
    "--lora-target-modules",
    "--max-lora-chunk-size",
    "--lora-deterministic",
    "--lora-root",
    "--lora-sources",
    "--lora-allow-private-hosts",
    "--lora-download-timeout",
    "--lora-resolver-dir",
    "--lora-disk-cache-dir",
    "--lora-disk-cache-gb",
    "--tp-size",
    "--tp",
    "--mem-fraction-static",
    "--max-running-requests",
    "--max-queued-requests",
    "--max-total-tokens",
    "--chunked-prefill-size",
    "--max-prefill-tokens",
    "--page-size",
    "--schedule-policy",
    "--disable-radix-cache",
    "--cuda-graph-max-bs",
    "--cuda-graph-bs",
    "--disable-cuda-graph",
    "--piecewise-cuda-graph-max-tokens",
    "--disable-piecewise-cuda-graph",
    "--disable-overlap-schedule",
    "--attention-backend",
    "--load-format",
    "--random-seed",
    "--enable-metrics",
    "--shutdown-timeout",
    "--watchdog-timeout",
]

DEFAULTS = {
    "host": "127.0.0.1",
    "port": 30000,
    "allowed_origins": (),
    "allowed_hosts": (),
    "log_level": "info",
    "sampling_defaults": "model",
    "dtype": "auto",
    "device": "auto",
    "lora_paths": (),
    "max_loras_per_batch": 8,
    "lora_eviction_policy": "lru",
    "lora_backend": "auto",
    "lora_deterministic": False,
    "lora_root": (),
    "lora_sources": ("local", "hub", "http", "https", "s3", "gs"),
    "lora_allow_private_hosts": False,
    "lora_download_timeout": 600.0,
    "tp_size": 1,
    "schedule_policy": "fcfs",
    "disable_radix_cache": False,
    "disable_cuda_graph": False,
    "disable_piecewise_cuda_graph": False,
    "disable_overlap_schedule": False,
    "load_format": "auto",
    "enable_metrics": False,
    "shutdown_timeout": 30.0,
    "watchdog_timeout": 300.0,
}

SAMPLING = {
    "max_new_tokens": 128,
    "min_new_tokens": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "stop": (),
    "stop_token_ids": (),
    "stop_regex": (),
    "ignore_eos": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "no_stop_trim": False,
    "n": 1,
    "sampling_seed": None,
    "logit_bias": {},
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
}

NEUTRAL = [
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "store",
    "metadata",
    "service_tier",
    "best_of",
]

OPENAI = [
    *NEUTRAL,
    "model",
    "lora_path",
    "stream",
    "stream_options",
    "n",
    "max_tokens",
    "temperature",
    "top_p",
    "stop",
    "seed",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "response_format",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "stop_regex",
    "no_stop_trim",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "regex",
    "ebnf",
]

BODIES = {
    "GenerateBody": [
        "text",
        "input_ids",
        "sampling_params",
        "lora_path",
        "stream",
        "rid",
        "return_logprob",
        "logprob_start_len",
        "top_logprobs_num",
        "return_text_in_logprobs",
    ],
    "AbortBody": ["rid", "abort_all"],
    "LoadAdapterBody": ["lora_name", "lora_path", "pinned"],
    "UnloadAdapterBody": ["lora_name", "timeout"],
    "LoadTensorsBody": ["lora_name", "config_dict", "tensors", "pinned", "added_tokens_config"],
    "InplaceLoadBody": ["lora_name", "lora_path", "load_inplace", "is_3d_lora_weight"],
    "NamedAdapterBody": ["lora_name"],
    "NeutralFields": NEUTRAL,
    "StreamOptions": ["include_usage", "include_obfuscation", "continuous_usage_stats"],
    "OpenAIBody": OPENAI,
    "EmbeddingBody": [
        "model",
        "input",
        "encoding_format",
        "dimensions",
        "user",
        "lora_path",
        "pooling",
        "normalize",
    ],
    "CompletionBody": [*OPENAI, "prompt", "logprobs", "echo", "suffix"],
    "ChatBody": [
        *OPENAI,
        "messages",
        "max_completion_tokens",
        "logprobs",
        "top_logprobs",
        "modalities",
        "parallel_tool_calls",
        "tools",
        "tool_choice",
    ],
}

VARIABLES = [
    "LORIKEET_API_KEY",
    "LORIKEET_ADMIN_API_KEY",
    "DEMO_ONCE",
    "HF_ENDPOINT",
    "TRITON_INTERPRET",
]


def bodies(parent: type[protocol.Body]) -> Iterator[type[protocol.Body]]:
    """Every body that has fields, wherever it is defined."""
    for model in parent.__subclasses__():
        if model.model_fields:
            yield model
        yield from bodies(model)


def test_names():
    assert lorikeet.__all__ == NAMES
    assert dir(lorikeet) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_documented(name):
    value = getattr(lorikeet, name)
    assert name == "__version__" or inspect.getdoc(value)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        _ = lorikeet.Engine  # pyright: ignore[reportAttributeAccessIssue]


def test_commands():
    assert list(COMMANDS) == ["serve", "demo", "generate", "check-adapter"]


def test_options():
    assert [flag for option in OPTIONS.values() for flag in option.flags] == FLAGS


def test_defaults_of_options():
    given = {name: option.default for name, option in OPTIONS.items() if option.default is not None}
    assert given == DEFAULTS


def test_fields_of_http_bodies():
    assert {model.__name__: list(model.model_fields) for model in bodies(protocol.Body)} == BODIES


def test_sampling_parameters():
    fresh = SamplingParams()
    assert {name: getattr(fresh, name) for name in fresh.__struct_fields__} == SAMPLING


def test_environment_variables():
    assert [variable.name for variable in envs.ALL] == VARIABLES
