"""Target resolution against PEFT itself: the modules it wraps, their ranks and their scales."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

from lorikeet.adapters.spec import MAX_PATTERNS, parse_adapter_config
from lorikeet.adapters.targets import resolve_targets
from lorikeet.core.sites import LoRASite
from lorikeet.errors import AdapterError
from lorikeet.models.spec import read_model_spec
from tests.support.tiny_models import make_tiny_model

LAYERS = 12  # two digits, so that a pattern for layer 1 must not match layer 11

CASES: dict[str, dict[str, object]] = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "suffix": {"target_modules": ["self_attn.q_proj", "1.mlp.down_proj"]},
    "full path": {"target_modules": ["model.layers.3.self_attn.k_proj"]},
    "part of a name is no match": {"target_modules": ["proj", "up_proj"]},
    "a name that nothing has": {"target_modules": ["q_proj", "query_key_value"]},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear, shouted": {"target_modules": "ALL-LINEAR"},
    "all-linear but": {
        "target_modules": "all-linear",
        "exclude_modules": ["k_proj", "mlp.up_proj"],
    },
    "all-linear but a pattern": {
        "target_modules": "all-linear",
        "exclude_modules": r".*layers\.1\..*",
    },
    "pattern": {"target_modules": r"model\.layers\.\d\.(self_attn|mlp)\.(q|up|down)_proj"},
    "pattern must match whole paths": {"target_modules": r".*layers\.1\.self_attn\.v_proj"},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "embeddings by pattern": {"target_modules": r"(.*embed_tokens|lm_head)"},
    "exclude wins": {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]},
    "exclude by path": {
        "target_modules": ["q_proj"],
        "exclude_modules": ["model.layers.0.self_attn.q_proj"],
    },
    "layers": {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [0, 11]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers by name": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [2],
        "layers_pattern": "layers",
    },
    "layers by names": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [2],
        "layers_pattern": ["h", "layers"],
    },
    "layers never hold the embedding": {
        "target_modules": ["embed_tokens", "q_proj"],
        "layers_to_transform": [0],
    },
    "a full path does not ask for the layer": {
        "target_modules": ["model.layers.5.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [0],
    },
    "ranks": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 3, "down_proj": 20},
        "alpha_pattern": {"v_proj": 5, r"model\.layers\.[02]\.mlp\.down_proj": 7.5},
    },
    "the first pattern counts": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.q_proj": 4},
    },
    "anchored patterns": {
        "target_modules": ["q_proj"],
        "rank_pattern": {r"^model.layers.1.self_attn.q_proj": 2, "^q_proj": 4, "proj": 5},
    },
    "rslora": {
        "target_modules": ["q_proj", "o_proj"],
        "use_rslora": True,
        "rank_pattern": {"o_proj": 7},
        "alpha_pattern": {"q_proj": 3},
    },
}


CASES["look-ahead, as for models that see"] = {
    "target_modules": r"^(?!.*visual)(?!.*\.1\.).*(?:q_proj|v_proj)$"
}
CASES["patterns of ranks with choices"] = {
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {r"layers\.(1|2)\.self_attn\.(q|k)_proj": 3, "layers.11.self_attn.q_proj": 4},
}
CASES["a choice among names of layers"] = {
    "target_modules": ["q_proj"],
    "layers_to_transform": [2],
    "layers_pattern": ["(h|layers)"],
}


@pytest.fixture(scope="module")
def sites(tmp_path_factory) -> tuple[LoRASite, ...]:
    model = make_tiny_model(tmp_path_factory.mktemp("m"), "llama", num_hidden_layers=LAYERS)
    return read_model_spec(model).lora_sites


@pytest.fixture(scope="module")
def hf_config(tmp_path_factory):
    return AutoConfig.from_pretrained(
        make_tiny_model(tmp_path_factory.mktemp("m"), "llama", num_hidden_layers=LAYERS)
    )


def _peft_modules(hf_config, fields) -> dict[str, tuple[int, float]]:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_config(hf_config)
        model = get_peft_model(
            base, LoraConfig(r=8, lora_alpha=16, **fields), low_cpu_mem_usage=True
        )
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def _ours(sites, fields) -> dict[str, tuple[int, float]]:
    spec = parse_adapter_config({"peft_type": "LORA", "r": 8, "lora_alpha": 16, **fields}, "here")
    return {
        sites[site].slices[part].hf_path: (module.rank, module.scale)
        for (site, part), module in resolve_targets(spec, sites).items()
    }


@pytest.mark.parametrize("case", CASES)
def test_same_modules_ranks_and_scales_as_peft(case, sites, hf_config):
    expected = _peft_modules(hf_config, CASES[case])
    assert expected
    assert _ours(sites, CASES[case]) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["query"]},
        {"target_modules": "q_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [99]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"},
    ],
)
def test_an_adapter_of_no_module_is_refused(fields, sites, hf_config):
    with pytest.raises(ValueError, match="modules"):
        _peft_modules(hf_config, fields)
    with pytest.raises(AdapterError, match="matches no module") as caught:
        _ours(sites, fields)
    assert "gate_proj" in str(caught.value)


def test_what_peft_is_ambiguous_about_is_refused(sites):
    paths = [part.hf_path for site in sites for part in site.slices if part.name == "q_proj"]
    names = [*paths, *(f"name{number}" for number in range(20))]
    with pytest.raises(AdapterError, match="layers_to_transform"):
        _ours(sites, {"target_modules": names, "layers_to_transform": [0]})
    assert len(_ours(sites, {"target_modules": names})) == LAYERS


def test_long_lists_of_full_paths_as_all_linear_is_saved(sites, hf_config):
    fields = {"target_modules": sorted(_peft_modules(hf_config, {"target_modules": "all-linear"}))}
    assert len(fields["target_modules"]) == 7 * LAYERS
    assert _ours(sites, fields) == _peft_modules(hf_config, fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(q_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": "*"},
        {"target_modules": ["q_proj"], "rank_pattern": {"(q": 2}},
        {"target_modules": ["q_proj"], "rank_pattern": {"(?i)q_proj": 4}},
        {"target_modules": ["q_proj"], "alpha_pattern": {"[": 2}},
        {"target_modules": "a{99999999999}"},
    ],
)
def test_what_is_no_regular_expression_is_refused_by_field_and_pattern(fields, sites):
    (field,) = [name for name in fields if not isinstance(fields[name], list)]
    pattern = next(iter(fields[field])) if isinstance(fields[field], dict) else fields[field]
    with pytest.raises(AdapterError, match="is not a regular expression") as caught:
        _ours(sites, fields)
    assert str(caught.value).startswith(f"{field}: the pattern '{pattern}'")


def test_thousands_of_names_and_patterns_are_no_product(sites):
    """Each name is looked up, not compared; each pattern is plain and compiles nothing."""
    names = [f"layers.{n}.self_attn.q_proj" for n in range(20_000)]
    assert len(_ours(sites, {"target_modules": names})) == LAYERS
    ranks = {f"layers.{n}.self_attn.q_proj": n + 1 for n in range(MAX_PATTERNS)}
    found = _ours(sites, {"target_modules": ["q_proj"], "rank_pattern": ranks})
    assert found["model.layers.11.self_attn.q_proj"][0] == 12
