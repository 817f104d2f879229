"""The K/V tensors. Which page belongs to whom is decided elsewhere (``kv/pages.py``, ``kv/manager.py``).

Shape legend: C token places = pages x page size, K key/value heads, H head size.
"""

from __future__ import annotations

import torch


class KVStorage:
    """Keys and values of every layer, addressed by token place ``page * page_size + offset``.

    The memory is not initialised: a reader must not touch a place that was never written, not even to multiply it by
    zero.

    Args:
        num_kv_heads: of this rank.
        head_dim: as attention stores it (``AttentionBackend.storage_head_dim``).
        zero: fill with zeros: for heads that are stored wider than they are, whose rest nobody ever writes.

    Attributes:
        k, v: by layer, [C, K, H].
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        zero: bool = False,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        shape = (num_pages * page_size, num_kv_heads, head_dim)
        make = torch.zeros if zero else torch.empty
        self.k = [make(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.v = [make(shape, dtype=dtype, device=device) for _ in range(num_layers)]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.k, *self.v))
