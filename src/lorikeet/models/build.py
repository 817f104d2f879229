"""A model that can run, from a spec and a directory of weights."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from lorikeet.attention.base import AttentionBackend
from lorikeet.errors import ConfigError, ModelError
from lorikeet.layers.linear import Placement
from lorikeet.models.decoder import Decoder
from lorikeet.models.source import locate_model
from lorikeet.models.spec import ModelSpec
from lorikeet.models.weights import fill_random, load_weights
from lorikeet.ops.select import select_ops
from lorikeet.parallel.group import TPGroup

logger = logging.getLogger(__name__)

LOAD_FORMATS = ("auto", "safetensors", "dummy")
_DUMMY_SEED = 0


def build_model(
    path: str | Path,
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    load_format: str,
    tp: TPGroup,
    attention: AttentionBackend,
    progress: bool,
) -> Decoder:
    """Build a decoder and fill it: in eval mode, without gradients.

    Args:
        path: directory or hub id with the weights; ``dummy`` reads nothing from it.
        dtype: of weights and activations; checkpoints of other float types are converted.
        load_format: ``auto`` and ``safetensors`` read the checkpoint, ``dummy`` draws random weights.
        progress: show a bar while weights load.

    Raises:
        ModelError: the weights are missing, broken or do not fit the spec, or the ranks cannot divide it.
        ConfigError: an unknown load format or device.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(
            f"load format {load_format!r} is not supported; supported: {', '.join(LOAD_FORMATS)}"
        )
    check_divisible(spec, tp.size)
    device = torch.device(device)
    begin = time.monotonic()
    model = Decoder(spec, Placement(tp, dtype, device), attention, select_ops(device.type))
    if load_format == "dummy":
        fill_random(model, _DUMMY_SEED)
    else:
        load_weights(model, locate_model(path), progress=progress)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    logger.info(
        "Loaded %s: %.2f M parameters, %s, %.1f MB on %s, %.1f s%s",
        spec.architecture,
        spec.num_parameters / 1e6,
        str(dtype).removeprefix("torch."),
        num_bytes / 1e6,
        device,
        time.monotonic() - begin,
        " (random weights)" if load_format == "dummy" else "",
    )
    return model.eval()


def check_divisible(spec: ModelSpec, size: int) -> None:
    """Check that the ranks can share the model equally.

    More ranks than key/value heads are fine if they are a multiple: then ranks hold the same head.

    Raises:
        ModelError: names what cannot be divided.
    """
    sizes = {
        "num_attention_heads": spec.num_heads,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
    }
    wrong = [f"{name} {value}" for name, value in sizes.items() if value % size]
    kv_heads = spec.num_kv_heads
    if kv_heads % size and size % kv_heads:
        wrong.append(f"num_key_value_heads {kv_heads}")
    if wrong:
        raise ModelError(f"{size} tensor-parallel ranks cannot divide {', '.join(wrong)} equally")
