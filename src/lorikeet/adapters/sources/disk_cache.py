"""A bounded directory of downloaded adapters that several threads and processes may use at once.

    <directory>/<key>/           a complete adapter and source.json, which says where it is from
    <directory>/<key>.partial/   one that is being downloaded, or whose download was cut: it is resumed
    <directory>/<key>.lock       held exclusively by who checks or writes the entry, shared by who reads it
    <directory>/all.lock         held for a moment by who makes room

An entry becomes complete by one rename. The least recently used entry leaves first, and never one whose lock is held.
Locks are ``flock``: they end with the process, so a crash leaves nothing locked.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from lorikeet.errors import AdapterError

_SOURCE = "source.json"
_PARTIAL = ".partial"
_LOCK = ".lock"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(AdapterError):
    """There is no room left on the disk."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file at its source.

    Attributes:
        size: in bytes.
        validator: changes when the content does (an ETag, a checksum, a time); None: the source has no such thing.
    """

    size: int
    validator: str | None


class _FileLock:
    """``flock`` on a file that its last holder may remove. Different objects exclude each other, also in one process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def acquire(self, *, wait: bool = True, pause: Callable[[], None] | None = None) -> bool:
        """Lock exclusively; False if somebody else holds it and ``wait`` is off.

        Args:
            pause: called again and again instead of waiting without end; what it raises ends the wait.
        """
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                at_once = not wait or pause is not None
                fcntl.flock(fd, fcntl.LOCK_EX | (fcntl.LOCK_NB if at_once else 0))
            except BlockingIOError:
                os.close(fd)
                if not wait or pause is None:
                    return False
                pause()
                continue
            self._fd = fd
            if self.is_current():
                return True
            self.release()

    def acquire_shared(self) -> bool:
        """Lock for reading what is there; False if nothing is, or somebody writes it."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        if self.is_current():
            return True
        self.release()
        return False

    def share(self) -> None:
        """From exclusive to shared. Another may hold it exclusively in between."""
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def is_current(self) -> bool:
        """Whether the path still leads to the file that is locked."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._fd), self._path.stat())
        return False

    def remove(self) -> None:
        """Take the file away; who waits for it sees that and makes a new one."""
        self._path.unlink(missing_ok=True)

    def release(self) -> None:
        os.close(self._fd)
        self._fd = -1


