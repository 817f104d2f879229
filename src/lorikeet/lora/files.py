"""Reading and writing an adapter's files without trusting what lies at their paths."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from lorikeet.errors import AdapterError


@contextmanager
def opened(path: Path) -> Iterator[FileIO]:
    """A regular file, unbuffered; whatever the system refuses while it is open becomes an AdapterError.

    A pipe or a device in its place is refused at once: to open a pipe would wait for whoever writes into it.
    """
    try:
        with FileIO(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise AdapterError(f"cannot read {path}: it is not a regular file")
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
