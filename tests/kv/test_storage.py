"""The K/V tensors' shapes and size."""

from __future__ import annotations

import torch

from lorikeet.kv.storage import KVStorage


def test_shapes_and_bytes() -> None:
    kv = KVStorage(3, 5, 4, 2, 8, torch.bfloat16, "cpu")
    assert len(kv.k) == len(kv.v) == 3
    assert {tuple(t.shape) for t in (*kv.k, *kv.v)} == {(20, 2, 8)}
    assert {t.dtype for t in (*kv.k, *kv.v)} == {torch.bfloat16}
    assert kv.nbytes == 2 * 3 * 20 * 2 * 8 * 2
    assert (kv.num_pages, kv.page_size) == (5, 4)
