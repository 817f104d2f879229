"""The safetensors format: a header that is checked before any weight is read, and weights that are read, not mapped.

Why not the library's own reader: it maps the file, and whoever shortens a mapped file kills the process that looks at
it (SIGBUS). A server reads files that it does not own. Reading also decides once what the values are: a file that is
changed under a reader gives other bytes, never bytes that were checked and then changed.

The format (https://huggingface.co/docs/safetensors): 8 bytes, the length of the header, little-endian; a JSON object,
name -> {dtype, shape, data_offsets}; then the tensors one after the other, without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import cast

import numpy as np
import torch

from lorikeet.errors import AdapterError
from lorikeet.lora.adapter_config import CONFIG_FILE, MAX_CONFIG_BYTES, parse_adapter_config
from lorikeet.lora.files import opened, write_atomically
from lorikeet.lora.source import WEIGHTS_FILE

# An adapter of a hundred layers has some thousand tensors, of about 150 bytes each in the header.
MAX_HEADER_BYTES = 16 << 20
# What load_lora_adapter_from_tensors takes; rank 256 on every module of a 70B model in 16 bits has 6.6 GB.
MAX_TENSORS_BYTES = 8 << 30
_MAX_NAME = 512
_LENGTH_BYTES = 8
# Of tensors in memory: that of the widest type.
_ALIGNMENT = 8
_METADATA = "__metadata__"

# Types that a file may hold, and their bits. Only those of TORCH_TYPES can be read.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}
TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a header.

    Attributes:
        dtype: the format's name of the type.
        start, end: where its bytes lie, counted from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


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


def parse_header(
    read_at: Callable[[int, int], bytes], size: int, where: str
) -> dict[str, TensorInfo]:
    """Check the header of ``size`` bytes of safetensors.

    Args:
        read_at: (start, length) -> bytes; never asked for more than there is.
        where: named in front of each error.

    Raises:
        AdapterError: says what is wrong.
    """
    if size < _LENGTH_BYTES:
        raise _broken(where, f"it has {size} bytes, less than the length of a header")
    head = read_at(0, min(size, 16))
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    begin = _LENGTH_BYTES + length
    if length > size - _LENGTH_BYTES or length > MAX_HEADER_BYTES:
        _refuse_pickle(head, where)
        most = min(size - _LENGTH_BYTES, MAX_HEADER_BYTES)
        raise _broken(where, f"its header claims {length} bytes; possible: at most {most}")
    if head[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{":
        _refuse_pickle(head, where)
        raise _broken(where, "its header is not a JSON object")
    entries = _json_header(read_at(_LENGTH_BYTES, length), where)
    entries.pop(_METADATA, None)
    tensors = {name: _tensor(name, entry, begin, where) for name, entry in entries.items()}
    _check_gaps(tensors, begin, size, where)
    return tensors


def accept_tensors(config: Mapping[str, object], weights: Path) -> None:
    """Make an adapter that came over the wire the two files that :func:`lorikeet.lora.loader.load_adapter` reads.

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


def _broken(where: str, why: str) -> AdapterError:
    return AdapterError(f"{where} is broken or truncated: {why}")


def _refuse_pickle(head: bytes, where: str) -> None:
    """Say so if the bytes are what torch.save or pickle writes."""
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b")) or (
        head[0] == 0x80 and head[1] in range(1, 8)
    ):
        raise AdapterError(
            f"{where} is a pickle or an archive, not safetensors; a pickle runs code when it is read, so it is never "
            "loaded: save the adapter with safetensors"
        )


def _json_header(data: bytes, where: str) -> dict[str, object]:
    def unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError("a name is there twice")
        return fields

    try:
        header: object = json.loads(data.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _broken(where, f"its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise _broken(where, "its header is not a JSON object")
    return cast("dict[str, object]", header)


def _tensor(name: str, entry: object, begin: int, where: str) -> TensorInfo:
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise _broken(where, f"a tensor has the name {name[:_MAX_NAME]!r}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(where, f"tensor {name} needs dtype, shape and data_offsets in the header")
    fields = cast("dict[str, object]", entry)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _broken(where, f"tensor {name} is of the unknown type {dtype!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(cast("list[int]", offsets)) != 2:
        raise _broken(where, f"tensor {name} has the shape {shape!r} and the place {offsets!r}")
    start, end = cast("list[int]", offsets)
    num_bits = math.prod(cast("list[int]", shape)) * _BITS[dtype]
    if num_bits != 8 * (end - start):
        raise _broken(
            where, f"tensor {name} of {dtype} {shape} is said to have {end - start} bytes"
        )
    return TensorInfo(dtype, tuple(cast("list[int]", shape)), begin + start, begin + end)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0
        for item in cast("list[object]", value)
    )


def _check_gaps(tensors: Mapping[str, TensorInfo], begin: int, size: int, where: str) -> None:
    """Tensors lie one after the other up to the end of the file, so nothing hides between them."""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != begin:
            raise _broken(where, f"tensor {name} begins at byte {info.start}, not at {begin}")
        begin = info.end
    if begin != size:
        raise _broken(where, f"by its header it has {begin} bytes, in truth {size}")
