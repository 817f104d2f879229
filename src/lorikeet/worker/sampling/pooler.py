"""Hidden states in, one vector per sequence out.

Shape legend: P rows that are pooled in a step, D hidden features, K sequences whose vector is complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lorikeet.core.plan import NOT_FINITE_STATES, PooledVector
from lorikeet.core.request import Pooling
from lorikeet.worker.inputs import PooledPart
from lorikeet.worker.staging import Download


@dataclass(slots=True)
class _PooledSequence:
    """What is known of a sequence that is pooled.

    Attributes:
        sums: position of a chunk -> (the sum of its states [D], how many). By position, so that a step which is computed
            again because memory was short does not count twice.
    """

    pooling: Pooling
    sums: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)

    def vector(self) -> torch.Tensor:
        sums, counts = zip(*self.sums.values(), strict=True)
        vector_D = torch.stack(sums).sum(0) / sum(counts)
        return (
            torch.nn.functional.normalize(vector_D, dim=0) if self.pooling.normalize else vector_D
        )


class PendingVectors:
    """Vectors on their way to the host.

    Args:
        seqs: their sequences.
        vectors_KD: float32; None without any.
    """

    def __init__(self, seqs: list[int], vectors_KD: torch.Tensor | None) -> None:
        self._seqs = seqs
        self._download = None if vectors_KD is None else Download(vectors_KD)

    def finish(self) -> list[PooledVector]:
        """Wait for them."""
        if self._download is None:
            return []
        (vectors_KD,) = self._download.wait()
        return [
            PooledVector(seq=seq, values=vector_D.numpy().astype("<f4").tobytes())
            if bool(vector_D.isfinite().all())
            else PooledVector(seq=seq, error=NOT_FINITE_STATES)
            for seq, vector_D in zip(self._seqs, vectors_KD, strict=True)
        ]


class Pooler:
    """Follows the sequences that are pooled. Sums are float32 on the device, whatever the states' type."""

    def __init__(self) -> None:
        self._states: dict[int, _PooledSequence] = {}

    def start(self, seq: int, pooling: Pooling) -> None:
        self._states[seq] = _PooledSequence(pooling)

    def end(self, seq: int) -> bool:
        """Drop a sequence; False if it is not pooled."""
        return self._states.pop(seq, None) is not None

    def launch(self, states_PD: torch.Tensor, parts: list[PooledPart]) -> PendingVectors:
        """Add a step's states to their sequences' sums: ``parts`` in order, each with its rows."""
        done: list[int] = []
        first = 0
        for part in parts:
            rows_D = states_PD[first : first + part.num_rows]
            first += part.num_rows
            if part.num_rows:
                total_D = rows_D.sum(0, dtype=torch.float32)
                self._states[part.seq].sums[part.start] = (total_D, part.num_rows)
            if part.is_last:
                done.append(part.seq)
        vectors = [self._states[seq].vector() for seq in done]
        return PendingVectors(done, torch.stack(vectors) if vectors else None)
