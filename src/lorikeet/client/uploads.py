"""Adapters that are sent as tensors: each lies in a directory of its own, from which the engine reads it.

Whoever receives one writes its weights there and tells the engine the file. From then on the directory is the engine's,
which removes it when the adapter is refused or unloaded; what is left goes with the root.
"""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path

from lorikeet.errors import AdapterError
from lorikeet.scratch import ScratchDir

_WEIGHTS = "weights"


class Uploads:
    """Directories below a root that only this user can enter.

    Args:
        root: made with the first directory; None: a new one, which goes with this object.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = root
        self._num = 0

    def new(self) -> Path:
        """The path of a file to write weights to, in a new directory.

        Raises:
            AdapterError: the directory cannot be made.
        """
        self._num += 1
        try:
            if self._root is None:
                scratch = ScratchDir()
                weakref.finalize(self, scratch.remove)
                self._root = Path(scratch.path)
            self._root.mkdir(mode=0o700, exist_ok=True)
            directory = self._root / str(self._num)
            directory.mkdir(mode=0o700)
        except OSError as error:
            raise AdapterError(f"cannot make a directory for tensors: {error}") from error
        return directory / _WEIGHTS

    def discard(self, weights: Path) -> None:
        """Remove a file that the engine was not told of."""
        shutil.rmtree(weights.parent, ignore_errors=True)

    def close(self) -> None:
        """Remove everything."""
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)
