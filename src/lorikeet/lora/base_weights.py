"""The base model's own embedding, to recognise the copies of it that PEFT saves with some adapters.

An adapter that targets ``embed_tokens`` or ``lm_head`` is saved with the base's weights of that module beside its A and
B (``save_embedding_layers``). A true copy changes nothing and may be left unread; anything else is added or retrained
tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lorikeet.errors import ModelError

# Parameter name in the Hugging Face model -> the base model's weight, or None if it has none of that name.
BaseWeight = Callable[[str], torch.Tensor | None]

_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
# A checkpoint of a model with tied embeddings holds the table once, under the first name.
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}


def checkpoint_weight(model_dir: str | Path) -> BaseWeight:
    """Reader of single tensors of the base model's safetensors files; nothing is kept in memory.

    The returned function raises ModelError if a file cannot be read.
    """
    directory = Path(model_dir)

    def read(name: str) -> torch.Tensor | None:
        for stored in (name, _TIED.get(name)):
            weight = _read(directory, stored) if stored else None
            if weight is not None:
                return weight
        return None

    return read


def is_copy(stored: torch.Tensor, base: torch.Tensor) -> bool:
    """True if ``stored`` is the base's weight, perhaps rounded to (or widened from) another type."""
    if stored.shape != base.shape:
        return False
    narrow = min(stored.dtype, base.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(stored.to(narrow), base.to(narrow))


def _read(directory: Path, name: str) -> torch.Tensor | None:
    try:
        index = directory / _INDEX_FILE
        if index.exists():
            file = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(name)
        else:
            file = _SINGLE_FILE
        if file is None:
            return None
        with safe_open(directory / file, framework="pt") as weights:
            return weights.get_tensor(name) if name in weights.keys() else None  # noqa: SIM118 (no mapping)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot read {name} of the base model in {directory}: {error}") from error
