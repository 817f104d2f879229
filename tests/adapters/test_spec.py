"""Every field of ``adapter_config.json``: taken, harmless, or refused by name."""

from __future__ import annotations

import dataclasses
import json

import pytest
from peft import LoraConfig

from lorikeet.adapters.spec import (
    MAX_PATTERNS,
    LoRASpec,
    parse_adapter_config,
    read_adapter_config,
)
from lorikeet.errors import AdapterError

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def _parse(**fields: object) -> LoRASpec:
    return parse_adapter_config({**PLAIN, **fields}, "adapter_config.json")


def test_what_peft_writes_is_read():
    config = LoraConfig(
        r=4,
        lora_alpha=10,
        use_rslora=True,
        target_modules=["q_proj"],
        exclude_modules="model.layers.1.*",
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.0.*": 3},
        layers_to_transform=1,
        layers_pattern="layers",
        task_type="CAUSAL_LM",
        lora_dropout=0.1,
    ).to_dict()
    config["peft_type"], config["target_modules"] = "LORA", ["q_proj"]
    assert parse_adapter_config(config, "here") == LoRASpec(
        r=4,
        lora_alpha=10.0,
        use_rslora=True,
        target_modules=("q_proj",),
        exclude_modules="model.layers.1.*",
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.0.*": 3.0},
        layers_to_transform=(1,),
        layers_pattern=("layers",),
    )


def test_fields_of_peft_that_are_off_are_taken():
    known = {field.name for field in dataclasses.fields(LoraConfig)} - {"runtime_config"}
    config = LoraConfig(target_modules=["q_proj"]).to_dict()
    assert known <= set(config)
    config["peft_type"], config["target_modules"] = "LORA", ["q_proj"]
    assert parse_adapter_config(config, "here") == LoRASpec(
        r=8, lora_alpha=8.0, target_modules=("q_proj",)
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("lora_bias", True),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("megatron_config", {"a": 1}),
        ("loftq_config", {"loftq_bits": 4}),
        ("corda_config", {"corda_method": "kpm"}),
        ("lora_ga_config", {"direction": "ArBr"}),
        ("alora_invocation_tokens", [3]),
        ("use_qalora", True),
        ("use_bdlora", {"x": 1}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("velora_config", {"x": 1}),
        ("monteclora_config", {"x": 1}),
        ("ensure_weight_tying", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", None),
        ("a_field_of_tomorrow", 0.5),
        ("a_field_of_tomorrow", 0),
        ("peft_type", "LOHA"),
        ("peft_type", None),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(field, value):
    with pytest.raises(AdapterError, match=field):
        _parse(**{field: value})


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_field_that_is_off_is_taken(value):
    assert _parse(a_field_of_tomorrow=value) == _parse()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_model_name_or_path", "/somewhere"),
        ("revision", "main"),
        ("inference_mode", False),
        ("lora_dropout", 0.3),
        ("task_type", "CAUSAL_LM"),
        ("peft_version", "0.1"),
        ("fan_in_fan_out", True),
        ("auto_mapping", {"base_model_class": "X"}),
        ("init_lora_weights", False),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "orthogonal"),
        ("megatron_core", "megatron.core"),
        ("runtime_config", {"ephemeral_gpu_offload": False}),
    ],
)
def test_how_it_was_trained_changes_nothing(field, value):
    assert _parse(**{field: value}) == _parse()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -4),
        ("r", "8"),
        ("r", 8.0),
        ("r", True),
        ("r", None),
        ("r", 10**59),
        ("lora_alpha", 10**400),
        ("rank_pattern", {"q_proj": 10**59}),
        ("layers_pattern", ["layers"] * (MAX_PATTERNS + 1)),
        ("rank_pattern", {f"layers.{n}.q_proj": 4 for n in range(MAX_PATTERNS + 1)}),
        ("lora_alpha", "16"),
        ("lora_alpha", True),
        ("lora_alpha", float("inf")),
        ("lora_alpha", float("nan")),
        ("use_rslora", "yes"),
        ("use_rslora", 1),
        ("target_modules", None),
        ("target_modules", []),
        ("target_modules", ""),
        ("target_modules", ["q_proj", 3]),
        ("target_modules", {"q_proj": 1}),
        ("exclude_modules", 3),
        ("layers_to_transform", "1"),
        ("layers_to_transform", [1.5]),
        ("layers_to_transform", True),
        ("layers_pattern", 3),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": 2.5}),
        ("rank_pattern", [1]),
        ("alpha_pattern", {"q_proj": "x"}),
    ],
)
def test_wrong_types_and_ranges_are_refused_by_name(field, value):
    with pytest.raises(AdapterError, match=field):
        _parse(**{field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        {"target_modules": "all-linear", "layers_to_transform": 0},
        {"target_modules": ".*q_proj", "layers_pattern": "layers"},
        {"layers_pattern": "layers"},
    ],
)
def test_combinations_that_peft_refuses(fields):
    with pytest.raises(ValueError, match="layers"):
        LoraConfig(**{"target_modules": ["q_proj"], **fields})
    with pytest.raises(AdapterError, match="layers"):
        _parse(**fields)


def test_scale():
    assert _parse(lora_alpha=10).scale(4, 10) == 2.5
    assert _parse(use_rslora=True).scale(16, 10) == 2.5
    assert _parse(use_rslora=True).scale(2, 3) == 3 / 2**0.5


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "adapter_config.json"),
        ("{", "not valid JSON"),
        ("[]", "list"),
        (b"\xff\xfe", "not valid"),
    ],
)
def test_unreadable_files_are_named(tmp_path, content, says):
    path = tmp_path / "adapter_config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AdapterError, match=says) as caught:
        read_adapter_config(tmp_path)
    assert str(path) in str(caught.value)


def test_a_good_file_is_read(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    assert read_adapter_config(tmp_path) == _parse()


@pytest.mark.parametrize(
    "fields",
    [
        {"\ud800x": 1},
        {"task_type": "\ud800"},
        {"target_modules": ["q_proj", "\udfff"]},
        {"target_modules": "(?\ud800)"},
        {"rank_pattern": {"\ud800": 4}},
        {"auto_mapping": {"a": [{"\ud800": 1}]}},
    ],
)
def test_half_of_a_surrogate_pair_is_refused_in_words_that_can_be_sent(fields, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN | fields))
    with pytest.raises(AdapterError, match="surrogate pair") as caught:
        read_adapter_config(tmp_path)
    assert str(caught.value).encode()


def test_what_is_unknown_is_quoted_in_part():
    with pytest.raises(AdapterError, match="is not implemented") as caught:
        _parse(**{"new\nfield" * 1000: ["x"] * 100_000})
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()
