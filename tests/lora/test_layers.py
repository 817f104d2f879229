"""LoRA layers against PEFT's own layers, module by module, and on two ranks against one.

Shape legend: T tokens, D input features, O output features.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from lorikeet.adapters.layout import PoolLayout
from lorikeet.lora.build import attach_lora
from lorikeet.lora.layers import LoRAEmbedding, LoRALinear
from lorikeet.ops.lora.metadata import LoRABatch, RowGroup
from lorikeet.ops.lora.torch_ops import TorchBackend
from tests.support.lora_runner import AdapterPool, LoRARunner
from tests.support.paged import PagedRunner, load_model
from tests.support.peft_adapters import LINEAR, make_adapter, peft_model
from tests.support.thread_ranks import ThreadRank, run_ranks
from tests.support.tiny_models import make_tiny_model

EVERY = [*LINEAR, "embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def adapters_of_world(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("layers")
    return {
        "a": make_adapter(llama, path / "a", r=20, targets=EVERY, seed=1),
        "b": make_adapter(llama, path / "b", r=3, alpha=7, use_rslora=True, targets=EVERY, seed=2),
    }


@pytest.fixture(scope="module")
def world(llama, adapters_of_world):
    """Two adapters on every module, ours and PEFT's."""
    directories = adapters_of_world
    runner = LoRARunner(llama, directories)
    oracles = {
        name: dict(peft_model(llama, directory).named_modules())
        for name, directory in directories.items()
    }
    return runner, oracles


def _batch(slots: list[int]) -> types.SimpleNamespace:
    """Token t uses slots[t]; layers read nothing else of a batch."""
    groups = tuple(RowGroup(slot, t, t + 1) for t, slot in enumerate(slots) if slot)
    return types.SimpleNamespace(lora=LoRABatch(groups, groups) if groups else None)


def _call(layer, site, x_TD, batch) -> torch.Tensor:
    """An embedding reads the batch's ids."""
    if site.kind == "embedding":
        ids = types.SimpleNamespace(input_ids_T=x_TD, sampled_L=None, token_ids=lambda: x_TD)
        return layer(types.SimpleNamespace(**vars(ids), lora=batch.lora))
    return layer(x_TD, batch)


@torch.inference_mode()
def test_every_module_equals_pefts(world, sites):
    runner, oracles = world
    slots = runner.adapters.slots
    rows = [None, "a", "b", "b", None, "a"]
    batch = _batch([slots[name] for name in rows])
    for site in sites:
        layer = runner.model.get_submodule(site.path)
        if site.kind == "embedding":
            x_TD = torch.tensor([0, 319, 5, 5, 7, 319])
        else:
            x_TD = torch.randn(len(rows), site.in_features)
        y_TO = _call(layer, site, x_TD, batch)
        for row, name in enumerate(rows):
            x_D = x_TD[row : row + 1]
            expected = []
            for part in site.slices:
                oracle = oracles[name or "a"][f"base_model.model.{part.hf_path}"]
                expected.append(oracle(x_D) if name else oracle.base_layer(x_D))
            torch.testing.assert_close(
                y_TO[row], torch.cat(expected, dim=-1)[0], atol=3e-6, rtol=1e-5, msg=site.path
            )


@torch.inference_mode()
def test_a_batch_without_adapters_is_the_base_layer_bit_for_bit(world, sites, llama):
    runner, base = world[0], load_model(llama)
    for site in sites:
        x_TD = (
            torch.tensor([3, 9]) if site.kind == "embedding" else torch.randn(2, site.in_features)
        )
        batch = types.SimpleNamespace(lora=None)
        ours = _call(runner.model.get_submodule(site.path), site, x_TD, batch)
        assert torch.equal(ours, _call(base.get_submodule(site.path), site, x_TD, batch))


def test_a_batch_without_adapters_calls_no_backend(llama, sites, layout):
    """An engine with LoRA on serves base traffic without a single LoRA op."""
    model = load_model(llama)
    nothing: Any = None
    attach_lora(model, sites, AdapterPool(sites, layout).pool, nothing)
    PagedRunner(model).step({0: [1, 2, 3]})


def test_the_head_sees_the_rows_of_the_logits(world, sites):
    runner = world[0]
    head = runner.model.get_submodule("lm_head")
    slot = runner.adapters.slots["a"]
    lora = LoRABatch(tokens=(RowGroup(slot, 0, 9),), logits=(RowGroup(slot, 1, 2),))
    x_ND = torch.randn(2, 64)
    with torch.inference_mode():
        plain = head(x_ND, types.SimpleNamespace(lora=None))
        logits = head(x_ND, types.SimpleNamespace(lora=lora))
    assert torch.equal(logits[0], plain[0])
    assert (logits[1] - plain[1]).abs().max() > 0.1


def test_only_sites_of_the_targets_are_replaced(llama, sites):
    model = load_model(llama)
    layout = PoolLayout.make(
        sites,
        frozenset({"k_proj", "embed_tokens"}),
        max_rank=8,
        max_loras_per_batch=1,
        element_size=4,
    )
    replaced = attach_lora(model, sites, AdapterPool(sites, layout).pool, TorchBackend())
    assert replaced == [
        "embed_tokens",
        "layers.0.attention.qkv_proj",
        "layers.1.attention.qkv_proj",
    ]
    found = {
        name: type(module)
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear | LoRAEmbedding)
    }
    assert found == {
        "embed_tokens": LoRAEmbedding,
        "layers.0.attention.qkv_proj": LoRALinear,
        "layers.1.attention.qkv_proj": LoRALinear,
    }


