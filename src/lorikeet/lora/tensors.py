"""The safetensors format: a header that is checked before any weight is read, and weights that are read, not mapped.

Why not the library's own reader: it maps the file, and whoever shortens a mapped file kills the process that looks at
it (SIGBUS). A server reads files that it does not own. Reading also decides once what the values are: a file that is
changed under a reader gives other bytes, never bytes that were checked and then changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import cast

import numpy as np
import torch

from lorikeet.adapters.files import opened, write_atomically
from lorikeet.adapters.sources.source import WEIGHTS_FILE
from lorikeet.adapters.spec import CONFIG_FILE, MAX_CONFIG_BYTES, parse_adapter_config
from lorikeet.adapters.tensor_header import parse_header
from lorikeet.errors import AdapterError

# What load_lora_adapter_from_tensors takes; rank 256 on every module of a 70B model in 16 bits has 6.6 GB.
MAX_TENSORS_BYTES = 8 << 30
# Alignment of tensors in memory: that of the widest type.
_ALIGNMENT = 8

# Types that can be read, of those that a file may hold.
TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorFile:
    """An open safetensors file whose header is checked; see :func:`open_tensors`."""

    def __init__(self, file: FileIO, path: Path) -> None:
        self._file = file
        self._path = path
        size = os.fstat(file.fileno()).st_size
        self.tensors = parse_header(self._read_at, size, str(path))

    def read(self, name: str) -> torch.Tensor:
        """The values of a tensor whose type is one of ``TORCH_TYPES``.

        Raises:
            AdapterError: the file has been shortened since it was opened.
        """
        return self.read_all([name])[name]

    def read_all(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The values of several tensors, in memory of their own, with as few reads as their places allow.

        Raises:
            AdapterError: the file has been shortened since it was opened.
        """
        infos = {name: self.tensors[name] for name in names}
        room = sum(info.end - info.start + _ALIGNMENT for info in infos.values())
        data = empty_flat(room, torch.uint8)
        found: dict[str, torch.Tensor] = {}
        # Neighbours in the file are read by one call.
        begin = end = span_start = span_end = 0
        for name, info in sorted(infos.items(), key=lambda item: item[1].start):
            dtype = TORCH_TYPES[info.dtype]
            if info.start != span_end or end % dtype.itemsize:
                self._fill(data[begin:end].numpy().data, span_start)
                begin = end = -(-end // _ALIGNMENT) * _ALIGNMENT
                span_start = info.start
            first, end, span_end = end, end + info.end - info.start, info.end
            found[name] = data[first:end].view(dtype).view(info.shape)
        self._fill(data[begin:end].numpy().data, span_start)
        return found

    def _read_at(self, start: int, length: int) -> bytes:
        data = bytearray(length)
        self._fill(memoryview(data), start)
        return bytes(data)

    def _fill(self, view: memoryview, start: int) -> None:
        self._file.seek(start)
        while view:
            # One call may read less than there is.
            num_read = self._file.readinto(view)
            if not num_read:
                raise AdapterError(
                    f"{self._path} is broken or truncated: it ended while it was read"
                )
            view = view[num_read:]


def empty_flat(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for ``size`` values, not pinned. From numpy, which asks for huge pages: small ones take longer to come into
    being than to be filled."""
    return torch.from_numpy(np.empty(size * dtype.itemsize, dtype=np.uint8)).view(dtype)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """A safetensors file; only its header has been read.

    Raises:
        AdapterError: it cannot be read, or its header is wrong; also while it is used.
    """
    with opened(path) as file:
        yield TensorFile(file, path)


def accept_tensors(config: Mapping[str, object], weights: Path) -> None:
    """Write an adapter that came over the wire as the two files that :func:`lorikeet.lora.loader.load_adapter` reads.

    Args:
        config: what ``adapter_config.json`` holds; sets are taken for lists, as PEFT's own ``to_dict`` gives them.
        weights: a safetensors file, which gets its proper name. Never a pickle.

    Raises:
        AdapterError: one of the two is wrong, or cannot be written (a full disk). The caller removes the directory.
    """
    text = _config_text(config)
    with opened(weights) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_TENSORS_BYTES:
            raise AdapterError(f"tensors has {size} bytes; allowed: at most {MAX_TENSORS_BYTES}")
        if not TensorFile(file, Path("tensors")).tensors:
            raise AdapterError("tensors holds no tensor")
    write_atomically(weights.with_name(CONFIG_FILE), [text])
    try:
        weights.rename(weights.with_name(WEIGHTS_FILE))
    except OSError as error:
        raise AdapterError(f"cannot write {weights}: {error.strerror or error}") from error


def _config_text(config: Mapping[str, object]) -> bytes:
    try:
        text = json.dumps(dict(config), default=_sorted_set, indent=2).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterError(f"config_dict cannot be written as JSON: {error}") from error
    if len(text) > MAX_CONFIG_BYTES:
        raise AdapterError(
            f"config_dict has {len(text)} bytes as JSON; allowed: at most {MAX_CONFIG_BYTES}"
        )
    parse_adapter_config(json.loads(text), "config_dict")
    return text


def _sorted_set(value: object) -> list[object]:
    if isinstance(value, set | frozenset):
        return sorted(cast("set[object]", value), key=str)
    raise TypeError(f"{type(value).__name__} is not JSON")
