"""Temporary directories that do not outlive their process, however it ends.

A living process holds a lock (flock) on each of its directories, which the system gives back when the process is gone. The
next one that makes a directory removes those that nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "lorikeet-"
# Tells our directories from what else somebody may call lorikeet-something. systemd-tmpfiles respects the lock, too.
MARK = ".lorikeet-scratch"


class ScratchDir:
    """A new directory of this process that only its user can enter.

    Another process to which it is handed on may use it, and does not own it.

    Args:
        base: where to make it; None is the system's place for temporary files.
    """

    def __init__(self, base: str | None = None) -> None:
        base = base or tempfile.gettempdir()
        remove_abandoned(base)
        self.path, self._lock = _make(base)

    def remove(self) -> None:
        """Delete it with what it holds; harmless a second time, and where somebody else owns it."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def __getstate__(self) -> str:
        return self.path

    def __setstate__(self, path: str) -> None:
        self.path, self._lock = path, None


def remove_abandoned(base: str) -> None:
    """Delete the directories in ``base`` whose process is gone: this user's own ones, and no links."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(base):
            if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False):
                _remove_if_abandoned(entry.path)


def _remove_if_abandoned(path: str) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(lock).st_uid != os.geteuid() or not (Path(path) / MARK).is_file():
                return
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _make(base: str) -> tuple[str, int]:
    path = tempfile.mkdtemp(prefix=PREFIX, dir=base)
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    # A file system without locks (some NFS) has none that could be taken for free either.
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)
    # Only now: without the mark nobody else touches it.
    (Path(path) / MARK).write_text(f"{os.getpid()}\n")
    return path, lock
