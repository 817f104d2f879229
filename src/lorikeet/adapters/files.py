"""Reading and writing an adapter's files without trusting what lies at their paths."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from io import FileIO
from pathlib import Path

from lorikeet.errors import AdapterError

# Far above any configuration or template that comes with an adapter, far below what could fill a memory.
MAX_TEXT_BYTES = 4 * 2**20


# Directories that must hold every file that this thread opens; empty: any.
_roots: ContextVar[tuple[Path, ...]] = ContextVar("_roots", default=())


@contextmanager
def confined(roots: tuple[Path, ...]) -> Generator[None]:
    """While the context lasts, this thread opens files below ``roots`` only, wherever a link leads to."""
    token = _roots.set(roots)
    try:
        yield
    finally:
        _roots.reset(token)


def is_below(path: Path, roots: tuple[Path, ...]) -> bool:
    """Whether a real path lies below one of ``roots``, which may be links themselves."""
    return any(path.is_relative_to(root.resolve()) for root in roots)


def _check_place(path: Path, descriptor: int) -> None:
    """Refuse a file that was opened outside of the roots, although its path is inside.

    Raises:
        AdapterError: a link has led elsewhere.
    """
    roots = _roots.get()
    if not roots:
        return
    real = path.resolve()
    # The second comparison is for a link that was turned back before it was looked at.
    if not is_below(real, roots) or not os.path.samestat(os.fstat(descriptor), real.stat()):
        raise AdapterError(f"{path} is a link that leads out of --lora-root or --lora-resolver-dir")


@contextmanager
def opened(path: Path) -> Generator[FileIO]:
    """A regular file, unbuffered; whatever the system refuses while it is open becomes an AdapterError.

    A pipe or a device in its place is refused at once: to open a pipe would wait for whoever writes into it.
    """
    try:
        with FileIO(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise AdapterError(f"cannot read {path}: it is not a regular file")
            _check_place(path, file.fileno())
            yield file
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror or error}") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def read_small(path: Path, most: int) -> bytes:
    """A whole file of at most ``most`` bytes.

    Raises:
        AdapterError: it is larger, or cannot be read.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise AdapterError(f"{path} has {size} bytes; allowed: at most {most}")
        data = bytearray()
        # One byte more than allowed: the file may grow while it is read.
        while len(data) <= most and (block := file.read(most + 1 - len(data))):
            data += block
    if len(data) > most:
        raise AdapterError(f"{path} has more than {most} bytes; allowed: at most {most}")
    return bytes(data)


def write_atomically(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Write a file that is there completely or not at all; only its owner may read it.

    Raises:
        AdapterError: the system refuses, for example because the disk is full. Nothing of it is left behind.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            for block in blocks:
                file.write(block)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise AdapterError(f"cannot write {path}: {error.strerror or error}") from error
