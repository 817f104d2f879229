"""From what a user calls an adapter's path to a local directory that holds its two files.

Weights are safetensors only: a pickle runs code when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lorikeet.config import ServerConfig
from lorikeet.errors import AdapterError
from lorikeet.lora import hub, remote
from lorikeet.lora.adapter_config import CONFIG_FILE
from lorikeet.lora.disk_cache import DiskCache
from lorikeet.masking import mask

WEIGHTS_FILE = "adapter_model.safetensors"
# Adapters may bring their own chat template, in either of these.
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_OPTIONAL_FILES = (TEMPLATE_FILE, TOKENIZER_CONFIG_FILE)
_PICKLE_FILE = "adapter_model.bin"
_SHARD_INDEX = "adapter_model.safetensors.index.json"
_FILE_URL = re.compile(r"file:", re.IGNORECASE)
_DEFAULT_CACHE_GB = 20.0
_GB = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """Which sources may be read, and where downloads are kept.

    Attributes:
        roots: directories that must hold every local adapter; empty: any directory.
        cache_dir: where adapters from object stores and web servers are kept; None: ``~/.cache/lorikeet``.
        cache_bytes: most bytes kept there.
        hub_cache: the Hugging Face client's cache; None: its own choice (``HF_HUB_CACHE``).
        hub_endpoint: address of the hub; None: ``HF_ENDPOINT``, or the public one.
    """

    roots: tuple[Path, ...] = ()
    cache_dir: Path | None = None
    cache_bytes: int = round(_DEFAULT_CACHE_GB * _GB)
    hub_cache: Path | None = None
    hub_endpoint: str | None = None

    @classmethod
    def from_config(cls, config: ServerConfig) -> SourceOptions:
        """What the options of a resolved configuration say. The sources of requests: those given at start are
        :meth:`trusted`."""
        given, size = config.lora_disk_cache_dir, config.lora_disk_cache_gb
        return cls(
            roots=tuple(Path(root) for root in config.lora_root),
            cache_dir=None if given is None else Path(given).expanduser(),
            cache_bytes=round((_DEFAULT_CACHE_GB if size is None else size) * _GB),
        )

    def trusted(self) -> SourceOptions:
        """The same for paths that the operator has given (``--lora-paths``, ``--lora-resolver-dir``): any directory."""
        return replace(self, roots=())


_ANYTHING = SourceOptions()


def resolve_source(path: str, options: SourceOptions = _ANYTHING) -> Path:
    """Directory of an adapter; what :func:`open_source` gives, without its protection from the cache's eviction."""
    with open_source(path, options) as directory:
        return directory


@contextmanager
def open_source(path: str, options: SourceOptions = _ANYTHING) -> Generator[Path]:
    """Find an adapter, download it if need be, and keep its files in place while the context lasts.

    ``path`` is a local directory, ``s3://``, ``gs://``, ``http://`` or ``https://`` followed by a directory, or, if there
    is no such local path, a Hugging Face id ``owner/name`` or ``owner/name@revision``. Blocks on disk and network.

    Raises:
        AdapterError: nothing is there, it may not be read, a file is missing (it is named), or the download failed.
            Passwords and keys in a URL are masked.
    """
    if remote.is_url(path):
        cache = DiskCache(options.cache_dir or _default_cache(), options.cache_bytes)
        names = (CONFIG_FILE, WEIGHTS_FILE)
        with remote.open_cached(path, names, _OPTIONAL_FILES, cache) as directory:
            yield directory
        return
    yield _local_or_hub(path, options)


def _default_cache() -> Path:
    try:
        return Path.home() / ".cache" / "lorikeet"
    except RuntimeError as error:
        raise AdapterError(f"--lora-disk-cache-dir is needed: {error}") from error


def public_path(path: str) -> str:
    """``path`` as it may be shown to others: passwords and keys of a URL are masked."""
    return mask(path)


def pin_source(path: str, directory: Path) -> str:
    """``path`` such that reading it again gives the bytes that are in ``directory``, where it was resolved to: a hub id
    gets its commit, as a branch may move on. Other paths have no such form and stay."""
    identity = hub.parse_id(path)
    if identity is None or Path(path).exists():
        return path
    return str(hub.pin(identity, directory))


def _local_or_hub(path: str, options: SourceOptions) -> Path:
    if _FILE_URL.match(path):
        raise AdapterError(f"adapter path {path}: give a local directory without file:")
    local = _find_local(path, options.roots)
    if local is not None:
        check_files(local)
        return local
    identity = hub.parse_id(path)
    if identity is not None and not Path(Path(path).parts[0]).exists():
        directory = hub.download(
            identity,
            [CONFIG_FILE, WEIGHTS_FILE, *_OPTIONAL_FILES],
            cache_dir=options.hub_cache,
            endpoint=options.hub_endpoint,
        )
        check_files(directory)
        return directory
    raise AdapterError(f"adapter path {path} does not exist")


def _find_local(path: str, roots: tuple[Path, ...]) -> Path | None:
    """The directory called ``path``, None if there is none.

    Raises:
        AdapterError: it is outside all ``roots``. Nothing else is said about such a path, not even whether it exists.
    """
    try:
        local = Path(path).expanduser()
        real = local.resolve()
        exists = local.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise AdapterError(f"adapter path {path!r} cannot be read: {_reason(error)}") from None
    if not roots:
        return local if exists else None
    if not exists and hub.parse_id(path) is not None:
        return None
    if not _is_below(real, roots):
        raise AdapterError(
            f"adapter path {path} is outside of --lora-root ({', '.join(map(str, roots))})"
        )
    if not exists:
        return None
    for name in (CONFIG_FILE, WEIGHTS_FILE, *_OPTIONAL_FILES):
        if not _is_below((real / name).resolve(), roots):
            raise AdapterError(f"{local / name} is a link that leads out of --lora-root")
    # The real path: a link that is turned elsewhere from now on changes nothing.
    return real


def _is_below(path: Path, roots: tuple[Path, ...]) -> bool:
    return any(path.is_relative_to(root.resolve()) for root in roots)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip() or type(error).__name__).splitlines()[0]


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
    if (directory / _SHARD_INDEX).exists():
        raise AdapterError(
            f"{directory} has its weights in shards ({_SHARD_INDEX}), which PEFT does not write for adapters; "
            f"save them as one {WEIGHTS_FILE}"
        )
    if (directory / _PICKLE_FILE).exists():
        raise AdapterError(
            f"{directory} has its weights only as a pickle ({_PICKLE_FILE}), which is never loaded; "
            f"save them as {WEIGHTS_FILE}"
        )
    raise AdapterError(f"{directory} has no {WEIGHTS_FILE}")
