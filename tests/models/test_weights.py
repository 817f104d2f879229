"""Checkpoints in all their forms: every tensor accounted for, or an error that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorikeet.errors import ModelError
from lorikeet.models.spec import read_model_spec
from lorikeet.models.weights import expected_tensors, load_weights
from tests.support import tiny_models
from tests.support.paged import PagedRunner, load_model
from tests.support.tiny_models import make_tiny_model

IDS = [5, 300, 17, 256, 1, 44]
FILE = "model.safetensors"


def logits(path: Path) -> torch.Tensor:
    return PagedRunner(load_model(path)).step({0: IDS})


def transformers_logits(path: Path) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(path)(torch.tensor([IDS])).logits[0]


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(path / FILE)
    change(tensors)
    save_file(tensors, path / FILE, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_expected_tensors_are_those_that_transformers_writes(
    tmp_path: Path, family: str
) -> None:
    options: dict[str, Any] = {"attention_bias": True} if family in ("llama", "qwen3") else {}
    if family == "llama":
        options["mlp_bias"] = True
    path = make_tiny_model(tmp_path, family, **options)
    written = {name: tuple(t.shape) for name, t in load_file(path / FILE).items()}
    expected = expected_tensors(read_model_spec(path))
    assert {name: target.shape for name, target in expected.items()} == written


class TestShards:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = make_tiny_model(tmp_path, max_shard_size="100KB")
        assert len(list(path.glob("*.safetensors"))) > 2
        return path

    def test_equal_one_file(self, path: Path, tmp_path: Path) -> None:
        assert torch.equal(logits(path), logits(make_tiny_model(tmp_path)))

    def test_a_missing_shard(self, path: Path) -> None:
        victim = sorted(path.glob("*.safetensors"))[1]
        victim.unlink()
        with pytest.raises(ModelError, match=f"not there: {victim.name}"):
            load_model(path)

    def test_a_missing_index(self, path: Path) -> None:
        (path / f"{FILE}.index.json").unlink()
        with pytest.raises(ModelError, match=r"neither model\.safetensors nor .*index\.json"):
            load_model(path)

    @pytest.mark.parametrize("content", ['{"weight_map": {}}', "{}", "["])
    def test_a_broken_index(self, path: Path, content: str) -> None:
        (path / f"{FILE}.index.json").write_text(content)
        with pytest.raises(ModelError, match=r"index\.json"):
            load_model(path)

    def test_an_index_that_leaves_the_directory(self, path: Path) -> None:
        index = path / f"{FILE}.index.json"
        index.write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
        with pytest.raises(ModelError, match="outside"):
            load_model(path)

    def test_a_tensor_in_two_shards(self, path: Path) -> None:
        first, second, *_ = sorted(path.glob("*.safetensors"))
        both = load_file(second)
        name, tensor = next(iter(load_file(first).items()))
        save_file({**both, name: tensor}, second)
        with pytest.raises(ModelError, match=f"tensor {name} is in both"):
            load_model(path)

    def test_progress_is_shown_when_asked_for(
        self, path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = load_model(path)
        assert "shard" not in capsys.readouterr().err
        load_weights(model, path, progress=True)
        shards = len(list(path.glob("*.safetensors")))
        shown = capsys.readouterr().err
        assert f"shard {shards} of {shards}" in shown
        assert "100%" in shown


class TestTied:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return make_tiny_model(tmp_path, tie_word_embeddings=True)

    @staticmethod
    def is_tied(path: Path) -> bool:
        model = load_model(path)
        return model.lm_head.weight is model.embed_tokens.weight

    def test_without_lm_head(self, path: Path) -> None:
        assert "lm_head.weight" not in load_file(path / FILE)
        assert self.is_tied(path)

    def test_with_an_equal_lm_head(self, path: Path) -> None:
        wanted = logits(path)
        edit(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
        assert self.is_tied(path)
        assert torch.equal(logits(path), wanted)

    def test_with_only_an_lm_head(self, path: Path) -> None:
        wanted = logits(path)
        edit(path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
        assert self.is_tied(path)
        assert torch.equal(logits(path), wanted)

    def test_with_another_lm_head_both_are_used(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        edit(path, lambda t: t.update({"lm_head.weight": 2 * t["model.embed_tokens.weight"]}))
        assert not self.is_tied(path)
        assert "differ" in caplog.text
        torch.testing.assert_close(logits(path), transformers_logits(path), atol=1e-4, rtol=0)

    def test_with_neither(self, path: Path) -> None:
        edit(path, lambda t: t.pop("model.embed_tokens.weight"))
        with pytest.raises(ModelError, match=r"missing: lm_head.weight, model.embed_tokens.weight"):
            load_model(path)


class TestAccounting:
    def test_missing(self, tmp_path: Path) -> None:
        path = edit(make_tiny_model(tmp_path), lambda t: t.pop("model.norm.weight"))
        with pytest.raises(ModelError, match=r"tensors are missing: model\.norm\.weight"):
            load_model(path)

    def test_an_untied_lm_head_must_be_there(self, tmp_path: Path) -> None:
        path = edit(make_tiny_model(tmp_path), lambda t: t.pop("lm_head.weight"))
        with pytest.raises(ModelError, match=r"missing: lm_head\.weight"):
            load_model(path)

    def test_unexpected(self, tmp_path: Path) -> None:
        name = "model.layers.0.self_attn.q_proj.bias"
        path = edit(make_tiny_model(tmp_path), lambda t: t.update({name: torch.zeros(64)}))
        with pytest.raises(ModelError, match=f"LlamaForCausalLM .* does not have: {name}"):
            load_model(path)

    def test_a_layer_too_many(self, tmp_path: Path) -> None:
        path = make_tiny_model(tmp_path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
        with pytest.raises(ModelError, match=r"model\.layers\.1.* and 1 more"):
            load_model(path)

    def test_shapes(self, tmp_path: Path) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        path = edit(make_tiny_model(tmp_path), lambda t: t.update({name: torch.zeros(7, 64)}))
        with pytest.raises(ModelError, match=rf"{name} is \[7, 64\], the config says \[96, 64\]"):
            load_model(path)

    def test_dtypes(self, tmp_path: Path) -> None:
        name = "model.norm.weight"
        path = edit(make_tiny_model(tmp_path), lambda t: t.update({name: t[name].to(torch.int8)}))
        with pytest.raises(ModelError, match=rf"{name} is I8"):
            load_model(path)

    def test_rotary_buffers_are_known_and_not_needed(self, tmp_path: Path) -> None:
        path = make_tiny_model(tmp_path)
        wanted = logits(path)
        buffers = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
        edit(path, lambda t: t.update({name: torch.zeros(8) for name in buffers}))
        assert torch.equal(logits(path), wanted)


class TestFiles:
    def test_no_weights(self, tmp_path: Path) -> None:
        path = make_tiny_model(tmp_path)
        (path / FILE).unlink()
        with pytest.raises(ModelError, match=f"{path} has no weights"):
            load_model(path)

    def test_only_pickle(self, tmp_path: Path) -> None:
        path = make_tiny_model(tmp_path)
        (path / FILE).rename(path / "pytorch_model.bin")
        with pytest.raises(ModelError, match=r"only as pickle \(pytorch_model\.bin\)"):
            load_model(path)

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated(self, tmp_path: Path, keep: int) -> None:
        path = make_tiny_model(tmp_path)
        data = (path / FILE).read_bytes()
        (path / FILE).write_bytes(data[:keep])
        with pytest.raises(ModelError, match=rf"{path / FILE}: truncated"):
            load_model(path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_checkpoints_are_widened(tmp_path: Path, dtype: str) -> None:
    path = make_tiny_model(tmp_path, dtype=dtype)
    assert read_model_spec(path).dtype == dtype
    model = load_model(path)
    stored = load_file(path / FILE)["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, stored.float())
