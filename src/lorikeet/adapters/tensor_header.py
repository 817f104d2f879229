"""The header of a safetensors file: what is in the file and where, checked before any weight is read.

The format (https://huggingface.co/docs/safetensors): 8 bytes, the length of the header, little-endian; a JSON object,
name -> {dtype, shape, data_offsets}; then the tensors one after the other, without gaps. No number in
it is trusted: each is bounded before anything is computed with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from lorikeet.errors import AdapterError
from lorikeet.fields import is_integer
from lorikeet.masking import printable, shortened

# An adapter of a hundred layers has some thousand tensors, of about 150 bytes each in the header. It is read with the
# interpreter's lock held, so there is no room for what no adapter needs.
MAX_HEADER_BYTES = 4 << 20
# A weight has two; nothing that is saved has more than a few.
_MAX_DIMS = 8
# Beyond any file.
_MAX_SIZE = 1 << 48
_MAX_NAME = 512
LENGTH_BYTES = 8
# The length and the brace that begins the header, and enough bytes to recognise other formats.
START_BYTES = 24
_METADATA = "__metadata__"
# How Git LFS begins the text that it keeps in a file's place.
_LFS_POINTER = b"version https://git-lfs"

# Types that a file may hold, and their bits.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}


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
    length = check_start(read_at(0, min(size, START_BYTES)), size, where)
    begin = LENGTH_BYTES + length
    entries = _json_header(read_at(LENGTH_BYTES, length), where)
    entries.pop(_METADATA, None)
    tensors = {name: _tensor(name, entry, begin, where) for name, entry in entries.items()}
    _check_gaps(tensors, begin, size, where)
    return tensors


def _broken(where: str, why: str) -> AdapterError:
    return AdapterError(f"{where} is broken or truncated: {why}")


def check_start(head: bytes, size: int, where: str) -> int:
    """Check the first ``START_BYTES`` (or all) of a file of ``size`` bytes; returns the length of its header.

    Raises:
        AdapterError: it is not safetensors; says what it is, if that can be seen.
    """
    if size < LENGTH_BYTES:
        raise _broken(where, f"it has {size} bytes, less than the length of a header")
    length, possible = _length(head, size)
    if has_header(head, size):
        return length
    _refuse_others(head, where)
    if length <= possible:
        raise _broken(where, "its header is not a JSON object")
    raise _broken(where, f"its header claims {length} bytes; possible: at most {possible}")


def has_header(head: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes, more than ``LENGTH_BYTES``, that begins with ``head`` may be safetensors."""
    length, possible = _length(head, size)
    return 0 < length <= possible and head[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{"


def _length(head: bytes, size: int) -> tuple[int, int]:
    """How long the header claims to be, and how long it can be."""
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    return length, min(size - LENGTH_BYTES, MAX_HEADER_BYTES)


def is_pickled(head: bytes) -> bool:
    """Whether a file begins like a pickle, or like an archive, which is what ``torch.save`` writes around one."""
    is_pickle = len(head) > 1 and head[0] == 0x80 and head[1] in range(1, 8)
    return is_pickle or head.startswith((b"PK\x03\x04", b"\x1f\x8b"))


def _refuse_others(head: bytes, where: str) -> None:
    """Say so if the bytes are what Git LFS, torch.save or pickle writes."""
    if head.startswith(_LFS_POINTER[: len(head)]):
        raise AdapterError(
            f"{where} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`"
        )
    if is_pickled(head):
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
        raise _broken(where, f"its header is not valid JSON: {printable(str(error))}") from error
    if not isinstance(header, dict):
        raise _broken(where, "its header is not a JSON object")
    return cast("dict[str, object]", header)


def _tensor(name: str, entry: object, begin: int, where: str) -> TensorInfo:
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise _broken(where, f"a tensor has the name {name[:_MAX_NAME]!r}")
    if not isinstance(entry, dict) or cast("dict[str, object]", entry).keys() != {
        "dtype",
        "shape",
        "data_offsets",
    }:
        raise _broken(where, f"tensor {name} needs dtype, shape and data_offsets in the header")
    fields = cast("dict[str, object]", entry)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _broken(where, f"tensor {name} is of the unknown type {_show(dtype)}")
    are_sizes = _are_sizes(shape, range(_MAX_DIMS + 1)) and _are_sizes(offsets, range(2, 3))
    if not are_sizes:
        raise _broken(
            where,
            f"tensor {name} has the shape {_show(shape)} and the place {_show(offsets)}; allowed: at most {_MAX_DIMS} "
            f"dimensions, and no number above {_MAX_SIZE}",
        )
    sizes = cast("list[int]", shape)
    start, end = cast("list[int]", offsets)
    num_bits = _BITS[dtype]
    for size in sizes:
        num_bits *= size  # a few numbers, each bounded
    if num_bits != 8 * (end - start):
        raise _broken(
            where, f"tensor {name} of {dtype} {sizes} is said to have {end - start} bytes"
        )
    return TensorInfo(dtype, tuple(sizes), begin + start, begin + end)


def _are_sizes(value: object, lengths: range) -> bool:
    """Whether ``value`` is a list of sizes, as many as ``lengths`` allows."""
    return (
        isinstance(value, list)
        and len(cast("list[object]", value)) in lengths
        and all(is_integer(item) and 0 <= item <= _MAX_SIZE for item in cast("list[object]", value))
    )


def _show(value: object) -> str:
    """The beginning of a value; a list of a million numbers is not written out."""
    if isinstance(value, list):
        items = cast("list[object]", value)
        more = ["…"] if len(items) > _MAX_DIMS else []
        shown = [
            _show(item) if isinstance(item, int | float) else "?" for item in items[:_MAX_DIMS]
        ]
        return f"[{', '.join(shown + more)}]"
    return shortened(repr(value), 30)


def _check_gaps(tensors: Mapping[str, TensorInfo], begin: int, size: int, where: str) -> None:
    """Tensors lie one after the other up to the end of the file, so nothing hides between them."""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != begin:
            raise _broken(where, f"tensor {name} begins at byte {info.start}, not at {begin}")
        begin = info.end
    if begin != size:
        raise _broken(where, f"by its header it has {begin} bytes, in truth {size}")
