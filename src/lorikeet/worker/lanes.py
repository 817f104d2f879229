"""Lanes: every running sequence has a small number, its index into arrays that are made once.

Shape legend: L lanes, P pages of the longest possible sequence.
"""

from __future__ import annotations

import numpy as np
import torch

from lorikeet.errors import EngineFault
from lorikeet.worker.staging import int_type


class Lanes:
    """Gives each running sequence a lane, with its page table on the host and its newest token on the device.

    A lane may go to another sequence while a step that writes its token still runs: the device works in order, so the
    other sequence's token comes later.

    Args:
        num_lanes: sequences that run at a time.
        max_pages: pages of the longest sequence.

    Attributes:
        pages_LP: page table of each lane; entries beyond its end are 0.
        sampled_L: int64 on the device: the token that was sampled last. Written by the sampler.
    """

    def __init__(self, num_lanes: int, max_pages: int, device: torch.device) -> None:
        self.pages_LP = np.zeros((num_lanes, max_pages), dtype=int_type(device))
        self.sampled_L = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        self._num_pages = [0] * num_lanes
        self._free = list(range(num_lanes - 1, -1, -1))

    def open(self, page_ids: list[int]) -> int:
        """Give a sequence a lane, with the pages that it holds.

        Raises:
            EngineFault: more sequences run than there are lanes.
        """
        if not self._free:
            raise EngineFault(f"more than {len(self._num_pages)} sequences run")
        lane = self._free.pop()
        self.extend(lane, page_ids)
        return lane

    def extend(self, lane: int, page_ids: list[int]) -> None:
        """Append pages to a sequence's page table.

        Raises:
            EngineFault: the sequence has more pages than the longest one may have.
        """
        if not page_ids:
            return
        begin = self._num_pages[lane]
        end = begin + len(page_ids)
        if end > self.pages_LP.shape[1]:
            raise EngineFault(f"{end} pages; a sequence has at most {self.pages_LP.shape[1]}")
        self.pages_LP[lane, begin:end] = page_ids
        self._num_pages[lane] = end

    def close(self, lane: int) -> None:
        """Give a lane back."""
        self.pages_LP[lane, : self._num_pages[lane]] = 0
        self._num_pages[lane] = 0
        self._free.append(lane)
