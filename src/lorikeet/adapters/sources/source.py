"""Resolves the path of an adapter, as a user gives it, to a local directory that holds its two files.

Weights are safetensors only: a pickle runs code when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lorikeet.adapters.files import confined, is_below
from lorikeet.adapters.sources import hub, remote
from lorikeet.adapters.sources.disk_cache import DiskCache
from lorikeet.adapters.sources.transfer import Transfer
from lorikeet.adapters.spec import CONFIG_FILE
from lorikeet.config import LORA_SOURCES, LoRASettings
from lorikeet.errors import AdapterError
from lorikeet.masking import mask_path

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
        kinds: which of ``LORA_SOURCES`` may be read.
        roots: directories that must hold every local adapter; empty: any directory.
        allow_private_hosts: whether a web server may have an address that is not public.
        cache_dir: where adapters from object stores and web servers are kept; None: ``~/.cache/lorikeet``.
        cache_bytes: most bytes kept there, and the largest adapter of the hub.
        hub_cache: the Hugging Face client's cache; None: its own choice (``HF_HUB_CACHE``).
        hub_endpoint: address of the hub; None: ``HF_ENDPOINT``, or the public one.
    """

    kinds: tuple[str, ...] = LORA_SOURCES
    roots: tuple[Path, ...] = ()
    allow_private_hosts: bool = False
    cache_dir: Path | None = None
    cache_bytes: int = round(_DEFAULT_CACHE_GB * _GB)
    hub_cache: Path | None = None
    hub_endpoint: str | None = None

    @classmethod
    def from_config(cls, config: LoRASettings) -> SourceOptions:
        """The sources of requests; those given at start are :meth:`trusted`."""
        given, size = config.lora_disk_cache_dir, config.lora_disk_cache_gb
        return cls(
            kinds=config.lora_sources,
            roots=tuple(Path(root) for root in config.lora_root),
            allow_private_hosts=config.lora_allow_private_hosts,
            cache_dir=None if given is None else Path(given).expanduser(),
            cache_bytes=round((_DEFAULT_CACHE_GB if size is None else size) * _GB),
        )

    def trusted(self) -> SourceOptions:
        """These options for paths that the operator has given (``--lora-paths``): any source, any directory."""
        return replace(self, kinds=LORA_SOURCES, roots=(), allow_private_hosts=True)

    def within(self, directory: Path) -> SourceOptions:
        """These options for what is found in a directory that the operator has given (``--lora-resolver-dir``): local files,
        that lie in it or where requests may load from."""
        return replace(self, kinds=("local",), roots=(directory, *self.roots))


_ANYTHING = SourceOptions().trusted()


def resolve_source(path: str, options: SourceOptions = _ANYTHING) -> Path:
    """Directory of an adapter; what :func:`open_source` gives, without its protection from the cache's eviction."""
    with open_source(path, options) as directory:
        return directory


@contextmanager
def open_source(
    path: str, options: SourceOptions = _ANYTHING, transfer: Transfer | None = None
) -> Generator[Path]:
    """Find an adapter, download it if need be, and keep its files in place while the context lasts.

    ``path`` is a local directory, ``s3://``, ``gs://``, ``http://`` or ``https://`` followed by a directory, or, if there
    is no such local path, a Hugging Face id ``owner/name`` or ``owner/name@revision``. Blocks on disk and network.

    Args:
        transfer: how far it may go for it and how long it may take; None: as far and as long as need be.

    Raises:
        NeedsNetworkError: ``transfer`` does not allow to ask whoever has it.
        AdapterError: nothing is there, it may not be read, a file is missing (it is named), or the download failed.
            Passwords and keys in a URL are masked.
    """
    transfer = transfer or Transfer()
    if remote.is_url(path):
        _check_kind(path, remote.scheme_of(path), options)
        cache = DiskCache(options.cache_dir or _default_cache(), options.cache_bytes)
        with remote.open_cached(
            path,
            (CONFIG_FILE, WEIGHTS_FILE),
            _OPTIONAL_FILES,
            cache,
            transfer=transfer,
            allow_private=options.allow_private_hosts,
        ) as directory:
            yield directory
        return
    if _FILE_URL.match(path):
        raise AdapterError(
            f"adapter path {public_path(path)}: give a local directory without file:"
        )
    if options.roots:
        directory = _find_below(path, options)
        if directory is not None:
            # What is opened is looked at again: a link may be turned elsewhere in between.
            with confined(options.roots):
                yield directory
            return
    elif "local" in options.kinds and (directory := _find_local(path)) is not None:
        yield directory
        return
    yield _from_hub(path, options, transfer)


