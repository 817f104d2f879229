"""What the layers ask of attention, and what they tell it about a step.

Shape legend: T tokens of the step, N sequences of the step, P pages of the longest page table, Q query heads,
K key/value heads, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from lorikeet.kv.storage import KVStorage


@dataclass(frozen=True, slots=True, eq=False)
class AttentionInputs:
    """Which tokens of a step belong to which sequence, and where their keys and values lie.

    Made once for each step; layers only read it.

    Example: pages of 4 places; sequence 0 computes its tokens 0 to 2, sequence 1 decodes its token 5 ::

        query_starts   [0, 3, 4]              # sequence i owns rows [query_starts[i], query_starts[i + 1]) of T
        kv_lens        [3, 6]                 # tokens with K/V, those of this step included
        num_chunks     1                      # sequence 0; the sequences after the chunks decode, one query each
        page_table_NP  [[7, 0], [2, 9]]       # unused entries are 0, which is also a page like any other
        places_T       [28, 29, 30, 37]       # page * 4 + offset: where this step's K/V go; -1: nowhere

    The queries of a sequence are its newest tokens: row j of n has position ``kv_len - n + j``.

    Attributes:
        query_starts, kv_lens: on the host.
        query_starts_N1, kv_lens_N: the same as tensors, of the type of ``page_table_NP``.
        bucket: None for a step that runs eagerly. Else the step decodes with ``bucket`` rows in tensors that lie at the
            same address in every step that replays the same CUDA graph; rows that pad the batch have one key, place 0,
            and store nothing.
    """

    query_starts: list[int]
    kv_lens: list[int]
    page_table_NP: torch.Tensor
    places_T: torch.Tensor
    page_size: int
    num_chunks: int
    query_starts_N1: torch.Tensor
    kv_lens_N: torch.Tensor
    bucket: int | None = None


class AttentionBackend(Protocol):
    """Causal attention of a step's queries over their sequences' paged keys and values.

    Attributes:
        name: as ``--attention-backend`` spells it.
    """

    @property
    def name(self) -> str: ...

    def storage_head_dim(self, head_dim: int) -> int:
        """The head size that keys and values must be stored with; what exceeds ``head_dim`` is zeros.

        Raises:
            ConfigError: the backend cannot serve such heads.
        """
        ...

    def graph_kv_lens(self, bucket: int, longest: int) -> tuple[int, ...]:
        """Lengths, ascending, that decode steps of ``bucket`` rows are captured for: a step replays the first graph whose
        length its sequences do not exceed, and runs eagerly if there is none.

        Args:
            longest: length of the longest sequence that there can be.
        """
        ...

    def prepare(self, inputs: AttentionInputs) -> None:
        """Do what depends on the step but not on the layer. Called once before the layers, outside of captured graphs,
        and before each replay of one; what it keeps is valid until the next call. Does not wait for the device."""
        ...

    def forward(
        self,
        q_TQH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        kv: KVStorage,
        layer: int,
        inputs: AttentionInputs,
        window: int | None,
    ) -> torch.Tensor:
        """Attend; scores are scaled by ``H ** -0.5``.

        The step's keys and values are in ``kv`` already (``ops/rope.py`` puts them there); ``k_TKH`` and ``v_TKH`` are
        the same ones, for backends that prefer not to read them back.

        Args:
            q_TQH: rotated queries; need not be contiguous. Query head h uses key head ``h // (Q // K)``.
            window: a query sees only this many newest keys, its own included; None means all.

        Returns:
            [T, Q, H], contiguous.
        """
        ...
