"""From safetensors files to parameters: every tensor is accounted for, before the first one is copied.

Names and shapes are checked from the files' headers: a tensor that is missing, not known, of another shape or of a
dtype that is no plain float makes the checkpoint one that cannot be served. Then the tensors are streamed, one at a
time, into the layers that know their shard.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from lorikeet.errors import ModelError
from lorikeet.models.decoder import Decoder
from lorikeet.models.spec import ModelSpec, read_json

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = frozenset({"F32", "F16", "BF16"})
_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that old exports wrote beside the weights; they follow from the config and are computed from it.
_DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_NAMES_IN_MESSAGE = 8


class Loadable(Protocol):
    """A layer that takes its piece of a checkpoint tensor; see ``Linear.load_part``."""

    def load_part(self, name: str, part: int, whole: torch.Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a checkpoint's tensor goes.

    Attributes:
        shape: of the whole tensor, over all ranks.
        module: path in the decoder.
        name: parameter of that module, ``weight`` or ``bias``.
        part: which of the modules packed into it (see ``Linear.load_part``).
    """

    shape: tuple[int, ...]
    module: str
    name: str
    part: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def expected_tensors(spec: ModelSpec) -> dict[str, Destination]:
    """Every tensor of a checkpoint in Hugging Face naming, tied ones included."""
    bias_of = dict.fromkeys(("q_proj", "k_proj", "v_proj"), spec.qkv_bias) | {
        "o_proj": spec.o_bias,
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), spec.mlp_bias),
    }
    targets: dict[str, Destination] = {}
    for site in spec.lora_sites:
        for part, module in enumerate(site.slices):
            shape = (module.out_features, site.in_features)
            if site.kind == "embedding":
                shape = shape[::-1]  # a table of rows to look up, not a matrix to multiply with
            targets[f"{module.hf_path}.weight"] = Destination(shape, site.path, "weight", part)
            if bias_of.get(module.name):
                targets[f"{module.hf_path}.bias"] = Destination(shape[:1], site.path, "bias", part)
    norms = {"model.norm": ("norm", spec.hidden_size)}
    for layer in range(spec.num_layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        norms[f"{theirs}.input_layernorm"] = (f"{ours}.input_norm", spec.hidden_size)
        norms[f"{theirs}.post_attention_layernorm"] = (f"{ours}.mlp_norm", spec.hidden_size)
        if spec.qk_norm:
            for name in ("q_norm", "k_norm"):
                norms[f"{theirs}.self_attn.{name}"] = (f"{ours}.attention.{name}", spec.head_dim)
    for theirs, (ours, size) in norms.items():
        targets[f"{theirs}.weight"] = Destination((size,), ours, "weight", 0)
    return targets


def find_weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single one, or the shards that the index names.

    Raises:
        ModelError: there are none (pickle files are named and refused), or the index names a file that is missing.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
        if pickles:
            raise ModelError(
                f"{directory} has its weights only as pickle ({_some(pickles)}), which can run code when it is read; "
                "convert them to safetensors"
            )
        raise ModelError(
            f"{directory} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    if outside := [name for name in names if Path(name).name != name]:
        raise ModelError(f"{index}: names files outside of the directory: {_some(outside)}")
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise ModelError(f"{index} names files that are not there: {_some(missing)}")
    return [directory / name for name in names]


def read_headers(files: list[Path]) -> dict[str, StoredTensor]:
    """What tensors the files hold; no tensor is read.

    Raises:
        ModelError: a file is truncated or no safetensors file, or two files hold the same tensor.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        with _reading(file) as handle:
            for name in handle.keys():  # noqa: SIM118  the handle is no mapping
                if name in found:
                    raise ModelError(f"tensor {name} is in both {found[name].file} and {file}")
                view = handle.get_slice(name)
                found[name] = StoredTensor(file, tuple(view.get_shape()), view.get_dtype())
    return found


def check_tensors(
    expected: Mapping[str, Destination],
    found: Mapping[str, StoredTensor],
    spec: ModelSpec,
    directory: Path,
) -> None:
    """Check that every expected tensor is there, in its shape and as plain floats, and no other.

    With tied embeddings one of the two tensors may be absent.

    Raises:
        ModelError: names the tensors, and for a wrong shape both shapes.
    """
    missing = expected.keys() - found.keys()
    if spec.tie_word_embeddings and len(missing & {_EMBEDDING, _LM_HEAD}) == 1:
        missing -= {_EMBEDDING, _LM_HEAD}
    if missing:
        raise ModelError(f"{directory}: tensors are missing: {_some(sorted(missing))}")
    unknown = [name for name in found.keys() - expected.keys() if not _DERIVED.fullmatch(name)]
    if unknown:
        raise ModelError(
            f"{directory}: tensors that {spec.architecture} with this config does not have: {_some(sorted(unknown))}"
        )
    shapes = [
        f"{name} is {list(found[name].shape)}, the config says {list(target.shape)}"
        for name, target in expected.items()
        if name in found and found[name].shape != target.shape
    ]
    if shapes:
        raise ModelError(f"{directory}: tensors do not fit config.json: {_some(shapes)}")
    dtypes = [
        f"{name} is {found[name].dtype}"
        for name in expected
        if name in found and found[name].dtype not in _DTYPES
    ]
    if dtypes:
        raise ModelError(
            f"{directory}: only {', '.join(sorted(_DTYPES))} weights are supported: {_some(dtypes)}"
        )


def load_weights(model: Decoder, directory: Path, *, progress: bool) -> None:
    """Fill a model from a checkpoint; ties the LM head to the embedding where the checkpoint does.

    If the config says "tied" but the two tensors differ, they are not tied, as in transformers.

    Args:
        progress: show a bar of bytes on stderr, with the number of the shard.

    Raises:
        ModelError: see :func:`find_weight_files`, :func:`read_headers` and :func:`check_tensors`.
    """
    spec = model.spec
    files = find_weight_files(directory)
    expected, found = expected_tensors(spec), read_headers(files)
    check_tensors(expected, found, spec, directory)
    has_both = found.keys() >= {_EMBEDDING, _LM_HEAD}
    if spec.tie_word_embeddings and not has_both:
        model.tie()
    total = sum(file.stat().st_size for file in files)
    with tqdm(
        total=total, unit="B", unit_scale=True, disable=not progress, desc="Loading weights"
    ) as bar:
        for number, file in enumerate(files, 1):
            bar.set_description(f"Loading weights, shard {number} of {len(files)}")
            for name, tensor in _tensors(file):
                if (target := expected.get(name)) is not None:
                    layer = cast(Loadable, model.get_submodule(target.module))
                    layer.load_part(target.name, target.part, tensor)
                bar.update(tensor.nbytes)
        bar.update(total - bar.n)  # the headers
    if spec.tie_word_embeddings and has_both:
        if torch.equal(model.embed_tokens.weight, model.lm_head.weight):
            model.tie()
        else:
            logger.warning(
                "%s: config.json ties the LM head to the embedding, but the two tensors differ; they are used as "
                "they are",
                directory,
            )


def fill_random(model: Decoder, seed: int) -> None:
    """Random weights of a plausible scale, made on the model's device: norms are 1, biases and matrices small.

    Each parameter has its own generator, so its values do not depend on which others exist.
    """
    if model.spec.tie_word_embeddings:
        model.tie()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "norm" in name:
                parameter.fill_(1.0)
                continue
            generator = torch.Generator(parameter.device).manual_seed(seed + number)
            # 1 / sqrt(inputs) keeps the size of activations from layer to layer.
            scale = 0.02 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, scale, generator=generator)


@contextmanager
def _reading(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: truncated, or not a safetensors file: {error}") from error


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with _reading(file) as handle:
        for name in handle.keys():  # noqa: SIM118
            yield name, handle.get_tensor(name)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_IN_MESSAGE])
    rest = len(names) - _NAMES_IN_MESSAGE
    return f"{shown} and {rest} more" if rest > 0 else shown
