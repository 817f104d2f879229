"""The effectiveness report, compared with the change written out in full."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from lorikeet.core.adapters import format_report
from lorikeet.lora.base_weights import checkpoint_weight
from lorikeet.lora.loader import load_adapter
from lorikeet.lora.report import adapter_report, product_norm
from tests.support.peft_adapters import WEIGHTS, edit_weights, make_adapter

PREFIX = "base_model.model."


@pytest.fixture
def report(sites, layout):
    def report(directory, dtype=torch.float32, **fields):
        adapter = load_adapter("a", directory, sites, layout, dtype)
        return adapter_report(adapter, sites, **fields)

    return report


@pytest.fixture(scope="module")
def mixed(llama, tmp_path_factory):
    """Ranks and scales that differ between modules."""
    return make_adapter(
        llama,
        tmp_path_factory.mktemp("mixed"),
        r=20,
        alpha=10,
        targets=("q_proj", "down_proj", "lm_head"),
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 4},
        alpha_pattern={"down_proj": 60},
    )


def deltas(directory, scale_of) -> dict[str, float]:
    """Frobenius norm of scale B A of each module, by its path, in float64."""
    stored = load_file(directory / WEIGHTS)
    norms = {}
    for name, A_RK in stored.items():
        if name.endswith(".lora_A.weight"):
            B_OR = stored[name.replace("lora_A", "lora_B")]
            path = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            change = scale_of(path, A_RK.shape[0]) * (B_OR.double() @ A_RK.double())
            norms[path] = float(change.norm())
    return norms


def test_norms_are_those_of_the_whole_change(mixed, llama, sites, layout):
    adapter = load_adapter(
        "a", mixed, sites, layout, torch.float32, base_weight=checkpoint_weight(llama)
    )
    found = adapter_report(adapter, sites)
    norms = deltas(mixed, lambda path, rank: (60 if "down_proj" in path else 10) / rank)
    assert len(norms) == 5
    for kind in ("q_proj", "down_proj", "lm_head"):
        expected = math.hypot(*(norm for path, norm in norms.items() if kind in path))
        assert found["kinds"][kind]["delta_norm"] == pytest.approx(expected, rel=1e-5)
        assert found["kinds"][kind]["relative_norm"] is None
    assert found["delta_norm"] == pytest.approx(math.hypot(*norms.values()), rel=1e-5)
    assert found["kinds"]["q_proj"]["rank"] == [4, 20]
    assert found["kinds"]["q_proj"]["scale"] == [0.5, 2.5]
    assert found["scale"] == [0.5, 3.0]
    assert (found["rank"], found["bytes"]) == (20, adapter.nbytes)
    assert found["targets"] == ["down_proj", "lm_head", "q_proj"] == list(found["kinds"])
    assert found["modules"] == {"hit": 5, "targeted": 5, "in_model": 5}
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_pools_type_changes_the_norm_little(llama, tmp_path, report, dtype):
    directory = make_adapter(llama, tmp_path, r=8, targets=("q_proj", "o_proj"))
    exact = report(directory)["delta_norm"]
    assert report(directory, dtype)["delta_norm"] == pytest.approx(exact, rel=1e-2)


def test_the_embedding(llama, tmp_path, report):
    directory = make_adapter(llama, tmp_path, r=4, alpha=4, targets=("embed_tokens",))
    edit_weights(directory, lambda t: t.pop(f"{PREFIX}model.embed_tokens.base_layer.weight", None))
    stored = load_file(directory / WEIGHTS)
    A_RV = stored[f"{PREFIX}model.embed_tokens.lora_embedding_A"]
    B_OR = stored[f"{PREFIX}model.embed_tokens.lora_embedding_B"]
    assert report(directory)["delta_norm"] == pytest.approx(float((B_OR @ A_RV).norm()), rel=1e-5)


def test_modules_that_do_nothing_are_not_hit(llama, tmp_path, report):
    directory = make_adapter(
        llama, tmp_path, r=4, targets=("q_proj", "v_proj"), layers_to_transform=[1]
    )
    edit_weights(
        directory,
        lambda t: t[f"{PREFIX}model.layers.1.self_attn.v_proj.lora_B.weight"].zero_(),
    )
    found = report(directory)
    assert found["modules"] == {"hit": 1, "targeted": 2, "in_model": 4}
    assert found["kinds"]["v_proj"]["modules"] == {"hit": 0, "targeted": 1, "in_model": 2}
    assert found["kinds"]["v_proj"]["delta_norm"] == 0
    assert "1 of 2 targeted modules hit (the model has 4)" in format_report(found)


def test_relative_to_the_base(llama, tmp_path, report):
    directory = make_adapter(llama, tmp_path, r=4, targets=("q_proj", "down_proj"))
    weight = checkpoint_weight(llama)
    found = report(directory, base_weight=weight)
    names = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(2)]
    base = math.hypot(*(float(weight(name).norm()) for name in names))
    q_proj = found["kinds"]["q_proj"]
    assert q_proj["relative_norm"] == pytest.approx(q_proj["delta_norm"] / base, rel=1e-5)
    assert 0 < found["relative_norm"] < 10
    assert f"({found['relative_norm']:.2%} of the base)" in format_report(found)


def test_a_base_that_is_not_wholly_known_gives_no_ratio(llama, tmp_path, report):
    directory = make_adapter(llama, tmp_path, r=4, targets=("q_proj", "down_proj"))
    weight = checkpoint_weight(llama)
    found = report(directory, base_weight=lambda name: None if "down" in name else weight(name))
    assert found["relative_norm"] is None
    assert found["kinds"]["down_proj"]["relative_norm"] is None
    assert found["kinds"]["q_proj"]["relative_norm"] > 0
    assert "of the base" not in format_report(found)


def test_the_line_for_the_log(llama, tmp_path, report):
    line = format_report(report(make_adapter(llama, tmp_path, r=4, alpha=8, targets=("q_proj",))))
    assert line.startswith(
        "rank 4, 2 of 2 targeted modules hit (the model has 2), targets q_proj, scale 2, norm"
    )
    assert "\n" not in line
    assert line.endswith(" MB")


@pytest.mark.parametrize("rank", [1, 7, 16, 48])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_product_norm(rank, size):
    noise = torch.Generator().manual_seed(rank)
    A_RK = torch.randn(rank, 40, generator=noise) * size
    B_RO = torch.randn(rank, 24, generator=noise) * size
    expected = float((B_RO.double().T @ A_RK.double()).norm())
    assert product_norm(A_RK, B_RO) == pytest.approx(expected, rel=1e-4)


def test_product_norm_of_nothing():
    assert product_norm(torch.zeros(4, 8), torch.ones(4, 8)) == 0
    assert product_norm(torch.ones(4, 8), torch.zeros(4, 8)) == 0


def test_product_norm_of_what_cancels():
    """B's columns cancel A's rows: the sum of squares must not end below zero, nor far above it."""
    noise = torch.Generator().manual_seed(3)
    row, column = torch.randn(1, 64, generator=noise), torch.randn(1, 32, generator=noise)
    A_RK, B_RO = torch.cat((row, row)), torch.cat((column, -column))
    size = float(A_RK.norm() * B_RO.norm())
    assert 0 <= product_norm(A_RK, B_RO) < 1e-3 * size
