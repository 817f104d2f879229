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
from collections.abc import Coroutine, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote, urlsplit

from lorikeet.adapters.files import MAX_TEXT_BYTES
from lorikeet.adapters.sources import addresses
from lorikeet.adapters.sources.disk_cache import (
    CacheEntry,
    DiskCache,
    DiskFullError,
    FileInfo,
    errors_of_disk,
    touch,
)
from lorikeet.adapters.sources.transfer import NeedsNetworkError, Reach, Transfer
from lorikeet.adapters.tensor_header import START_BYTES, check_start
from lorikeet.errors import AdapterError
from lorikeet.masking import mask

logger = logging.getLogger(__name__)

T = TypeVar("T")

_URL = re.compile(r"(s3|gs|https?)://", re.IGNORECASE)
_URL_CHARACTERS = "%/:?#[]@!$&'()*+,;=~"
_CHUNK_BYTES = 4 * 2**20
# Tries without one new byte; each waits twice as long as the one before.
_MAX_TRIES = 5
_FIRST_WAIT_S = 0.25
_SOCKET_TIMEOUT_S = 30.0
# Seconds between two looks at another's download of the same adapter, while waiting for it.
_PAUSE_S = 0.05
_MAX_REASON = 300
_NOT_FOUND = (404, 410)
# Status codes worth another try: timeout, too early, too many requests.
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


def scheme_of(url: str) -> str:
    return url.partition(":")[0].lower()


def host_of(url: str) -> str:
    """The host or bucket of ``url``, only for telling sources apart."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # brackets without an address
        return url.partition("://")[2].partition("/")[0]


@contextmanager
def open_cached(
    url: str,
    names: tuple[str, ...],
    optional: tuple[str, ...],
    cache: DiskCache,
    *,
    transfer: Transfer | None = None,
    allow_private: bool = False,
) -> Generator[Path]:
    """A local directory with the files ``names`` (and those of ``optional`` that exist) of the directory ``url``.

    What the cache holds is served if the source still has the same, or cannot be reached. The directory stays while the
    context lasts.

    Args:
        transfer: how far to go and for how long; within ``Reach.CACHE`` the copy is served without asking the source.
        allow_private: whether a web server may have an address that is not public.

    Raises:
        NeedsNetworkError: there is no copy, and the source may not be asked.
        AdapterError: the reason, with the URL's secrets masked.
    """
    key = hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()[:32]
    transfer = transfer or Transfer()
    if transfer.reach < Reach.NETWORK:
        with cache.read(key) as directory:
            if directory is None or transfer.reach < Reach.CACHE:
                raise NeedsNetworkError(f"{mask(url)} has to be downloaded", host_of(url))
            touch(directory)
            with _named(directory, url):
                yield directory
        return
    while True:
        with cache.hold(key, lambda: transfer.sleep(_PAUSE_S)) as (entry, lock):
            with _masked(url), _opened(url, transfer, allow_private=allow_private) as source:
                _refresh(entry, source, names, optional)
            lock.share()
            # Whoever held the lock while it changed hands may have evicted the entry.
            if not lock.is_current() or entry.files() is None:
                continue
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
    """Let errors about files name the URL in place of the cache entry, whose name means nothing to a user."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(str(error).replace(str(directory), mask(url).rstrip("/"))) from error


class _UnreachableError(AdapterError):
    """The source did not answer, which says nothing about the adapter."""


class _RefusedError(AdapterError):
    """The source refused access."""


class _UnusableError(AdapterError):
    """What was downloaded so far has to be dropped."""


class _WholeFileError(Exception):
    """The server cannot send the rest of a file, only all of it."""


