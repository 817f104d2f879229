"""Adapters from the Hugging Face hub, through its own client: cache, resume and tokens (``HF_TOKEN``) are the client's."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lorikeet import envs
from lorikeet.adapters.files import MAX_TEXT_BYTES
from lorikeet.adapters.sources.transfer import NeedsNetworkError, Reach, Transfer
from lorikeet.errors import AdapterError
from lorikeet.masking import mask

_PART = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"({_PART}/{_PART})(?:@([\w][\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_REASON = 300
#: The hub's name where hosts are told apart.
HUB = "hub"


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository of the hub, and the branch, tag or commit that is wanted (None: its main branch)."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse_id(text: str) -> HubId | None:
    """``owner/name`` or ``owner/name@revision``; None if ``text`` has another form."""
    match = _ID.fullmatch(text)
    # A revision is a path below the client's cache.
    if match is None or (match[2] is not None and ".." in match[2]):
        return None
    return HubId(match[1], match[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class HubOptions:
    """How the hub is asked.

    Attributes:
        cache_dir: the client's cache; None: its own choice (``HF_HUB_CACHE``).
        endpoint: address of the hub; None: ``HF_ENDPOINT``, or the public one.
        most_bytes: largest size of an adapter's files together.
    """

    cache_dir: Path | None = None
    endpoint: str | None = None
    most_bytes: int


def download(identity: HubId, patterns: list[str], options: HubOptions, transfer: Transfer) -> Path:
    """Directory of the repository's snapshot with the files that match ``patterns``, from the client's cache or the hub.

    Within ``Reach.CACHE`` the hub is not asked.

    Raises:
        NeedsNetworkError: it is not in the client's cache, and the hub may not be asked.
        AdapterError: it is not there, it is too large, access is refused, the transfer failed, or its time is over.
    """
    # Imported here: a server of local adapters never needs the hub's client.
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    if transfer.reach < Reach.CACHE:
        raise NeedsNetworkError(f"{identity} has to be looked for on the hub", HUB)
    # The base error of the HTTP library in use, which changes between releases of the client; OSError is no network, no
    # cached copy in offline mode, a full disk; ValueError a name or a reply that the client does not accept.
    failures = cast("tuple[type[Exception], ...]", (*HfHubHTTPError.__bases__, OSError, ValueError))
    in_cache_only = transfer.reach < Reach.NETWORK
    client = cast("Any", huggingface_hub)  # types parts of its arguments only

    def run() -> Path:
        if not in_cache_only:
            _check_size(identity, patterns, options, failures)
        transfer.check()
        return Path(
            client.snapshot_download(
                identity.repo,
                revision=identity.revision,
                allow_patterns=patterns,
                cache_dir=options.cache_dir,
                local_files_only=in_cache_only,
                # The client reads the variable only once, when it is imported.
                endpoint=options.endpoint or envs.HF_ENDPOINT.get(),
                tqdm_class=_stopper(transfer),
            )
        )

    try:
        return transfer.run(run)
    except failures as error:
        if in_cache_only:
            raise NeedsNetworkError(f"{identity} has to be downloaded", HUB) from error
        raise AdapterError(
            f"{identity} is no local directory and could not be downloaded from the Hugging Face hub: "
            f"{_reason(error, identity)}"
        ) from error


def _check_size(
    identity: HubId,
    patterns: list[str],
    options: HubOptions,
    failures: tuple[type[Exception], ...],
) -> None:
    """Refuse files that are larger than an adapter's may be, before the first is transferred. Without an answer from the
    hub nothing is said: the client then serves what it has.

    Raises:
        AdapterError: they are too large.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(endpoint=options.endpoint or envs.HF_ENDPOINT.get())
    try:
        revision = identity.revision or huggingface_hub.constants.DEFAULT_REVISION
        info = api.model_info(identity.repo, revision=revision, files_metadata=True)
    except failures:
        return
    sizes = {
        file.rfilename: file.size or 0 for file in info.siblings or () if file.rfilename in patterns
    }
    if (total := sum(sizes.values())) > options.most_bytes:
        raise AdapterError(
            f"{identity}: its files have {total} bytes, more than --lora-disk-cache-gb allows ({options.most_bytes})"
        )
    for name, size in sizes.items():
        if size > MAX_TEXT_BYTES and not name.endswith(".safetensors"):
            raise AdapterError(
                f"{identity}: {name} has {size} bytes; allowed: at most {MAX_TEXT_BYTES}"
            )


def _stopper(transfer: Transfer) -> type[Any]:
    """A progress bar that shows nothing and stops the download at its end."""
    from tqdm import tqdm

    class Stopper(tqdm):  # pyright: ignore[reportMissingTypeArgument]  # generic in its stubs alone
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **kwargs | {"disable": True})  # pyright: ignore[reportUnknownMemberType]

        def update(self, n: float | None = 1) -> bool | None:
            transfer.check()
            return super().update(n)

    return Stopper


def _reason(error: Exception, identity: HubId) -> str:
    """What went wrong, and what helps against it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):  # also a RepositoryNotFoundError
        return "the repository is gated; accept its conditions there and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or it is private and HF_TOKEN does not open it"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {identity.revision or 'main'}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    return mask(" ".join(str(error).split())[:_MAX_REASON]) or type(error).__name__


def pin(identity: HubId, snapshot: Path) -> HubId:
    """The id with the commit that ``snapshot``, a directory that :func:`download` gave, was made from."""
    return HubId(identity.repo, snapshot.name) if _COMMIT.fullmatch(snapshot.name) else identity
