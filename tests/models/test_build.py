"""Building models: load formats, refusals, and ranks that share one model."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorikeet.attention.sdpa import SDPABackend
from lorikeet.errors import ConfigError, ModelError
from lorikeet.models.build import build_model, check_divisible
from lorikeet.models.decoder import Decoder
from lorikeet.models.spec import ModelSpec, read_model_spec
from lorikeet.parallel.group import SingleRank, TPGroup
from tests.support.paged import PagedRunner, load_model
from tests.support.thread_ranks import ThreadRank, run_ranks
from tests.support.tiny_models import make_tiny_model


def build(
    path: Path | str, spec: ModelSpec, load_format: str = "auto", tp: TPGroup | None = None
) -> Decoder:
    return build_model(
        path,
        spec,
        dtype=torch.float32,
        device="cpu",
        load_format=load_format,
        tp=tp or SingleRank(),
        attention=SDPABackend(),
        progress=False,
    )


class TestDummy:
    @pytest.mark.parametrize("tied", [True, False])
    def test_needs_only_a_config(self, tmp_path: Path, tied: bool) -> None:
        path = make_tiny_model(tmp_path, "qwen3", tie_word_embeddings=tied)
        (path / "model.safetensors").unlink()
        spec = read_model_spec(path)
        model = build(path, spec, "dummy")
        assert sum(p.numel() for p in model.parameters()) == spec.num_parameters
        logits = PagedRunner(model).step({0: [1, 2, 3, 4]})
        assert logits.isfinite().all()
        assert logits.std() > 0.1

    def test_is_the_same_every_time(self, tmp_path: Path) -> None:
        path = make_tiny_model(tmp_path)
        spec = read_model_spec(path)
        first, second = build(path, spec, "dummy"), build(path, spec, "dummy")
        for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_an_unknown_load_format(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path)
    with pytest.raises(ConfigError, match="'gguf' is not supported; supported: auto, safetensors"):
        build(path, read_model_spec(path), "gguf")


def test_the_log_says_what_was_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_model(make_tiny_model(tmp_path))
    assert "LlamaForCausalLM" in caplog.text
    assert "float32" in caplog.text


def test_lora_sites_are_modules_of_the_decoder(tmp_path: Path) -> None:
    model = load_model(make_tiny_model(tmp_path, "qwen2"))
    for site in model.spec.lora_sites:
        weight = model.get_submodule(site.path).get_parameter("weight")
        shape = (site.out_features, site.in_features)
        assert tuple(weight.shape) == (shape[::-1] if site.kind == "embedding" else shape)


class TestRanks:
    @pytest.mark.parametrize(
        ("family", "size", "options"),
        [
            ("llama", 2, {"attention_bias": True, "mlp_bias": True}),
            ("llama", 2, {"tie_word_embeddings": True}),
            ("qwen2", 4, {}),  # two ranks share each key/value head
            ("qwen3", 2, {"attention_bias": True}),
            ("mistral", 4, {"num_key_value_heads": 1, "sliding_window": 4}),
        ],
    )
    def test_together_they_equal_one(
        self, tmp_path: Path, family: str, size: int, options: dict[str, Any]
    ) -> None:
        path = make_tiny_model(tmp_path, family, **options)
        spec = read_model_spec(path)
        ids = [7, 311, 4, 90, 256, 12, 12, 3]

        def work(rank: ThreadRank) -> torch.Tensor:
            kv_heads = max(1, spec.num_kv_heads // size)
            runner = PagedRunner(build(path, spec, tp=rank), num_kv_heads=kv_heads)
            return torch.cat([runner.step({0: ids[:5]}), *(runner.step({0: [i]}) for i in ids[5:])])

        wanted = PagedRunner(load_model(path)).step({0: ids})
        for logits in run_ranks(size, work):
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)

    def test_each_has_the_whole_states(self, tmp_path: Path) -> None:
        path = make_tiny_model(tmp_path, "llama")
        ids = [7, 311, 4, 90, 256]
        spec = read_model_spec(path)

        def pooled(model: Decoder, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
            batch = PagedRunner(model, num_kv_heads=kv_heads).batch({0: ids}, rows=[4, 0])
            with torch.inference_mode():
                return model.forward_pooled(replace(batch, pooled_rows_P=torch.tensor([1, 4, 3])))

        wanted = pooled(load_model(path), spec.num_kv_heads)
        for found in run_ranks(
            2, lambda rank: pooled(build(path, spec, tp=rank), spec.num_kv_heads // 2)
        ):
            for ours, right in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours, right, atol=1e-4, rtol=0)

    def test_each_holds_its_share(self, tmp_path: Path) -> None:
        path = make_tiny_model(tmp_path)
        spec = read_model_spec(path)
        first, second = run_ranks(2, lambda rank: build(path, spec, tp=rank))
        whole = load_model(path)
        assert torch.equal(
            torch.cat([first.embed_tokens.weight, second.embed_tokens.weight]),
            whole.embed_tokens.weight,
        )
        shapes = [m.get_submodule("layers.0.mlp.down_proj").weight.shape for m in (first, whole)]
        assert shapes == [(64, 48), (64, 96)]

    def test_what_cannot_be_divided(self, tmp_path: Path) -> None:
        spec = read_model_spec(make_tiny_model(tmp_path))
        check_divisible(spec, 4)
        with pytest.raises(ModelError, match="3 tensor-parallel ranks cannot divide num_attention"):
            check_divisible(spec, 3)
        spec = read_model_spec(
            make_tiny_model(
                tmp_path,
                num_attention_heads=6,
                head_dim=8,
                num_key_value_heads=2,
                intermediate_size=90,
                hidden_size=60,
                vocab_size=300,
            )
        )
        with pytest.raises(ModelError, match="num_key_value_heads 2"):
            check_divisible(spec, 3)
