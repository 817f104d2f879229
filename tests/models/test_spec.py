"""Reading configs: what transformers reads, and refusing what is not implemented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from lorikeet.errors import ModelError
from lorikeet.models.families import FAMILIES
from lorikeet.models.spec import (
    ModelSpec,
    parse_model_config,
    read_model_spec,
    read_sampling_defaults,
)
from tests.support import tiny_models
from tests.support.tiny_models import make_tiny_model

BASE: dict[str, object] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 320,
}
LLAMA, MISTRAL, QWEN2, QWEN3 = FAMILIES


def parse(
    architecture: str = LLAMA, generation: dict[str, object] | None = None, **fields: Any
) -> ModelSpec:
    config: dict[str, object] = {"architectures": [architecture], **BASE, **fields}
    return parse_model_config(config, generation or {}, "config.json")


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_sizes_agree_with_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    path = make_tiny_model(tmp_path, family, tie_word_embeddings=tied)
    spec = read_model_spec(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    assert spec.num_parameters == sum(p.numel() for p in model.parameters())
    assert spec.head_dim == model.config.head_dim if family == "qwen3" else 16
    assert spec.kv_bytes_per_token(2) == 2 * 2 * 2 * spec.head_dim * 2
    assert spec.eos_token_ids == (tiny_models.EOS_ID,)
    assert spec.bos_token_id == tiny_models.BOS_ID


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_lora_site_is_a_module_of_transformers(tmp_path: Path, family: str) -> None:
    path = make_tiny_model(tmp_path, family)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    sites = read_model_spec(path).lora_sites
    assert [site.kind for site in sites[:5]] == ["embedding", "column", "row", "column", "row"]
    assert [site.path for site in sites[-2:]] == ["layers.1.mlp.down_proj", "lm_head"]
    for site in sites:
        for part in site.slices:
            shape = tuple(model.get_submodule(part.hf_path).weight.shape)
            assert shape == (
                (site.in_features, part.out_features)
                if site.kind == "embedding"
                else (part.out_features, site.in_features)
            )
            assert part.hf_path.rsplit(".")[-1] == part.name
    names = {part.name for site in sites for part in site.slices}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert names == linear | {"embed_tokens", "lm_head"}


def test_slices_of_a_packed_site_follow_each_other() -> None:
    qkv = parse(num_key_value_heads=2).lora_sites[1]
    assert [(part.offset, part.out_features) for part in qkv.slices] == [
        (0, 64),
        (64, 32),
        (96, 32),
    ]


class TestDefaults:
    def test_left_out_fields(self) -> None:
        llama, mistral = parse(), parse(MISTRAL, num_attention_heads=8)
        qwen3 = parse(QWEN3, num_attention_heads=64)
        assert (llama.num_kv_heads, llama.head_dim, llama.rms_norm_eps) == (4, 16, 1e-6)
        assert (llama.bos_token_id, llama.eos_token_ids) == (1, (2,))
        assert (mistral.num_kv_heads, mistral.sliding_windows) == (8, (4096,) * 4)
        assert (qwen3.num_kv_heads, qwen3.head_dim, qwen3.eos_token_ids) == (32, 128, ())

    def test_null_counts_as_derived(self) -> None:
        spec = parse(QWEN2, num_key_value_heads=None, head_dim=None)
        assert (spec.num_kv_heads, spec.head_dim) == (4, 16)


class TestWindows:
    def test_llama_has_none(self) -> None:
        assert parse().sliding_windows == (None,) * 4

    def test_llama_with_a_window_is_refused(self) -> None:
        with pytest.raises(ModelError, match="sliding_window is 8"):
            parse(sliding_window=8)

    def test_mistral(self) -> None:
        def windows(**fields: Any) -> tuple[int | None, ...]:
            return parse(MISTRAL, num_key_value_heads=2, **fields).sliding_windows

        assert windows(sliding_window=9) == (9,) * 4
        assert windows(sliding_window=None) == (None,) * 4
        with pytest.raises(ModelError, match="layer_types"):
            windows(layer_types=["full_attention", *["sliding_attention"] * 3])

    @pytest.mark.parametrize("architecture", [QWEN2, QWEN3])
    def test_qwen(self, architecture: str) -> None:
        def windows(**fields: Any) -> tuple[int | None, ...]:
            return parse(architecture, num_key_value_heads=2, **fields).sliding_windows

        assert windows(sliding_window=9, max_window_layers=1) == (None,) * 4  # off by default
        on: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 9}
        assert windows(**on, max_window_layers=3) == (None, None, None, 9)
        assert windows(**on, max_window_layers=0) == (9,) * 4
        assert windows(**on) == (None,) * 4  # layers from 28 on
        types = ["sliding_attention", "full_attention"] * 2
        assert windows(**on, layer_types=types) == (9, None, 9, None)
        with pytest.raises(ModelError, match="no sliding window is on"):
            windows(layer_types=types)
        with pytest.raises(ModelError, match="list of 4"):
            windows(**on, layer_types=types[:3])
        with pytest.raises(ModelError, match="chunked_attention"):
            windows(**on, layer_types=["chunked_attention"] * 4)


class TestEndOfSequence:
    def test_generation_config_wins(self) -> None:
        spec = parse(eos_token_id=3, generation={"eos_token_id": [5, 6]})
        assert spec.eos_token_ids == (5, 6)

    def test_config_otherwise(self) -> None:
        assert parse(eos_token_id=3, generation={"temperature": 1.0}).eos_token_ids == (3,)
        assert parse(eos_token_id=None).eos_token_ids == ()

    def test_nonsense_is_refused(self) -> None:
        with pytest.raises(ModelError, match="eos_token_id"):
            parse(eos_token_id="</s>")


class TestDtype:
    def test_spellings(self) -> None:
        assert parse().dtype == "float32"
        assert parse(torch_dtype="bfloat16").dtype == "bfloat16"
        assert parse(torch_dtype="bfloat16", dtype="float16").dtype == "float16"

    def test_unknown(self) -> None:
        with pytest.raises(ModelError, match=r"float8.*supported: float32, bfloat16, float16"):
            parse(dtype="float8_e4m3fn")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"architectures": None}, "architectures is None"),
        ({"architectures": ["LlamaForCausalLM", "X"]}, "not one name"),
        ({"model_type": "mistral"}, "contradicts"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 5}, "head_dim is not given"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"bos_token_id": "x"}, "bos_token_id"),
        ({"architectures": [MISTRAL], "attention_bias": True}, "has no such bias"),
        ({"architectures": [QWEN3], "mlp_bias": True}, "has no such bias"),
    ],
)
def test_what_is_not_implemented_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse(**fields)


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ModelError) as caught:
        parse("FalconForCausalLM")
    for architecture in FAMILIES:
        assert architecture in str(caught.value)


def test_longest_context() -> None:
    def context(**rope: object) -> int:
        return parse(max_position_embeddings=100, rope_scaling=rope or None).max_context_length

    assert context() == 100
    assert context(type="linear", factor=4.0) == 400
    assert context(type="dynamic", factor=4.0) == 100
    assert context(type="yarn", factor=4.0, original_max_position_embeddings=100) == 400
    assert context(type="yarn", factor=4.0, original_max_position_embeddings=25) == 100


class TestFiles:
    def test_no_directory(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="does not exist"):
            read_model_spec(tmp_path / "nothing")

    def test_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"has no config\.json"):
            read_model_spec(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[1]", ""])
    def test_broken_json(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"config\.json"):
            read_model_spec(tmp_path)

    def test_broken_generation_config(self, tmp_path: Path) -> None:
        path = make_tiny_model(tmp_path)
        (path / "generation_config.json").write_text("nope")
        with pytest.raises(ModelError, match=r"generation_config\.json"):
            read_model_spec(path)

    def test_without_generation_config(self, tmp_path: Path) -> None:
        path = make_tiny_model(tmp_path)
        (path / "generation_config.json").unlink()
        config = json.loads((path / "config.json").read_text())
        assert read_model_spec(path).eos_token_ids == (config["eos_token_id"],)


def generation(directory: Path, fields: dict[str, object]) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(fields))
    return directory


def test_what_the_models_authors_recommend(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path, 320) == {}
    given: dict[str, object] = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0}
    others: dict[str, object] = {"do_sample": True, "eos_token_id": [1, 2], "typical_p": "x"}
    path = generation(tmp_path, given | others | {"repetition_penalty": None})
    assert read_sampling_defaults(path, 320) == given
    # No bound, in the words of transformers.
    assert read_sampling_defaults(generation(tmp_path, {"top_k": 0}), 320) == {"top_k": -1}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1}, "temperature is -1; allowed: a finite number >= 0"),
        ({"temperature": "hot"}, "temperature is 'hot'; allowed: a number or null"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": float("inf")}, "temperature is inf; allowed: a number or null"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": True}, "top_p is True"),
        ({"top_k": 2.5}, "top_k is 2.5; allowed: an integer"),
        ({"top_k": -5}, "top_k is -5"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ],
)
def test_recommendations_that_no_request_could_have(
    tmp_path: Path, fields: dict[str, object], words: str
) -> None:
    with pytest.raises(ModelError) as refused:
        read_sampling_defaults(generation(tmp_path, fields), 320)
    assert words in str(refused.value)
    assert "generation_config.json" in str(refused.value)
