"""Reading single tensors of the base model, and telling copies from changes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lorikeet.errors import ModelError
from lorikeet.lora.base_weights import checkpoint_weight, is_copy
from tests.support.tiny_models import make_tiny_model


@pytest.mark.parametrize("max_shard_size", ["5GB", "50KB"])
def test_tensors_of_single_files_and_of_shards(tmp_path, max_shard_size):
    model = make_tiny_model(tmp_path, "llama", max_shard_size=max_shard_size)
    assert (len(list(model.glob("*.safetensors"))) > 1) == (max_shard_size == "50KB")
    stored = {}
    for path in model.glob("*.safetensors"):
        stored |= load_file(path)
    read = checkpoint_weight(model)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weight = read(name)
        assert weight is not None
        assert torch.equal(weight, stored[name])
    assert read("model.nothing.weight") is None


def test_the_head_of_a_tied_model_is_its_embedding(tmp_path):
    read = checkpoint_weight(make_tiny_model(tmp_path, "llama", tie_word_embeddings=True))
    head, table = read("lm_head.weight"), read("model.embed_tokens.weight")
    assert head is not None
    assert table is not None
    assert torch.equal(head, table)


def test_an_unreadable_file_is_named(tmp_path):
    model = make_tiny_model(tmp_path, "llama")
    (model / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=str(model)):
        checkpoint_weight(model)("lm_head.weight")
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=str(model)):
        checkpoint_weight(model)("lm_head.weight")


def test_copies_and_changes():
    base = torch.randn(5, 3)
    assert is_copy(base.clone(), base)
    assert is_copy(base.bfloat16(), base)
    assert is_copy(base.bfloat16().float(), base.bfloat16())
    assert not is_copy(base[:4], base)
    assert not is_copy(base.clone().index_fill(0, torch.tensor([2]), 0.0), base)
    assert not is_copy(base.half(), base.bfloat16())
