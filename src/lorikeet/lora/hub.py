"""Adapters from the Hugging Face hub, through its own client: cache, resume and tokens (``HF_TOKEN``) are the client's."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from lorikeet import envs
from lorikeet.errors import AdapterError
from lorikeet.masking import mask

_PART = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"({_PART}/{_PART})(?:@([\w][\w./-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_REASON = 300


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


def download(
    identity: HubId, patterns: list[str], *, cache_dir: Path | None, endpoint: str | None
) -> Path:
    """Directory of the repository's snapshot with the files that match ``patterns``, from the client's cache or the hub.

    Raises:
        AdapterError: it is not there, access is refused, or the transfer failed.
    """
    # Imported here: a server of local adapters never needs the hub's client.
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    # The base error of the HTTP library in use, which changes between releases of the client; OSError is no network, no
    # cached copy in offline mode, a full disk; ValueError a name or a reply that the client does not accept.
    failures = cast("tuple[type[Exception], ...]", (*HfHubHTTPError.__bases__, OSError, ValueError))
    try:
        return Path(
            huggingface_hub.snapshot_download(
                identity.repo,
                revision=identity.revision,
                allow_patterns=patterns,
                cache_dir=cache_dir,
                # The client reads the variable only once, when it is imported.
                endpoint=endpoint or envs.HF_ENDPOINT.get(),
            )
        )
    except failures as error:
        raise AdapterError(
            f"{identity} is no local directory and could not be downloaded from the Hugging Face hub: "
            f"{_reason(error, identity)}"
        ) from error


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
