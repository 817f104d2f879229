"""The guard of the other tests works itself."""

from __future__ import annotations

import torch

from tests.conftest import poison


def test_memory_is_poisoned_inside_and_not_after():
    with poison():
        assert torch.empty(3).isnan().all()
        assert torch.empty(2, dtype=torch.int64).eq(torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()
