"""Storing keys and values."""

from __future__ import annotations

import torch

from lorikeet.ops.kv_store import store_kv_torch


def test_only_the_named_places_are_written() -> None:
    k, v = torch.arange(12.0).view(3, 2, 2), torch.arange(12.0, 24.0).view(3, 2, 2)
    k_cache, v_cache = torch.full((5, 2, 2), -1.0), torch.full((5, 2, 2), -2.0)
    store_kv_torch(k, v, k_cache, v_cache, torch.tensor([4, 0, 2]))
    assert torch.equal(k_cache[[4, 0, 2]], k)
    assert torch.equal(v_cache[[4, 0, 2]], v)
    assert (k_cache[[1, 3]] == -1).all()
    assert (v_cache[[1, 3]] == -2).all()
