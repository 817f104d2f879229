"""Adapters from object stores and web servers, through fsspec (the extra ``remote``).

A file is read in chunks, so a cut connection costs one chunk: the download goes on where it stopped, in this call or in
the next one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from lorikeet.errors import AdapterError
from lorikeet.lora.disk_cache import (
    DiskCache,
    DiskFullError,
    Entry,
    FileInfo,
    errors_of_disk,
    touch,
)
from lorikeet.masking import mask

logger = logging.getLogger(__name__)

_URL = re.compile(r"(s3|gs|https?)://", re.IGNORECASE)
_URL_CHARACTERS = "%/:?#[]@!$&'()*+,;=~"
_CHUNK_BYTES = 8 * 2**20
# Tries without one new byte; each waits twice as long as the one before.
_MAX_TRIES = 5
_FIRST_WAIT_S = 0.25
_SOCKET_TIMEOUT_S = 30.0
# Far above any configuration or template, far below what could fill a memory.
_MAX_TEXT_BYTES = 4 * 2**20
_MAX_HEADER_BYTES = 100 * 10**6
# The length of the header, and the brace that it begins with.
_HEADER_START = 9
_MAX_REASON = 300
_NOT_FOUND = (404, 410)
# Refusals that pass: timeout, too early, too many requests.
_ASK_AGAIN = (408, 425, 429)
# Names under which the stores tell what changes with the content.
_VALIDATORS = (
    *("ETag", "etag", "md5Hash", "crc32c", "Content-MD5", "generation"),
    *("updated", "Last-Modified", "LastModified", "mtime", "created"),
)
# What the stores' libraries raise beside OSError. Only those that are in use can be raised.
_LIBRARY_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
)


def is_url(path: str) -> bool:
    """Whether ``path`` names something that this module fetches."""
    return _URL.match(path) is not None


@contextmanager
def open_cached(
    url: str,
    names: tuple[str, ...],
    optional: tuple[str, ...],
    cache: DiskCache,
) -> Generator[Path]:
    """A local directory with the files ``names`` (and those of ``optional`` that exist) of the directory ``url``.

    What the cache holds is served if the source still has the same, or cannot be reached. The directory stays while the
    context lasts.

    Raises:
        AdapterError: the reason, with the URL's secrets masked.
    """
    key = hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()[:32]
    while True:
        with cache.hold(key) as (entry, lock):
            with _masked(url):
                _refresh(entry, url, names, optional)
            lock.share()
            # Whoever held the lock while it changed hands may have evicted the entry.
            if lock.is_current() and entry.files() is not None:
                touch(entry.path)
                with _named(entry.path, url):
                    yield entry.path
                return


@contextmanager
def _masked(url: str) -> Generator[None]:
    try:
        yield
    except AdapterError as error:
        # Without the cause: its text holds the URL as it was given.
        raise AdapterError(f"{mask(url)}: {mask(str(error))}") from None


@contextmanager
def _named(directory: Path, url: str) -> Generator[None]:
    """What is wrong with the files is said of the URL: the name of a cache entry means nothing to anybody."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(str(error).replace(str(directory), mask(url).rstrip("/"))) from error


