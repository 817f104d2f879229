"""Adapters from disk: what is packed, and every reason to refuse one."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorikeet.adapters.layout import PoolLayout
from lorikeet.adapters.spec import MAX_CONFIG_BYTES
from lorikeet.errors import AdapterError
from lorikeet.layers.linear import Part, ShardRule
from lorikeet.lora.base_weights import checkpoint_weight
from lorikeet.lora.loader import load_adapter
from lorikeet.lora.tensors import TensorFile
from lorikeet.models.spec import read_model_spec
from tests.support.peft_adapters import LINEAR, WEIGHTS, edit_config, edit_weights, make_adapter
from tests.support.tiny_models import make_tiny_model

PREFIX = "base_model.model."
Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(llama, tmp_path_factory):
    """Rank 20 on q, v and down."""
    out = tmp_path_factory.mktemp("plain")
    return make_adapter(llama, out, r=20, alpha=10, targets=("q_proj", "v_proj", "down_proj"))


@pytest.fixture
def copied(plain, tmp_path):
    """The same, to be spoilt."""
    return shutil.copytree(plain, tmp_path / "adapter")


@pytest.fixture
def load(sites, layout):
    def load(directory, **fields):
        return load_adapter("a", directory, sites, layout, torch.float32, **fields)

    return load


def _refused(load, directory, *says, **fields):
    with pytest.raises(AdapterError) as caught:
        load(directory, **fields)
    for text in says:
        assert text in str(caught.value), caught.value


def _change(directory, name, change):
    edit_weights(directory, lambda tensors: tensors.update({name: change(tensors[name])}))


def test_pages_hold_a_and_b_side_by_side(load, plain, sites):
    adapter = load(plain)
    stored = load_file(plain / WEIGHTS)
    assert (adapter.name, adapter.rank, adapter.targets) == (
        "a",
        20,
        ("down_proj", "q_proj", "v_proj"),
    )
    assert len(adapter.modules) == 3 * 2
    assert len(adapter.pages) == len(adapter.page_classes) == 3 * 3 * 2
    for module in adapter.modules:
        site = sites[module.site]
        part = site.slices[module.part]
        A_RK = stored[f"{PREFIX}{part.hf_path}.lora_A.weight"]
        B_OR = stored[f"{PREFIX}{part.hf_path}.lora_B.weight"]
        pages = adapter.pages[module.first_page : module.first_page + module.num_pages]
        rows_RC = torch.cat(pages).view(24, -1)
        assert torch.equal(rows_RC[:20], torch.cat((A_RK, B_OR.T), dim=1))
        assert not rows_RC[20:].any()
        assert (module.rank, module.scale) == (20, 0.5)


def test_bytes_are_those_of_the_pages(load, plain):
    adapter = load(plain)
    assert (
        adapter.nbytes == 4 * sum(adapter.page_sizes) == 4 * sum(p.numel() for p in adapter.pages)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_stored_type_is_packed_in_the_pools_type(llama, tmp_path, sites, layout, dtype):
    directory = make_adapter(llama, tmp_path, r=4, dtype=dtype)
    stored = load_file(directory / WEIGHTS)[f"{Q0}.lora_A.weight"]
    assert stored.dtype == dtype
    for pool_dtype in (torch.float32, torch.bfloat16, torch.float16):
        adapter = load_adapter("a", directory, sites, layout, pool_dtype)
        page = adapter.pages[0].view(8, -1)
        assert page.dtype == pool_dtype
        assert torch.equal(page[:4, :64], stored.to(pool_dtype))


def test_scale_and_rank_by_module(llama, tmp_path, load, sites):
    directory = make_adapter(
        llama,
        tmp_path,
        r=4,
        alpha=6,
        use_rslora=True,
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 9},
        alpha_pattern={"v_proj": 3},
    )
    found = {
        sites[m.site].slices[m.part].hf_path: (m.rank, m.scale) for m in load(directory).modules
    }
    assert found == {
        "model.layers.0.self_attn.q_proj": (4, 3.0),
        "model.layers.1.self_attn.q_proj": (9, 2.0),
        "model.layers.0.self_attn.v_proj": (4, 1.5),
        "model.layers.1.self_attn.v_proj": (4, 1.5),
    }


def test_the_digest_is_of_what_the_adapter_computes(load, copied):
    first = load(copied).digest
    assert load(copied).digest == first
    edit_config(copied, lora_dropout=0.5, peft_version="9", base_model_name_or_path="elsewhere")
    assert load(copied).digest == first
    edit_config(copied, lora_alpha=11)
    other = load(copied).digest
    assert other != first
    edit_config(copied, lora_alpha=10)
    assert load(copied).digest == first
    _change(
        copied, f"{Q0}.lora_A.weight", lambda t: t.clone().index_fill_(1, torch.tensor([3]), 0.5)
    )
    assert load(copied).digest not in (first, other)


def test_all_linear_and_every_module_is_found(llama, tmp_path, load):
    adapter = load(make_adapter(llama, tmp_path, r=2, targets="all-linear"))
    assert adapter.targets == tuple(sorted(LINEAR))
    assert len(adapter.modules) == 14


# Refusals: contract section 3.


def test_rank_above_the_limit(llama, tmp_path, load):
    directory = make_adapter(llama, tmp_path, r=8, rank_pattern={"v_proj": 65})
    _refused(load, directory, "incompatible", "65", "64")


def test_module_outside_of_the_targets(sites, plain):
    layout = PoolLayout.make(
        sites, frozenset({"q_proj"}), max_rank=64, max_loras_per_batch=1, element_size=4
    )
    with pytest.raises(AdapterError, match=r"incompatible.*down_proj, v_proj.*q_proj"):
        load_adapter("a", plain, sites, layout, torch.float32)


def test_adapter_of_another_base(tmp_path, load):
    other = make_tiny_model(tmp_path, "llama", hidden_size=32, num_hidden_layers=2)
    directory = make_adapter(other, tmp_path / "a", r=4, targets=("q_proj",))
    _refused(load, directory, f"{Q0}.lora_A.weight", "[4, 32]", "[4, 64]")


def test_adapter_of_a_deeper_base(tmp_path, load):
    other = make_tiny_model(tmp_path, "llama", num_hidden_layers=3)
    directory = make_adapter(other, tmp_path / "a", r=4)
    _refused(load, directory, "model.layers.2.self_attn.q_proj", "matches no module")


def test_adapter_of_a_shallower_base(tmp_path, load):
    other = make_tiny_model(tmp_path, "llama", num_hidden_layers=1)
    directory = make_adapter(other, tmp_path / "a", r=4)
    _refused(load, directory, "model.layers.1.self_attn.q_proj.lora_A.weight", "missing")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (f"{Q0}.lora_A.weight", [21, 64], "[20, 64]"),
        (f"{Q0}.lora_A.weight", [64, 20], "[20, 64]"),
        (f"{Q0}.lora_B.weight", [64, 19], "[64, 20]"),
        (f"{Q0}.lora_B.weight", [64, 20, 1], "[64, 20]"),
    ],
)
def test_a_shape_that_does_not_fit(load, copied, name, shape, expected):
    _change(copied, name, lambda _: torch.ones(shape))
    _refused(load, copied, name, str(shape), expected)


@pytest.mark.parametrize(
    "name",
    [
        f"{Q0}.lora_A.weight",
        f"{Q0}.lora_B.weight",
        f"{PREFIX}model.layers.1.mlp.down_proj.lora_B.weight",
    ],
)
def test_a_missing_half(load, copied, name):
    edit_weights(copied, lambda tensors: tensors.pop(name))
    _refused(load, copied, name, "missing")


@pytest.mark.parametrize(
    "name",
    [
        f"{Q0}.lora_magnitude_vector",
        f"{Q0}.lora_B.bias",
        f"{Q0}.bias",
        f"{PREFIX}model.layers.0.self_attn.k_proj.lora_A.weight",
        f"{PREFIX}model.layers.9.self_attn.q_proj.lora_A.weight",
        f"{PREFIX}model.norm.weight",
        f"{PREFIX}model.layers.0.self_attn.q_proj.lora_embedding_A",
        "anything",
    ],
)
def test_a_tensor_that_matches_no_module(load, copied, name):
    edit_weights(copied, lambda tensors: tensors.update({name: torch.ones(3)}))
    _refused(load, copied, name, "matches no module")


def _without_prefix(tensors):
    for name in list(tensors):
        tensors[name.removeprefix(PREFIX)] = tensors.pop(name)


def _with_adapter_name(tensors):
    for name in list(tensors):
        tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)


@pytest.mark.parametrize("edit", [_without_prefix, _with_adapter_name])
def test_names_that_peft_does_not_write(load, copied, edit):
    edit_weights(copied, edit)
    _refused(load, copied, "down_proj.lora_A", "matches no module")


def test_the_configuration_names_more_than_the_weights(load, copied):
    edit_config(copied, target_modules=["q_proj", "v_proj", "down_proj", "o_proj"])
    _refused(load, copied, "o_proj.lora_A.weight", "missing")


def test_the_configuration_names_less_than_the_weights(load, copied):
    edit_config(copied, target_modules=["q_proj", "v_proj"])
    _refused(load, copied, "down_proj.lora_A.weight", "matches no module")


def test_the_configured_rank_is_not_that_of_the_weights(load, copied):
    edit_config(copied, rank_pattern={"v_proj": 4})
    _refused(load, copied, "v_proj.lora_A.weight", "[20, 64]", "[4, 64]")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name],
        lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_A" in name],
    ],
)
def test_an_adapter_that_would_change_nothing(load, copied, change):
    edit_weights(copied, change)
    _refused(load, copied, "would change nothing")


def test_alpha_zero_changes_nothing(load, copied):
    edit_config(copied, lora_alpha=0)
    _refused(load, copied, "would change nothing")


def test_one_module_that_changes_something_is_enough(load, copied):
    edit_weights(
        copied,
        lambda tensors: [
            t.zero_()
            for name, t in tensors.items()
            if name != f"{Q0}.lora_B.weight" and "lora_B" in name
        ],
    )
    assert load(copied).rank == 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("half", ["A", "B"])
def test_values_that_are_not_finite(load, copied, value, half):
    name = f"{PREFIX}model.layers.1.mlp.down_proj.lora_{half}.weight"
    _change(copied, name, lambda t: t.index_fill(0, torch.tensor([1]), value))
    _refused(load, copied, name, "NaN or infinite")


def test_finite_values_whose_sum_is_not(load, copied):
    _change(copied, f"{Q0}.lora_A.weight", lambda t: torch.full_like(t, 3e38))
    _change(copied, f"{Q0}.lora_B.weight", lambda t: t.index_fill(0, torch.tensor([1]), -3e38))
    assert load(copied).rank == 20


def test_values_beyond_the_pools_type(copied, sites, layout):
    _change(copied, f"{Q0}.lora_B.weight", lambda t: t * 1e7)
    with pytest.raises(AdapterError, match=r"self_attn\.q_proj.*float16"):
        load_adapter("a", copied, sites, layout, torch.float16)
    assert load_adapter("a", copied, sites, layout, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_types_that_are_no_adapters(load, copied, dtype):
    _change(copied, f"{Q0}.lora_B.weight", lambda t: t.to(dtype))
    _refused(load, copied, f"{Q0}.lora_B.weight", "F32, F16, BF16")


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_truncated_weights(load, copied, keep):
    path = copied / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    _refused(load, copied, str(path), "broken or truncated")


def test_weights_of_garbage(load, copied):
    (copied / WEIGHTS).write_bytes(b"not a safetensors file at all" * 10)
    _refused(load, copied, str(copied / WEIGHTS), "broken")


def test_weights_only_as_a_pickle(load, copied):
    (copied / WEIGHTS).rename(copied / "adapter_model.bin")
    _refused(load, copied, "adapter_model.bin", "pickle")


def test_missing_files(load, copied):
    (copied / WEIGHTS).unlink()
    _refused(load, copied, WEIGHTS)
    (copied / "adapter_config.json").unlink()
    _refused(load, copied, "adapter_config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1]),
    ],
)
def test_what_is_not_implemented_is_refused_before_the_weights_are_read(load, copied, field, value):
    (copied / WEIGHTS).write_bytes(b"")
    edit_config(copied, **{field: value})
    _refused(load, copied, field)


# What lies at the paths instead of files.


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
def test_a_directory_in_place_of_a_file(load, copied, name):
    (copied / name).unlink()
    (copied / name).mkdir()
    _refused(load, copied, str(copied / name), "Is a directory")


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
def test_a_pipe_in_place_of_a_file_does_not_block(load, copied, name):
    (copied / name).unlink()
    os.mkfifo(copied / name)
    _refused(load, copied, str(copied / name), "not a regular file")


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
def test_a_link_to_nowhere_or_to_itself(load, copied, name):
    (copied / name).unlink()
    (copied / name).symlink_to(copied / "nowhere")
    _refused(load, copied, name)
    (copied / name).unlink()
    (copied / name).symlink_to(copied / name)
    _refused(load, copied, name)


def test_a_file_in_place_of_the_directory(load, copied):
    _refused(load, copied / WEIGHTS, WEIGHTS, "Not a directory")


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
def test_a_file_that_may_not_be_read(load, copied, monkeypatch, name):
    real = os.open

    def refuse(path, flags, *mode, **keywords):
        # Permission bits do not stop root, who may run these tests.
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, flags, *mode, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    _refused(load, copied, f"cannot read {copied / name}: Permission denied")


def test_a_disk_that_fails_while_the_weights_are_read(load, copied, monkeypatch):
    def fail(self, names):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(TensorFile, "read_all", fail)
    _refused(load, copied, f"cannot read {copied / WEIGHTS}: Input/output error")


def test_no_file_stays_open(load, copied):
    before = len(os.listdir("/proc/self/fd"))
    load(copied)
    for name in (WEIGHTS, "adapter_config.json"):
        (copied / name).unlink()
        (copied / name).mkdir()
        _refused(load, copied, name)
        (copied / name).rmdir()
        (copied / name).write_bytes(b"")
        _refused(load, copied, name)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b"1" * 5000, "not valid JSON"),
        (b"[]", "holds a JSON list"),
        (b" " * (MAX_CONFIG_BYTES + 1), f"at most {MAX_CONFIG_BYTES}"),
    ],
    ids=["empty", "utf-16", "deep", "long-number", "list", "large"],
)
def test_a_configuration_of_garbage(load, copied, text, says):
    (copied / "adapter_config.json").write_bytes(text)
    _refused(load, copied, str(copied / "adapter_config.json"), says)


def test_a_configuration_of_gigabytes_is_not_read(load, copied):
    os.truncate(copied / "adapter_config.json", 5 << 30)
    _refused(load, copied, f"has {5 << 30} bytes")


@pytest.mark.parametrize("value", [10**400, 10**39, -(10**39)])
def test_a_scale_that_no_float_holds(load, copied, value):
    edit_config(copied, lora_alpha=value)
    _refused(load, copied, "lora_alpha", "finite number")


# Embeddings: PEFT saves a copy of the base's table beside the adapter.


@pytest.fixture
def with_embeddings(llama, tmp_path):
    return make_adapter(llama, tmp_path / "e", r=4, targets=("embed_tokens", "lm_head"))


EMBEDDING_COPY = f"{PREFIX}model.embed_tokens.base_layer.weight"
HEAD_COPY = f"{PREFIX}lm_head.base_layer.weight"


def test_a_true_copy_of_the_embedding_is_left_alone(load, with_embeddings, llama):
    assert {EMBEDDING_COPY, HEAD_COPY} <= load_file(with_embeddings / WEIGHTS).keys()
    adapter = load(with_embeddings, base_weight=checkpoint_weight(llama))
    assert adapter.targets == ("embed_tokens", "lm_head")
    edit_weights(with_embeddings, lambda t: (t.pop(EMBEDDING_COPY), t.pop(HEAD_COPY)))
    assert load(with_embeddings).digest == adapter.digest


def test_a_rounded_copy_is_a_copy(load, with_embeddings, llama):
    _change(with_embeddings, EMBEDDING_COPY, lambda t: t.bfloat16())
    assert load(with_embeddings, base_weight=checkpoint_weight(llama))


@pytest.mark.parametrize("name", [EMBEDDING_COPY, HEAD_COPY])
def test_a_retrained_embedding_is_refused(load, with_embeddings, llama, name):
    _change(with_embeddings, name, lambda t: t.index_fill(0, torch.tensor([7]), 0.1))
    _refused(load, with_embeddings, name, "retrained tokens", base_weight=checkpoint_weight(llama))


def test_added_tokens_are_refused(load, with_embeddings, llama):
    _change(with_embeddings, EMBEDDING_COPY, lambda t: torch.cat((t, t[:2])))
    _refused(
        load,
        with_embeddings,
        "[322, 64]",
        "[320, 64]",
        "added tokens",
        base_weight=checkpoint_weight(llama),
    )


def test_added_tokens_beside_other_modules_are_refused(load, copied, llama):
    name = f"{PREFIX}model.embed_tokens.weight"
    edit_weights(copied, lambda t: t.update({name: torch.zeros(330, 64)}))
    _refused(load, copied, name, "added tokens", base_weight=checkpoint_weight(llama))


def test_a_copy_is_refused_when_there_is_nothing_to_compare_it_with(load, with_embeddings):
    _refused(load, with_embeddings, EMBEDDING_COPY, "compare")


def test_the_head_of_a_tied_base_is_compared_with_its_embedding(tmp_path):
    tied = make_tiny_model(tmp_path, "qwen2", tie_word_embeddings=True)
    sites = read_model_spec(tied).lora_sites
    layout = PoolLayout.make(
        sites, frozenset({"lm_head"}), max_rank=4, max_loras_per_batch=1, element_size=4
    )
    directory = make_adapter(tied, tmp_path / "a", r=4, targets=("lm_head",))
    assert HEAD_COPY in load_file(directory / WEIGHTS)
    load_adapter("a", directory, sites, layout, torch.float32, base_weight=checkpoint_weight(tied))


# Tensor parallelism: what one rank of two holds.


def test_each_rank_packs_its_part(llama, tmp_path, sites):
    directory = make_adapter(llama, tmp_path, r=4, targets="all-linear")
    whole = load_file(directory / WEIGHTS)
    names = frozenset(LINEAR)
    for rank in range(2):
        rules = [
            ShardRule(
                "row" if site.kind in ("row", "embedding") else "column",
                rank,
                2,
                tuple(Part(part.out_features, 2) for part in site.slices),
            )
            for site in sites
        ]
        layout = PoolLayout.make(sites, names, max_rank=4, max_loras_per_batch=1, element_size=4)
        adapter = load_adapter("a", directory, sites, layout, torch.float32, rules=rules)
        for module in adapter.modules:
            part = sites[module.site].slices[module.part]
            A_RK = whole[f"{PREFIX}{part.hf_path}.lora_A.weight"]
            B_OR = whole[f"{PREFIX}{part.hf_path}.lora_B.weight"]
            if sites[module.site].kind == "row":
                A_RK = A_RK.chunk(2, dim=1)[rank]
            else:
                B_OR = B_OR.chunk(2, dim=0)[rank]
            rows_RC = adapter.pages[module.first_page].view(8, -1)
            assert torch.equal(rows_RC[:4], torch.cat((A_RK, B_OR.T), dim=1))


def test_a_file_of_another_metadata_is_the_same_adapter(load, copied):
    digest = load(copied).digest
    tensors = load_file(copied / WEIGHTS)
    save_file(tensors, copied / WEIGHTS, metadata={"format": "pt", "note": "saved again"})
    assert load(copied).digest == digest


def test_a_digest_that_cannot_be_made_fails_the_load(load, copied, monkeypatch):
    """Equal digests mean equal weights, so one without a tensor must not pass."""

    def broken(*args):
        raise MemoryError("no room")

    monkeypatch.setattr("lorikeet.lora.loader._Packer._hash", broken)
    with pytest.raises(MemoryError):
        load(copied)


def test_a_configuration_with_half_a_surrogate_pair(load, copied):
    edit_config(copied, **{"\ud800x": 1})
    _refused(load, copied, "surrogate pair")