class CacheEntry:
    """One adapter of the cache, locked exclusively. Made by :meth:`DiskCache.hold`."""

    def __init__(self, cache: DiskCache, key: str) -> None:
        self._cache = cache
        self._key = key
        self.path = cache.directory / key
        self.partial = cache.directory / (key + _PARTIAL)

    def files(self) -> dict[str, FileInfo] | None:
        """The files of the complete entry; None if there is none or something is missing from it."""
        found = _read_source(self.path)
        if found is None or any(_size(self.path / name) != f.size for name, f in found.items()):
            return None
        return found

    def start(self, url: str, files: dict[str, FileInfo]) -> None:
        """Prepare ``partial`` for ``files``; what it holds of exactly these stays, to be resumed.

        Args:
            url: for whoever looks into the directory; without secrets.

        Raises:
            AdapterError: they do not fit, whatever else leaves the cache.
        """
        with errors_of_disk(self._cache.directory):
            self._start(url, files)

    def _start(self, url: str, files: dict[str, FileInfo]) -> None:
        old = _read_source(self.partial)
        # Without a validator nobody knows whether the rest belongs to what is there.
        if old != files or any(file.validator is None for file in files.values()):
            shutil.rmtree(self.partial, ignore_errors=True)
        content = {"url": url, "files": {name: asdict(file) for name, file in files.items()}}
        with self._cache.locked():
            self._cache.make_room(self._key, sum(file.size for file in files.values()))
            self.partial.mkdir(mode=0o700, exist_ok=True)
            temporary = self.partial / (_SOURCE + ".new")
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(self.partial / _SOURCE)

    def discard(self) -> None:
        """Drop what was downloaded so far."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def publish(self) -> None:
        """Put ``partial`` in the place of the entry, which nobody reads: the lock is exclusive."""
        for path in self.partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        with self._cache.locked():
            shutil.rmtree(self.path, ignore_errors=True)
            self.partial.rename(self.path)


class DiskCache:
    """The directory and its bound.

    Args:
        limit: most bytes of all files together, complete or not.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory = directory
        self.limit = limit

    @contextmanager
    def read(self, key: str) -> Generator[Path | None]:
        """The complete entry ``key``, which stays while the context lasts; None if there is none, or it is being written.
        Never waits."""
        lock = _FileLock(self.directory / (key + _LOCK))
        with errors_of_disk(self.directory):
            is_held = lock.acquire_shared()
        if not is_held:
            yield None
            return
        entry = CacheEntry(self, key)
        try:
            yield entry.path if entry.files() is not None else None
        finally:
            lock.release()

    @contextmanager
    def hold(
        self, key: str, pause: Callable[[], None] | None = None
    ) -> Generator[tuple[CacheEntry, _FileLock]]:
        """Lock the entry ``key`` exclusively: its owner may write it, then ``share`` the lock while it is read.

        Args:
            pause: called again and again while another holds it; what it raises ends the wait.

        Raises:
            AdapterError: the directory cannot be written, or the disk is full.
        """
        with errors_of_disk(self.directory):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = _FileLock(self.directory / (key + _LOCK))
            lock.acquire(pause=pause)
        entry = CacheEntry(self, key)
        try:
            yield entry, lock
        finally:
            # A lock without an entry would stay for ever. It is ours to remove as long as its path leads to it.
            if not entry.path.exists() and not entry.partial.exists() and lock.is_current():
                lock.remove()
            lock.release()

    @contextmanager
    def locked(self) -> Generator[None]:
        """Alone with the list of entries."""
        lock = _FileLock(self.directory / "all.lock")
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def make_room(self, key: str, num_bytes: int) -> None:
        """Evict until ``num_bytes`` for ``key`` fit beside everything else. The caller has the cache ``locked``.

        Raises:
            AdapterError: they do not fit, even alone or beside what is in use.
        """
        if num_bytes > self.limit:
            raise AdapterError(
                f"its files have {num_bytes} bytes, more than --lora-disk-cache-gb allows ({self.limit})"
            )
        # What a download has announced counts in full, so that two of them cannot share the same room.
        used = {path: _used(path) for path in self._entries() if path.name != key + _PARTIAL}
        excess = sum(used.values()) + num_bytes - self.limit
        for path in sorted(used, key=_last_use):
            if excess > 0 and self._evict(path, key):
                excess -= used[path]
        if excess > 0:
            raise AdapterError(
                f"{num_bytes} bytes do not fit in the cache {self.directory} beside the adapters that are being "
                "read; raise --lora-disk-cache-gb or try again later"
            )

    def _entries(self) -> list[Path]:
        return [path for path in self.directory.iterdir() if path.is_dir()]

    def _evict(self, path: Path, own_key: str) -> bool:
        """Remove one entry; False if it is in use. The caller holds the lock of ``own_key`` already."""
        key = path.name.removesuffix(_PARTIAL)
        if key == own_key:
            shutil.rmtree(path, ignore_errors=True)
            return True
        lock = _FileLock(self.directory / (key + _LOCK))
        if not lock.acquire(wait=False):
            return False
        try:
            shutil.rmtree(path, ignore_errors=True)
            lock.remove()
        finally:
            lock.release()
        return True


@contextmanager
def errors_of_disk(directory: Path) -> Generator[None]:
    """Turn what the disk refuses into an :class:`AdapterError` that names the directory."""
    try:
        yield
    except OSError as error:
        full = error.errno in _NO_SPACE
        reason = "the disk is full" if full else error.strerror or str(error)
        kind = DiskFullError if full else AdapterError
        raise kind(
            f"adapter cache {directory} cannot be written: {reason} (--lora-disk-cache-dir)"
        ) from error


def touch(path: Path) -> None:
    """Mark an entry as used now."""
    with suppress(OSError):  # a cache that may only be read still serves
        os.utime(path)


def _last_use(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _used(path: Path) -> int:
    announced = sum(file.size for file in (_read_source(path) or {}).values())
    present = sum(_size(child) or 0 for child in path.iterdir())
    return max(announced, present)


def _size(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return None


def _read_source(directory: Path) -> dict[str, FileInfo] | None:
    """What ``source.json`` says; None if it is not there or not whole."""
    try:
        content = json.loads((directory / _SOURCE).read_text(encoding="utf-8"))
        return {
            str(name): FileInfo(int(file["size"]), cast("str | None", file["validator"]))
            for name, file in content["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