class _Source:
    """A directory at its source.

    Args:
        fs: the fsspec file system of the URL's scheme.
        transfer: ends whatever is waited for here.
    """

    def __init__(self, fs: Any, url: str, transfer: Transfer) -> None:
        self._fs = fs
        self.url = url
        self._transfer = transfer

    def list(self, names: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, FileInfo]:
        """Size and validator of each file now.

        Raises:
            AdapterError: a file of ``names`` is missing, or one is larger than such a file can be.
        """
        self._fs.invalidate_cache()
        files: dict[str, FileInfo] = {}
        for name in (*names, *optional):
            try:
                info = self._info(name)
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

    def fetch(self, target: Path, size: int) -> None:
        """Append to ``target`` what it lacks of the file of the same name.

        Raises:
            _UnreachableError: the connection was cut again and again; what has arrived stays for the next call.
            AdapterError: refused, not an adapter's file, the time is over, or the disk is full.
        """
        name = target.name
        error: Exception | None = None
        tries, most, in_ranges = 0, -1, True
        _append(target, b"", size)  # an empty file is a file too
        while (done := target.stat().st_size) < size:
            tries = 0 if done > most else tries + 1
            most = max(most, done)
            if tries == _MAX_TRIES:
                reason = _reason(error)
                raise _UnreachableError(f"{name} ends after {most} of {size} bytes: {reason}")
            if tries:
                self._transfer.sleep(_FIRST_WAIT_S * 2 ** (tries - 1))
            try:
                if not in_ranges and done:
                    done = 0
                    with errors_of_disk(target.parent):
                        target.write_bytes(b"")
                for chunk in self._read_from(name, done, size, in_ranges=in_ranges):
                    _append(target, chunk, size)
            except _failures() as raised:
                error = _cause(raised)
                _refuse(error, name)
            except _WholeFileError as raised:
                error, in_ranges = raised, False
        if done > size:
            raise _UnusableError(f"{name} has more than the {size} bytes that were announced")

    def _info(self, name: str) -> Mapping[str, Any] | None:
        """What the source says of a file, None if there is no such file; asked again while the source is silent.

        Raises:
            _UnreachableError: it stays silent.
            AdapterError: it refuses, or the time is over.
        """
        url = _join(self.url, name)
        error: Exception | None = None
        for attempt in range(_MAX_TRIES):
            if attempt:
                self._transfer.sleep(_FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                if self._fs.async_impl:
                    return self._wait(self._fs._info(url))
                return self._fs.info(url)
            except _failures() as raised:
                error = _cause(raised)
            if isinstance(error, FileNotFoundError):
                return None
            _refuse(error, name)
        raise _UnreachableError(f"{name} cannot be read: {_reason(error)}")

    def _read_from(self, name: str, start: int, size: int, *, in_ranges: bool) -> Iterator[bytes]:
        """The file's bytes from ``start`` on.

        Raises:
            _WholeFileError: the server ignores ranges.
        """
        url = _join(self.url, name)
        if not in_ranges:
            yield from self._read_whole(url, size)
            return
        while start < size:
            end = min(start + _CHUNK_BYTES, size)
            if scheme_of(url).startswith("http"):
                chunk = self._wait(_http_range(self._fs, url, start, end))
            elif self._fs.async_impl:
                chunk = self._wait(self._fs._cat_file(url, start=start, end=end))
            else:
                chunk = self._fs.cat_file(url, start=start, end=end)
            if not chunk:
                raise ConnectionError("the connection was closed")
            yield chunk
            start += len(chunk)

    def _read_whole(self, url: str, size: int) -> Iterator[bytes]:
        """All bytes of a file of a web server, and one more if there is one."""
        response = self._wait(_http_get(self._fs, url, {}))
        try:
            done = 0
            while done <= size and (chunk := self._wait(response.content.read(_CHUNK_BYTES))):
                yield chunk
                done += len(chunk)
        finally:
            self._fs.loop.call_soon_threadsafe(response.close)
        if done < size:
            raise ConnectionError("the connection was closed")

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._transfer.wait(self._fs.loop, coroutine)


async def _http_get(fs: Any, url: str, headers: Mapping[str, str]) -> Any:
    session = await fs.set_session()
    response = await session.get(fs.encode_url(url), headers=headers)
    if response.status >= 400:
        response.release()
        response.raise_for_status()
    return response


async def _http_range(fs: Any, url: str, start: int, end: int) -> bytes:
    """Bytes ``start`` to ``end`` of a file, never more, whatever the server sends.

    Raises:
        _WholeFileError: it sends the file from its beginning.
    """
    response = await _http_get(fs, url, {"Range": f"bytes={start}-{end - 1}"})
    async with response:
        if response.status != 206 and start:
            raise _WholeFileError("the server sends only whole files")
        data = bytearray()
        while len(data) < end - start:
            part = await response.content.read(end - start - len(data))
            if not part:
                raise ConnectionError("the connection was closed")
            data += part
        return bytes(data)


@contextmanager
def _opened(url: str, transfer: Transfer, *, allow_private: bool) -> Generator[_Source]:
    """The directory ``url`` at its source.

    Raises:
        AdapterError: the library of its scheme is not installed.
    """
    scheme = scheme_of(url)
    try:
        import fsspec  # pyright: ignore[reportMissingTypeStubs]

        if scheme.startswith("http"):
            # A session of its own: at the end its connections are closed, whatever they wait for.
            kwargs = _http_options(allow_private=allow_private) | {"skip_instance_cache": True}
        else:
            kwargs = {"use_listings_cache": False}
        fs = cast("Any", fsspec).filesystem(scheme, **kwargs)
    except ImportError as error:
        raise AdapterError(
            f"{scheme}:// needs a library that is not installed ({error}); pip install 'lorikeet[remote]'"
        ) from None
    try:
        yield _Source(fs, url, transfer)
    finally:
        session = getattr(fs, "_session", None)
        if session is not None and scheme.startswith("http"):
            fs.close_session(fs.loop, session)


def _http_options(*, allow_private: bool) -> dict[str, Any]:
    import aiohttp

    async def get_client(*, loop: Any, **kwargs: Any) -> aiohttp.ClientSession:
        sockets = None if allow_private else addresses.PublicSockets()
        connector = aiohttp.TCPConnector(socket_factory=sockets)
        return aiohttp.ClientSession(connector=connector, **kwargs)

    limits = aiohttp.ClientTimeout(
        total=None, sock_connect=_SOCKET_TIMEOUT_S, sock_read=_SOCKET_TIMEOUT_S
    )
    # encoded: a signature in the query must reach the server as it was given.
    return {
        "client_kwargs": {"timeout": limits, "trust_env": True},
        "encoded": True,
        "get_client": get_client,
    }


def _refresh(
    entry: CacheEntry, source: _Source, names: tuple[str, ...], optional: tuple[str, ...]
) -> None:
    """Make the entry what the source has now."""
    present = entry.files()
    shown = mask(source.url)
    try:
        files = source.list(names, optional)
    except _UnreachableError as error:
        if present is None:
            raise
        logger.warning("%s is served from the disk cache: %s", shown, mask(str(error)))
        return
    if files == present and all(file.validator is not None for file in files.values()):
        return
    entry.start(shown, files)
    for name, file in files.items():
        try:
            source.fetch(entry.partial / name, file.size)
        except (_UnusableError, DiskFullError):
            entry.discard()
            raise
    if source.list(names, optional) != files:
        entry.discard()
        raise AdapterError("its files changed while they were downloaded; try again")
    with errors_of_disk(entry.path):
        entry.publish()


def _file_info(name: str, info: Mapping[str, Any]) -> FileInfo:
    size = info.get("size")
    if not isinstance(size, int) or info.get("type", "file") != "file":
        raise AdapterError(f"{name} is no file whose size is known")
    if size > MAX_TEXT_BYTES and not name.endswith(".safetensors"):
        raise AdapterError(f"{name} has {size} bytes; allowed: at most {MAX_TEXT_BYTES}")
    found = {key: str(info[key]) for key in _VALIDATORS if info.get(key)}
    return FileInfo(size, json.dumps(found) if found else None)


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
    if not chunk or len(chunk) < min(START_BYTES, size):
        return
    try:
        check_start(chunk[:START_BYTES], size, name)
    except AdapterError as error:
        raise _UnusableError(f"it is not a safetensors file: {error}") from None


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
    if addresses.is_refusal(error):
        raise _RefusedError(f"{name}: {addresses.REFUSAL}") from None
    status = getattr(error, "status", None) or getattr(error, "code", None)
    is_client_error = isinstance(status, int) and 400 <= status < 500
    # A ValueError says that the URL is not valid.
    if isinstance(error, PermissionError | ValueError) or (
        is_client_error and status not in _ASK_AGAIN
    ):
        raise _RefusedError(f"{name}: {_reason(error)}") from None


def _reason(error: Exception | None) -> str:
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    text = f"{status} {message}" if status and message else str(error)
    return " ".join(text.split())[:_MAX_REASON] or type(error).__name__
