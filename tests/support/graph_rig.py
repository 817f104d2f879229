"""Steps of a few sequences, and a runner of captured passes for them, on a CPU and without a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lorikeet.core.plan import DecodeRow, PrefillChunk, SequenceStart, StepPlan
from lorikeet.core.request import SamplingParams
from lorikeet.kv.storage import KVStorage
from lorikeet.worker.graphs import GraphRunner
from lorikeet.worker.inputs import InputBuilder, Lanes, StepLayout

CPU = torch.device("cpu")
PAGE = 4


def sequence(
    seq: int, tokens: list[int], pages: list[int], slot: int = 0, logprob_start: int = -1
) -> SequenceStart:
    """A sequence that starts with nothing cached."""
    return SequenceStart(
        seq=seq,
        token_ids=tokens,
        num_prompt=len(tokens),
        num_cached=0,
        page_ids=pages,
        slot=slot,
        sampling=SamplingParams(),
        seed=0,
        logprob_start=logprob_start,
    )


class GraphRig:
    """Pages of 4 tokens. Sequences 0, 1, ... have computed 3 tokens each, in pages 5, 6, ...

    Args:
        slots: adapter slot of each.
        num_lanes, max_pages: see :class:`Lanes`.
    """

    def __init__(self, slots: tuple[int, ...], num_lanes: int = 4, max_pages: int = 8) -> None:
        kv = KVStorage(1, 16, PAGE, 1, 2, torch.float32, "cpu")
        self.inputs = InputBuilder(kv, PAGE, CPU, None, Lanes(num_lanes, max_pages, CPU))
        plan = StepPlan(step=0)
        for seq, slot in enumerate(slots):
            plan.starts.append(sequence(seq, [1, 2, 3], [5 + seq], slot))
            plan.chunks.append(PrefillChunk(seq=seq, start=0, end=3, new_page_ids=[], sample=True))
        self.prefill = self.lay_out(plan)

    def lay_out(self, plan: StepPlan) -> StepLayout:
        self.inputs.apply(plan)
        return self.inputs.lay_out(plan)

    def lane(self, seq: int) -> int:
        return self.inputs.sequences[seq].lane

    def decode(self, position: int, new_pages: tuple[int, ...] = ()) -> StepLayout:
        """Every sequence computes its token at a position."""
        rows = [
            DecodeRow(seq=seq, position=position, new_page_ids=[page + seq for page in new_pages])
            for seq in self.inputs.sequences
        ]
        return self.lay_out(StepPlan(step=1, rows=rows))

    def mixed(self, slot: int = 0, logprob_start: int = -1) -> StepLayout:
        """Sequence 0 decodes its token 3, sequence 9 starts and computes its first five of six tokens."""
        start = sequence(9, [4, 5, 6, 7, 8, 9], [7, 8], slot, logprob_start)
        chunk = PrefillChunk(seq=9, start=0, end=5, new_page_ids=[], sample=False)
        row = DecodeRow(seq=0, position=3, new_page_ids=[])
        return self.lay_out(StepPlan(step=1, starts=[start], chunks=[chunk], rows=[row]))

    def runner(
        self,
        *lengths: int,
        lora: Any = None,
        decode_sizes: tuple[int, ...] = (1, 4),
        prompt_sizes: tuple[int, ...] = (),
    ) -> GraphRunner:
        """A runner that has captured nothing yet.

        Args:
            lengths: of sequences that decode, by which there are graphs.
        """

        class Attention:
            def graph_kv_lens(self, bucket: int, longest: int) -> tuple[int, ...]:
                return lengths or (longest,)

        attention: Any = Attention()
        return GraphRunner(
            lambda batch: torch.empty(0),
            attention,
            self.inputs,
            lora,
            decode_sizes=decode_sizes,
            prompt_sizes=prompt_sizes,
            max_kv_len=PAGE * self.inputs.lanes.pages_LP.shape[1],
        )


class _Plan:
    """Tiles that are the slots of the rows, one each."""

    def __init__(self, slots: list[int], num_tiles: int) -> None:
        self.num_tiles = num_tiles
        self.arrays = [np.asarray(slots + [0] * (num_tiles - len(slots)), dtype=np.int32)]

    def batch(self, tensors: list[torch.Tensor]) -> Any:
        (slots_J,) = tensors
        return slots_J


class DecodeTiles:
    """A builder of tiles for decode steps; those of steps with prompts have one tile."""

    def tile_counts(self, bucket: int) -> tuple[int, ...]:
        return (2, bucket) if bucket > 2 else (bucket,)

    def plan_decode(self, slots: list[int], bucket: int, num_tiles: int | None = None) -> Any:
        if num_tiles is None:
            num_tiles = next(n for n in self.tile_counts(bucket) if n >= len(slots))
        return _Plan(slots[:num_tiles], num_tiles)

    def prompt_shapes(self, tokens: int, wanted: int) -> Any:
        return ((1, 0),)

    def plan_prompt(self, slots: list[int], *rest: Any) -> Any:
        return _Plan([0], 1)


class PromptTiles(DecodeTiles):
    """A builder with room for the tiles of two sequences in steps with prompts."""

    def prompt_shapes(self, tokens: int, wanted: int) -> Any:
        return ((2, 0),)

    def plan_prompt(self, slots: list[int], *rest: Any) -> Any:
        return _Plan(slots, 2) if len(slots) <= 2 else None