def _refresh(entry: Entry, url: str, names: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Make the entry what the source has now."""
    present = entry.files()
    fs = _file_system(url)
    try:
        files = _list(fs, url, names, optional)
    except _UnreachableError as error:
        if present is None:
            raise
        logger.warning("%s is served from the disk cache: %s", mask(url), mask(str(error)))
        return
    if files == present and all(file.validator is not None for file in files.values()):
        return
    entry.start(mask(url), files)
    for name, file in files.items():
        try:
            _fetch(fs, _join(url, name), entry.partial / name, file.size)
        except (_UnusableError, DiskFullError):
            entry.discard()
            raise
    if _list(fs, url, names, optional) != files:
        entry.discard()
        raise AdapterError("its files changed while they were downloaded; try again")
    with errors_of_disk(entry.path):
        entry.publish()


class _UnreachableError(AdapterError):
    """The source did not answer, which says nothing about the adapter."""


class _RefusedError(AdapterError):
    """The source does not give it to us."""


class _UnusableError(AdapterError):
    """What was downloaded so far is of no use."""


def _file_system(url: str) -> Any:
    """The fsspec file system of the URL's scheme.

    Raises:
        AdapterError: its library is not installed.
    """
    scheme = url.partition("://")[0].lower()
    try:
        import fsspec

        if scheme.startswith("http"):
            import aiohttp

            limits = aiohttp.ClientTimeout(
                total=None, sock_connect=_SOCKET_TIMEOUT_S, sock_read=_SOCKET_TIMEOUT_S
            )
            # encoded: a signature in the query must reach the server as it was given.
            kwargs = {"client_kwargs": {"timeout": limits, "trust_env": True}, "encoded": True}
            return fsspec.filesystem(scheme, **kwargs)
        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        raise AdapterError(
            f"{scheme}:// needs a library that is not installed ({error}); pip install 'lorikeet[remote]'"
        ) from None


def _list(
    fs: Any, url: str, names: tuple[str, ...], optional: tuple[str, ...]
) -> dict[str, FileInfo]:
    """Size and validator of each file now.

    Raises:
        AdapterError: a file of ``names`` is missing, or one is larger than such a file can be.
    """
    fs.invalidate_cache()
    files: dict[str, FileInfo] = {}
    for name in (*names, *optional):
        try:
            info = _info(fs, _join(url, name), name)
        except _RefusedError:
            # A store that may not be listed says "forbidden" of what does not exist.
            if name in names:
                raise
            continue
        if info is None and name in names:
            raise AdapterError(f"there is no {name}")
        if info is not None:
            files[name] = _file_info(name, info)
    return files


def _file_info(name: str, info: Mapping[str, Any]) -> FileInfo:
    size = info.get("size")
    if not isinstance(size, int) or info.get("type", "file") != "file":
        raise AdapterError(f"{name} is no file whose size is known")
    if size > _MAX_TEXT_BYTES and not name.endswith(".safetensors"):
        raise AdapterError(f"{name} has {size} bytes; allowed: at most {_MAX_TEXT_BYTES}")
    found = {key: str(info[key]) for key in _VALIDATORS if info.get(key)}
    return FileInfo(size, json.dumps(found) if found else None)


def _info(fs: Any, url: str, name: str) -> Mapping[str, Any] | None:
    """What the source tells of a file, None if there is no such file; asked again while the source is silent.

    Raises:
        _UnreachableError: it stays silent.
        AdapterError: it refuses.
    """
    error: Exception | None = None
    for attempt in range(_MAX_TRIES):
        if attempt:
            time.sleep(_FIRST_WAIT_S * 2 ** (attempt - 1))
        try:
            return fs.info(url)
        except _failures() as raised:
            error = _cause(raised)
        if isinstance(error, FileNotFoundError):
            return None
        _refuse(error, name)
    raise _UnreachableError(f"{name} cannot be read: {_reason(error)}")


def _fetch(fs: Any, url: str, target: Path, size: int) -> None:
    """Append to ``target`` what it lacks of the file.

    Raises:
        _UnreachableError: the connection was cut again and again; what has arrived stays for the next call.
        AdapterError: refused, not an adapter's file, or the disk is full.
    """
    name = target.name
    error: Exception | None = None
    tries, most, in_ranges = 0, -1, True
    _append(target, b"", size)  # an empty file is a file too
    while (done := target.stat().st_size) < size:
        tries = 0 if done > most else tries + 1
        most = max(most, done)
        if tries == _MAX_TRIES:
            raise _UnreachableError(f"{name} ends after {most} of {size} bytes: {_reason(error)}")
        if tries:
            time.sleep(_FIRST_WAIT_S * 2 ** (tries - 1))
        try:
            if not in_ranges and done:
                done = 0
                with errors_of_disk(target.parent):
                    target.write_bytes(b"")
            for chunk in _read_from(fs, url, done, size, in_ranges=in_ranges):
                _append(target, chunk, size)
        except _failures() as raised:
            error = _cause(raised)
            _refuse(error, name)
        except _WholeFileError as raised:
            error, in_ranges = raised, False
    if done > size:
        raise _UnusableError(f"{name} has more than the {size} bytes that were announced")


class _WholeFileError(Exception):
    """The server cannot send the rest of a file, only all of it."""


def _read_from(fs: Any, url: str, start: int, size: int, *, in_ranges: bool) -> Iterator[bytes]:
    """The file's bytes from ``start`` on.

    Raises:
        _WholeFileError: the server ignores ranges.
    """
    how = {"block_size": _CHUNK_BYTES, "cache_type": "none"} if in_ranges else {"block_size": 0}
    with fs.open(url, "rb", **how) as file:
        try:
            file.seek(start)
            while start < size:
                chunk = cast("bytes", file.read(min(_CHUNK_BYTES, size - start)))
                if not chunk:
                    raise ConnectionError("the connection was closed")
                yield chunk
                start += len(chunk)
        except (
            ValueError
        ):  # fsspec's word for a seek in a stream, and for all of a file in place of a range
            raise _WholeFileError("the server sends only whole files") from None


def _append(target: Path, chunk: bytes, size: int) -> None:
    with errors_of_disk(target.parent), target.open("ab") as file:
        at_start = file.tell() == 0
        file.write(chunk)
    if at_start and target.suffix == ".safetensors":
        _check_header(target.name, chunk, size)


def _check_header(name: str, chunk: bytes, size: int) -> None:
    """Refuse a file of several GB that is no safetensors from its first bytes, before the rest is transferred.

    Raises:
        _UnusableError: the length of the header, which a safetensors file begins with, cannot be one.
    """
    if len(chunk) < _HEADER_START:
        return
    length = int.from_bytes(chunk[:8], "little")
    if length > min(_MAX_HEADER_BYTES, size - 8) or chunk[8:_HEADER_START] != b"{":
        raise _UnusableError(f"{name} is not a safetensors file")


def _join(url: str, name: str) -> str:
    """The URL of a file in the directory ``url``; a query (a signature, a token) stays at the end."""
    if not url.lower().startswith("http"):
        return f"{url.rstrip('/')}/{name}"
    base, question_mark, query = url.partition("#")[0].partition("?")
    # What is not allowed in a URL is encoded; what is, encoded or not, is sent as it was given.
    return quote(f"{base.rstrip('/')}/{name}{question_mark}{query}", safe=_URL_CHARACTERS)


def _failures() -> tuple[type[Exception], ...]:
    """What the libraries in use raise when a source does not answer or refuses."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _LIBRARY_ERRORS)
    return (OSError, *(error for error in found if isinstance(error, type)))


def _cause(error: Exception) -> Exception:
    """fsspec calls everything that goes wrong with an HTTP request a file that is not found; what it was is the cause."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, _failures()):
        return error
    status = getattr(cause, "status", None)
    is_about_http = isinstance(status, int) or not type(cause).__module__.startswith("botocore")
    return cause if is_about_http and status not in _NOT_FOUND else error


def _refuse(error: Exception, name: str) -> None:
    """Raise if asking again cannot help.

    Raises:
        AdapterError: the file is gone, or access is refused.
    """
    if isinstance(error, FileNotFoundError):
        raise AdapterError(f"there is no {name}") from None
    status = getattr(error, "status", None) or getattr(error, "code", None)
    is_client_error = isinstance(status, int) and 400 <= status < 500
    if isinstance(error, PermissionError) or (is_client_error and status not in _ASK_AGAIN):
        raise _RefusedError(f"{name}: {_reason(error)}") from None


def _reason(error: Exception | None) -> str:
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    text = f"{status} {message}" if status and message else str(error)
    return " ".join(text.split())[:_MAX_REASON] or type(error).__name__
