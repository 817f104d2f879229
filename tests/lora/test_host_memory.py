"""The host tier: honest about its bytes."""

from __future__ import annotations

import pytest
import torch

from lorikeet.adapters.spec import LoRASpec
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.host_memory import HostCache


def _adapter(name: str, num_elems: int) -> HostAdapter:
    return HostAdapter(
        name=name,
        path="/p",
        digest=name,
        spec=LoRASpec(r=1, lora_alpha=1, target_modules=("q_proj",)),
        data=torch.zeros(num_elems),
        page_sizes=(num_elems,),
        page_classes=(0,),
        modules=(),
        rank=1,
        targets=("q_proj",),
    )


def test_what_is_put_is_got_until_dropped():
    cache, adapter = HostCache(), _adapter("a", 10)
    cache.put(7, adapter)
    assert (cache.get(7), 7 in cache, len(cache), cache.nbytes) == (adapter, True, 1, 40)
    cache.put(8, _adapter("b", 5))
    assert cache.nbytes == 60
    cache.drop(7)
    assert (7 in cache, len(cache), cache.nbytes) == (False, 1, 20)
    cache.check_integrity()


def test_unknown_versions_and_repeated_ones_are_bugs():
    cache = HostCache()
    cache.put(1, _adapter("a", 1))
    with pytest.raises(KeyError):
        cache.get(2)
    with pytest.raises(KeyError):
        cache.drop(2)
    with pytest.raises(AssertionError, match="version 1"):
        cache.put(1, _adapter("b", 1))
    assert cache.get(1).name == "a"
