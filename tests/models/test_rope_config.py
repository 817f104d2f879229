"""The rotary embedding of a config, against the one transformers builds from the same file."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from lorikeet.errors import ModelError
from lorikeet.layers.rotary import inverse_frequencies
from lorikeet.models.rope_config import read_rope

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
CONFIGS: list[dict[str, object]] = [
    {},
    {"rope_theta": 500000.0},
    {"rope_theta": 500000.0, "rope_scaling": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 7.0},
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_theta": 1e5},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}},
    {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 500000.0},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    {
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
        "rope_parameters": {"rope_type": "default", "rope_theta": 3.0},
    },
    {
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
        "original_max_position_embeddings": 256,
        "rope_theta": 500000.0,
    },
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
    {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1e6},
    {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1.25, "beta_fast": 8.0}},
    {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": 4, "truncate": False}},
    {"rope_scaling": {"type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0}},
    {"rope_scaling": {"type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 0.0}},
    {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 256}},
    {"rope_scaling": {"type": "yarn", "factor": 0.5, "original_max_position_embeddings": 4096}},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=repr)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_frequencies_equal_transformers(family: str, fields: dict[str, object]) -> None:
    shape = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 2048}
    config = AutoConfig.for_model(family, head_dim=64, **shape, **copy.deepcopy(fields))
    make = {"llama": LlamaRotaryEmbedding, "qwen3": Qwen3RotaryEmbedding}[family]
    wanted = make(config)
    ours = read_rope(fields, 2048, "config.json")
    assert ours.attention_factor == pytest.approx(wanted.attention_scaling, rel=1e-12)
    torch.testing.assert_close(inverse_frequencies(ours, 64), wanted.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            "'longrope' is not supported; supp",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "'mrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": True}}, "factor is True"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor is '2'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs low_freq_factor, high"),
        (
            {"rope_scaling": {"rope_type": "default", "mrope_section": [1]}},
            "mrope_section do not bel",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}},
            "beta_fast do not",
        ),
        ({"rope_scaling": [1]}, "allowed: an object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer type"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
    ],
)
def test_what_cannot_be_matched_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_rope(fields, 2048, "config.json")


def test_a_partial_factor_of_one_is_the_whole_head() -> None:
    assert read_rope({"partial_rotary_factor": 1.0}, 2048, "x") == read_rope({}, 2048, "x")
