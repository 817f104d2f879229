"""Where the tokenizer of a configuration lies on this machine."""

from __future__ import annotations

from pathlib import Path

from lorikeet.config import ServerConfig
from lorikeet.models.source import locate_model


def tokenizer_dir(config: ServerConfig) -> Path:
    """Local directory of ``--tokenizer-path`` (the model's if not given); a hub id is downloaded without weights.

    Raises:
        ModelError: it is neither a path nor a hub id that can be had.
    """
    name = config.tokenizer_path or config.model_path
    path = Path(name)
    return path if path.exists() else locate_model(name, weights=False)
