"""Writing keys and values into the paged cache.

Shape legend: T tokens, K key/value heads, H head size, C token places in the cache (pages x page size).
"""

from __future__ import annotations

import torch


def store_kv_torch(
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    k_cache_CKH: torch.Tensor,
    v_cache_CKH: torch.Tensor,
    places_T: torch.Tensor,
) -> None:
    """Store the keys and values of T tokens at their places in the cache. Semantics::

        k_cache[places] = k
        v_cache[places] = v

    Writes to the two caches. Places must be distinct.
    """
    k_cache_CKH.index_copy_(0, places_T, k_TKH)
    v_cache_CKH.index_copy_(0, places_T, v_TKH)