def _check_kind(path: str, kind: str, options: SourceOptions) -> None:
    if kind not in options.kinds:
        raise AdapterError(
            f"adapter path {public_path(path)} is of the kind {kind!r}; allowed by --lora-sources: "
            f"{', '.join(options.kinds) or 'none'}"
        )


def _default_cache() -> Path:
    try:
        return Path.home() / ".cache" / "lorikeet"
    except RuntimeError as error:
        raise AdapterError(f"--lora-disk-cache-dir is needed: {error}") from error


def public_path(path: str) -> str:
    """``path`` as it may be shown to others: passwords and keys of a URL are masked, even if it is misspelt, and nothing
    in it begins a new line."""
    return mask_path(path)


def pin_source(path: str, directory: Path) -> str:
    """``path`` changed so that reading it again gives the bytes in ``directory``, to which it was resolved: a hub id gets its
    commit, as a branch may move on. Other paths have no such form and stay."""
    identity = hub.parse_id(path)
    if identity is None or Path(path).exists():
        return path
    return str(hub.pin(identity, directory))


def _from_hub(path: str, options: SourceOptions, transfer: Transfer) -> Path:
    """Directory of an adapter of the hub.

    Raises:
        AdapterError: ``path`` is no hub id, or what is there cannot be had.
    """
    identity = hub.parse_id(path)
    # With roots, no answer may tell what lies on the disk.
    may_look = "local" in options.kinds and not options.roots
    if identity is None or (may_look and Path(Path(path).parts[0]).exists()):
        raise _nothing_there(path, options)
    _check_kind(path, "hub", options)
    directory = hub.download(
        identity,
        [CONFIG_FILE, WEIGHTS_FILE, *_OPTIONAL_FILES],
        hub.HubOptions(
            cache_dir=options.hub_cache,
            endpoint=options.hub_endpoint,
            most_bytes=options.cache_bytes,
        ),
        transfer,
    )
    check_files(directory)
    return directory


def _nothing_there(path: str, options: SourceOptions) -> AdapterError:
    """The error for a path where there is nothing; with roots it does not say why."""
    if options.roots:
        roots = ", ".join(map(str, options.roots))
        return AdapterError(
            f"adapter path {public_path(path)} is not there or outside of --lora-root ({roots})"
        )
    _check_kind(path, "local", options)
    return AdapterError(f"adapter path {public_path(path)} does not exist")


def _find_local(path: str) -> Path | None:
    """The directory called ``path``, None if there is none."""
    try:
        local = Path(path).expanduser()
        local.resolve()  # a loop of links
        if not local.exists():
            return None
    except (OSError, RuntimeError, ValueError) as error:
        raise AdapterError(
            f"adapter path {public_path(path)} cannot be read: {_reason(error)}"
        ) from None
    check_files(local)
    return local


def _find_below(path: str, options: SourceOptions) -> Path | None:
    """The directory called ``path`` below one of the roots, None if it may be a hub id.

    Raises:
        AdapterError: it is neither. Nothing else is said about such a path, not even whether it exists.
    """
    roots = options.roots
    try:
        local = Path(path).expanduser()
        real = local.resolve()
        # Existence is asked last: for a path outside, the answer must not tell whether it exists or may be read.
        is_there = is_below(real, roots) and "local" in options.kinds and real.exists()
    except (OSError, RuntimeError, ValueError):
        is_there = False
        local = real = Path()
    if not is_there:
        if hub.parse_id(path) is not None:
            return None
        raise _nothing_there(path, options)
    for name in (CONFIG_FILE, WEIGHTS_FILE, *_OPTIONAL_FILES):
        if not is_below((real / name).resolve(), roots):
            raise AdapterError(
                f"{local / name} is a link that leads out of --lora-root or --lora-resolver-dir"
            )
    check_files(real)
    # The real path: a link that is turned elsewhere from now on changes nothing.
    return real


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip() or type(error).__name__).splitlines()[0]


def check_files(directory: Path) -> None:
    """Check that an adapter's directory holds its configuration and its weights.

    Raises:
        AdapterError: names what is missing.
    """
    try:
        if not directory.is_dir():
            raise AdapterError(
                f"adapter path {directory} is not a directory; give the one that holds {CONFIG_FILE}"
            )
        if not (directory / CONFIG_FILE).is_file():
            raise AdapterError(f"{directory} has no {CONFIG_FILE}")
        weights_file(directory)
    except OSError as error:  # no permission to look into it
        raise AdapterError(f"adapter path {directory} cannot be read: {_reason(error)}") from None


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
