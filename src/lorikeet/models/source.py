"""From what the user calls a model to a directory on this machine. No torch here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from lorikeet.errors import ModelError

# "owner/name" or "name", as the Hugging Face hub spells repositories; anything with another slash is a path.
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_TEXT_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt")
_WEIGHT_FILES = ("*.safetensors",)


def locate_model(name: str | Path, *, weights: bool = True) -> Path:
    """The local directory of a model: ``name`` itself, or a download (or cached copy) of that hub repository.

    Pickle files are never fetched.

    Args:
        weights: False fetches only config and tokenizer files.

    Raises:
        ModelError: neither a directory nor a repository that can be had; names what was tried.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(
            f"model path {path} is a file; give the directory that holds config.json and *.safetensors"
        )
    text = str(name)
    if isinstance(name, Path) or not _HUB_ID.fullmatch(text) or ".." in text:
        raise ModelError(f"model path {text!r} does not exist")
    return _download(text, _TEXT_FILES + _WEIGHT_FILES if weights else _TEXT_FILES)


def locate_tokenizer(name: str) -> Path:
    """The local directory of a tokenizer: ``name`` itself, or what a hub repository has beside its weights.

    Raises:
        ModelError: it is neither a path nor a hub id that can be had.
    """
    path = Path(name)
    return path if path.exists() else locate_model(name, weights=False)


def _download(repo_id: str, patterns: tuple[str, ...]) -> Path:
    # Imported here because a local model should not pay for it: the hub client takes longer to import than a small
    # model takes to load.
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # OSError (no network, offline mode without a cached copy, a full disk) and the error of the HTTP library in use,
    # which has changed from one release of the client to the next.
    failures = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise ModelError(f"{repo_id!r} is no directory and no valid hub id: {error}") from error
    except failures as error:
        raise ModelError(
            f"{repo_id!r} is no local directory, and it cannot be downloaded from the Hugging Face hub: {error}"
        ) from error
