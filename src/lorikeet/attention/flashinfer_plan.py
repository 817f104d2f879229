"""What FlashInfer needs to know about a step before its layers run: which pages the sequences use, and a plan.

Making a plan is host work that ends in a copy to the device; nothing here waits for what the device computes.

Shape legend: N sequences, P pages of the longest page table, I pages in use by the sequences at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lorikeet.attention.base import AttentionInputs


@dataclass(frozen=True, slots=True)
class Shape:
    """What all calls of one model have in common.

    Attributes:
        num_heads, num_kv_heads: of this rank.
        stored_dim: head size in the storage, at least ``head_dim``.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    stored_dim: int
    page_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True, slots=True)
class Pages:
    """The pages of some sequences of a step, one after the other.

    Attributes:
        starts: int32 on the host; sequence i has entries [starts[i], starts[i + 1]) of ``pages_I``.
        last_lens: int32 on the host: places in use of each sequence's last page.
        pages_I: int32 on the device.
    """

    starts: torch.Tensor
    last_lens: torch.Tensor
    pages_I: torch.Tensor


class Planned:
    """One of FlashInfer's wrappers, which hold a plan. A plan is written into one pinned buffer and copied from there, so
    the next one must not be made before that copy is done."""

    def __init__(self, wrapper: Any, shape: Shape) -> None:
        self.wrapper = wrapper
        self._shape = shape
        self._copied: torch.cuda.Event | None = None

    def plan(self, *indices: torch.Tensor, window: int | None, **options: Any) -> Any:
        """Plan for sequences; returns the wrapper, ready to run.

        Args:
            indices: what tells the wrapper where the sequences lie.
            options: passed on.
        """
        shape = self._shape
        if self._copied is not None:
            self._copied.synchronize()
        self.wrapper.plan(
            *indices,
            shape.num_heads,
            shape.num_kv_heads,
            shape.stored_dim,
            shape.page_size,
            window_left=-1 if window is None else window - 1,
            sm_scale=shape.scale,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
            **options,
        )
        if shape.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()
        return self.wrapper


class Turns:
    """Two planned wrappers that take turns: the copy that one has to wait for is a step old, and done by then."""

    def __init__(self, first: Planned, second: Planned) -> None:
        self._next, self._other = first, second

    def take(self) -> Planned:
        taken = self._next
        self._next, self._other = self._other, taken
        return taken


def pages_of(inputs: AttentionInputs, first: int, last: int) -> Pages:
    """The pages of sequences [first, last), taken out of the page table without waiting for the device."""
    kv_lens = np.asarray(inputs.kv_lens[first:last], dtype=np.int32)
    counts = -(-kv_lens // inputs.page_size)
    starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    width = inputs.page_table_NP.shape[1]
    # Entry i of sequence n is entry n * width + i of the flat table.
    jumps = np.arange(first, last, dtype=np.int32) * width - starts[:-1]
    entries = np.arange(starts[-1], dtype=np.int32) + np.repeat(jumps, counts)
    table = inputs.page_table_NP
    entries_I = on_host(entries, inputs).to(table.device, non_blocking=True)
    return Pages(
        starts=on_host(starts, inputs),
        last_lens=on_host((kv_lens - 1) % inputs.page_size + 1, inputs),
        pages_I=table.view(-1).index_select(0, entries_I).to(torch.int32),
    )


def on_host(array: np.ndarray, inputs: AttentionInputs) -> torch.Tensor:
    """The array as a tensor; pinned if the step is a GPU's, so that copies of it need not wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if inputs.page_table_NP.is_cuda else tensor