def test_a_model_of_other_sites_is_a_bug(tmp_path, sites, layout):
    shallow = load_model(make_tiny_model(tmp_path, "llama", num_hidden_layers=1))
    with pytest.raises(AttributeError):
        attach_lora(shallow, sites, AdapterPool(sites, layout).pool, TorchBackend())


def test_attaching_keeps_tied_weights_tied_and_parameters_as_they_are(tmp_path):
    path = make_tiny_model(tmp_path, "llama", tie_word_embeddings=True)
    model = load_model(path)
    before = sum(parameter.numel() for parameter in model.parameters())
    runner = LoRARunner(path, {})
    after = sum(parameter.numel() for parameter in runner.model.parameters())
    assert after == before
    weight = runner.model.get_parameter("lm_head.base.weight")
    assert weight is runner.model.get_parameter("embed_tokens.base.weight")


@pytest.mark.parametrize(("family", "size"), [("llama", 2), ("qwen2", 2), ("qwen3", 4)])
def test_ranks_together_equal_one_rank(family, size, tmp_path):
    """Column, row, embedding and head, divided over ranks; four ranks share two key/value heads."""
    path = make_tiny_model(tmp_path, family)
    directories = {
        "a": make_adapter(path, tmp_path / "a", r=20, targets=EVERY, seed=1),
        "b": make_adapter(path, tmp_path / "b", r=5, targets=EVERY, seed=2),
    }
    prompts = {0: [5, 6, 7, 300], 1: [1, 319], 2: [8, 9, 200], 3: [4, 2]}
    adapter_of = {0: "a", 1: None, 2: "b", 3: "a"}
    expected_TV = LoRARunner(path, directories).step(prompts, adapter_of)

    def work(tp: ThreadRank) -> torch.Tensor:
        return LoRARunner(path, directories, tp=tp).step(prompts, adapter_of)

    for logits_TV in run_ranks(size, work):
        assert (logits_TV - expected_TV).abs().max() <= 1e-4


ADAPTER_OF = {0: "a", 1: None, 2: "b", 3: "a"}


@pytest.mark.parametrize("backend", ["triton", "csgmv"])
def test_kernels_equal_matmuls_in_a_whole_model(llama, adapters_of_world, backend):
    """A prompt step that adds deltas, then decode steps whose deltas travel beside the outputs."""
    expected = LoRARunner(llama, adapters_of_world)
    runner = LoRARunner(llama, adapters_of_world, backend=backend)
    prompts = {0: [5, 6, 7, 300], 1: [1, 319], 2: [8, 9, 200], 3: [4, 2]}
    rows = [3, 5, 8, 0]
    logits = [each.step(prompts, ADAPTER_OF, rows) for each in (expected, runner)]
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=1e-4)
    for tokens in ({0: [3], 1: [9], 2: [11], 3: [318]}, {0: [12], 1: [4], 2: [1], 3: [3]}):
        wanted_NV = expected.step(tokens, ADAPTER_OF)
        torch.testing.assert_close(
            runner.step(tokens, ADAPTER_OF, beside=True), wanted_NV, atol=2e-5, rtol=1e-4
        )
    base_NV = expected.step({8: [7], 9: [8]}, {})
    assert torch.equal(runner.step({8: [7], 9: [8]}, {}, beside=True), base_NV)


@pytest.mark.parametrize("size", [2])
def test_deltas_beside_are_added_before_the_one_sum_over_ranks(llama, adapters_of_world, size):
    prompts, tokens = {seq: [seq + 5, 9] for seq in range(4)}, {seq: [seq + 1] for seq in range(4)}
    expected = LoRARunner(llama, adapters_of_world)
    expected.step(prompts, ADAPTER_OF)
    expected_NV = expected.step(tokens, ADAPTER_OF)

    def work(tp: ThreadRank) -> torch.Tensor:
        # By matmuls: ranks are threads here, which Triton's interpreter does not know.
        runner = LoRARunner(llama, adapters_of_world, tp=tp)
        runner.step(prompts, ADAPTER_OF)
        return runner.step(tokens, ADAPTER_OF, beside=True)

    for logits_NV in run_ranks(size, work):
        assert (logits_NV - expected_NV).abs().max() <= 1e-4


@torch.inference_mode()
def test_a_delta_travels_only_where_nothing_reduces_in_between(llama, adapters_of_world, sites):
    runner = LoRARunner(llama, adapters_of_world, backend="csgmv")
    slot = runner.adapters.slots["a"]
    lora = runner.lora([slot, 0], [1, 1], [0, 1], beside=True)
    batch: Any = types.SimpleNamespace(lora=lora)
    for site in sites:
        layer = runner.model.get_submodule(site.path)
        if not isinstance(layer, LoRALinear):
            continue
        x_TD = torch.randn(2, site.in_features)
        layer._backend.begin(lora)
        y_TO, delta_TO = layer.forward_split(x_TD, batch)
        if site.kind == "lm_head":
            assert delta_TO is None
            continue
        assert torch.equal(y_TO, layer.base.local(x_TD))
        assert delta_TO[0].abs().max() > 0
        assert not delta_TO[1].any()
        layer._backend.begin(lora)
        torch.testing.assert_close(layer(x_TD, batch), y_TO + delta_TO)
        assert layer.forward_split(x_TD, types.SimpleNamespace(lora=None))[1] is None
