"""Log-probabilities that wait for their reader, in a tenth of the memory that objects take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import msgspec

from lorikeet.core.request import TokenLogprobs

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(TokenLogprobs).decode


class PackedLogprobs(Sequence[TokenLogprobs]):
    """Log-probabilities of positions, oldest first. A position is unpacked whenever it is asked for."""

    __slots__ = ("_items", "_length")

    def __init__(self, positions: Iterable[TokenLogprobs] = ()) -> None:
        self._items = [_encode(position) for position in positions]
        self._length = len(self._items)

    def extend(self, positions: Iterable[TokenLogprobs]) -> None:
        """Add positions at the end."""
        self._items.extend(map(_encode, positions))
        self._length = len(self._items)

    def so_far(self) -> PackedLogprobs:
        """A view of what is there now, which does not grow; costs nothing."""
        view = PackedLogprobs()
        view._items, view._length = self._items, self._length
        return view

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> TokenLogprobs: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenLogprobs]: ...

    def __getitem__(self, index: int | slice) -> TokenLogprobs | list[TokenLogprobs]:
        places = range(self._length)[index]
        if isinstance(places, int):
            return _decode(self._items[places])
        return [_decode(self._items[place]) for place in places]
