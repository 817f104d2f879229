"""From what a user calls an adapter's path to a local directory that holds its two files.

Weights are safetensors only: a pickle runs code when it is read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from lorikeet.errors import AdapterError
from lorikeet.lora.adapter_config import CONFIG_FILE

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_source(path: str) -> Path:
    """Directory of an adapter given as a local path or, if there is no such path, as a Hugging Face id ``owner/name``.

    Raises:
        AdapterError: nothing is there, a file is missing (it is named), or the download failed.
    """
    local = Path(path).expanduser()
    if local.exists():
        check_files(local)
        return local
    if _HUB_ID.fullmatch(path) and not Path(local.parts[0]).exists():
        downloaded = _download(path)
        check_files(downloaded)
        return downloaded
    raise AdapterError(f"adapter path {path} does not exist")


def check_files(directory: Path) -> None:
    """Check that an adapter's directory holds its configuration and its weights.

    Raises:
        AdapterError: names what is missing.
    """
    if not directory.is_dir():
        raise AdapterError(
            f"adapter path {directory} is not a directory; give the one that holds {CONFIG_FILE}"
        )
    if not (directory / CONFIG_FILE).is_file():
        raise AdapterError(f"{directory} has no {CONFIG_FILE}")
    weights_file(directory)


def weights_file(directory: Path) -> Path:
    """The adapter's safetensors file.

    Raises:
        AdapterError: it is missing; says so if there is a pickle in its place.
    """
    path = directory / WEIGHTS_FILE
    if path.is_file():
        return path
    if (directory / _PICKLE_FILE).exists():
        raise AdapterError(
            f"{directory} has its weights only as a pickle ({_PICKLE_FILE}), which is never loaded; "
            f"save them as {WEIGHTS_FILE}"
        )
    raise AdapterError(f"{directory} has no {WEIGHTS_FILE}")


def _download(repo_id: str) -> Path:
    # Imported here: a server of local adapters never needs the hub's client.
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The error of the HTTP library in use, which changes between releases of the client, and OSError (no network,
    # offline mode without a cached copy, a full disk).
    failures = (HFValidationError, *cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__))
    try:
        return Path(
            huggingface_hub.snapshot_download(repo_id, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE])
        )
    except failures as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterError(
            f"{repo_id} is no local directory and could not be downloaded from the Hugging Face hub: {reason}"
        ) from error
