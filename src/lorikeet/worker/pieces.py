"""A forward pass in pieces: CUDA graphs of everything but attention, and attention's calls between them.

Attention of prompts depends on how many there are and how long each is, which a graph cannot follow; every other
kernel of a step sees a number of tokens alone. So a pass is captured up to a layer's attention, and on from there.

Shape legend: T tokens that the pass was captured for, t <= T those of a step, Q query heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lorikeet.attention.cut import AttentionCall, CutAttention


class Pieces:
    """A captured pass. Its tensors stand at fixed places, which belong to other pieces as soon as they were read: so
    pieces are replayed in order and all of them.

    Args:
        pool: of the memory that graphs share.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._calls: list[tuple[AttentionCall, torch.Tensor]] = []

    def capture(self, forward: Callable[[], torch.Tensor], attention: CutAttention) -> torch.Tensor:
        """Capture ``forward``, whose result is valid from one replay to the next, on the current stream.

        Args:
            attention: the backend that ``forward`` calls.
        """
        with attention.cut(self._cut):
            self._begin()
            try:
                result = forward()
            finally:
                # Also after an error: a stream that is left capturing can do nothing else.
                self._graphs[-1].capture_end()
        return unowned(result)

    def replay(self, attend: Callable[[AttentionCall], torch.Tensor], num_tokens: int) -> None:
        """Queue the pass for the first ``num_tokens`` (t) rows; what the other rows hold does not matter.

        Args:
            attend: attention of one layer; the call's tensors have t rows.
        """
        for graph, (call, out_TQH) in zip(self._graphs, self._calls, strict=False):
            graph.replay()
            q, k, v = call.q_TQH[:num_tokens], call.k_TKH[:num_tokens], call.v_TKH[:num_tokens]
            out_TQH[:num_tokens].copy_(attend(replace(call, q_TQH=q, k_TKH=k, v_TKH=v)))
        self._graphs[-1].replay()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        graph.capture_begin(self._pool)

    def _cut(self, call: AttentionCall) -> torch.Tensor:
        # Of the graphs' memory, like everything that is made during a capture.
        out_TQH = torch.empty_like(call.q_TQH, memory_format=torch.contiguous_format)
        self._graphs[-1].capture_end()
        kept = replace(
            call,
            q_TQH=unowned(call.q_TQH),
            k_TKH=unowned(call.k_TKH),
            v_TKH=unowned(call.v_TKH),
        )
        self._calls.append((kept, unowned(out_TQH)))
        self._begin()
        return out_TQH


class _Memory:
    """Bytes of the device, for ``torch.as_tensor``: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def unowned(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, which may be given to others meanwhile: for tensors of a graph, written anew by each replay.

    Graphs would need the memory of all their tensors that anybody holds, each of its own.
    """
    if not tensor.is_cuda:
        return tensor
    span = 1 + sum(
        (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    memory = _Memory(tensor.data_ptr(), span * tensor.element_size())
    flat = torch.as_tensor(memory, device=tensor.device)
    return flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
