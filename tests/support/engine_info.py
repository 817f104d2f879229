"""What an engine says of itself, for tests that care about a few of its fields."""

from __future__ import annotations

from typing import Any

from lorikeet.core.views import EngineInfo


def engine_info(**fields: Any) -> EngineInfo:
    """The info of a small engine, with these fields in place of its own."""
    ours: dict[str, Any] = {
        "version": "fake",
        "model_path": "fake",
        "served_model_name": "fake",
        "architecture": "Fake",
        "context_length": 64,
        "max_running_requests": 1_000_000,
        "max_queued_requests": None,
        "vocab_size": 257,
        "hidden_size": 4,
        "dtype": "float32",
        "device": "cpu",
        "device_name": None,
        "attention_backend": "fake",
        "page_size": 4,
        "max_total_num_tokens": 4096,
        "weights_bytes": 0,
        "pool_bytes": 0,
        "kv_bytes": 0,
        "lora_enabled": True,
        "max_lora_rank": 16,
        "lora_target_modules": ["q_proj"],
        "sampling_defaults": {},
    }
    return EngineInfo(**ours | fields)
