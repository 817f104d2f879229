"""The settings are complete: one for each option, each of its type, and None only where the engine or nobody decides."""

from __future__ import annotations

from dataclasses import fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from lorikeet.config import (
    OPTIONS,
    HTTPSettings,
    LoRASettings,
    ServerConfig,
    Settings,
    resolve,
)

# What is chosen where nothing is given; other settings are the options' defaults.
CHOSEN = {
    "tokenizer_path": "base",
    "served_model_name": "base",
    "enable_lora": False,
    "page_size": 16,
    "max_prefill_tokens": 16384,
    "random_seed": 7,
}
CHOSEN_ON = {
    "cpu": {
        "device": "cpu",
        "lora_backend": "torch",
        "attention_backend": "sdpa",
        "max_running_requests": 48,
        "chunked_prefill_size": 2048,
    },
    "cuda": {
        "device": "cuda",
        "lora_backend": "csgmv",
        "attention_backend": "auto",
        "max_running_requests": 256,
        "chunked_prefill_size": 8192,
        "cuda_graph_max_bs": 256,
        "piecewise_cuda_graph_max_tokens": 1024,
    },
}
# None is a value of these: what the engine decides with the model and the adapters, or no limit, or nothing of the kind.
OPEN = {
    *("context_length", "max_total_tokens", "mem_fraction_static", "tool_call_parser"),
    *("max_lora_rank", "lora_target_modules", "max_lora_chunk_size", "cuda_graph_bs"),
    *("max_loaded_loras", "max_queued_requests"),
    *("lora_resolver_dir", "lora_disk_cache_dir", "lora_disk_cache_gb"),
}
GRAPHS = {"cuda_graph_max_bs", "piecewise_cuda_graph_max_tokens"}


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch) -> str:
    """As on a machine without and with a CUDA device."""
    number = int(request.param == "cuda")
    monkeypatch.setattr("lorikeet.config.device.num_cuda_devices", lambda: number)
    monkeypatch.setattr("secrets.randbelow", lambda most: 7)
    return request.param


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of an annotated type."""
    if get_origin(kind) is UnionType:
        return any(fits(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(item, get_args(kind)[0]) for item in value)
    return isinstance(value, kind)


def test_each_option_is_one_setting():
    names = [f.name for kind in (Settings, LoRASettings, HTTPSettings) for f in fields(kind)]
    assert sorted(names) == sorted([*OPTIONS, "lora", "http"])


def test_each_setting_has_its_type(device):
    settings = resolve(ServerConfig(model_path="base"))
    groups: list[Any] = [settings, settings.lora, settings.http]
    wrong = [
        name
        for group in groups
        for name, kind in get_type_hints(type(group)).items()
        if not fits(getattr(group, name), kind)
    ]
    assert wrong == []


def test_what_is_chosen_where_nothing_is_given(device):
    values = resolve(ServerConfig(model_path="base")).by_option()
    chosen = {name: value for name, value in values.items() if value != OPTIONS[name].default}
    assert chosen == {"model_path": "base"} | CHOSEN | CHOSEN_ON[device]
    left = {name for name, value in values.items() if value is None}
    assert left == (OPEN | GRAPHS if device == "cpu" else OPEN)


def test_settings_by_option_are_in_order_and_without_keys(device):
    values = resolve(ServerConfig(model_path="base", api_key="k", admin_api_key="a")).by_option()
    assert list(values) == [name for name in OPTIONS if not name.endswith("api_key")]
