"""What a CUDA graph does, on a CPU: the operators of a capture, run again on the tensors that they had."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedGraph(TorchDispatchMode):
    """In place of ``torch.cuda.CUDAGraph``. A capture runs its operators, too, which a real one does not: overwrite what
    it computed before you look at what a replay does."""

    is_any_capturing = False

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def capture_begin(self, pool: Any = None) -> None:
        del pool
        assert not RecordedGraph.is_any_capturing, "a stream captures one graph at a time"
        RecordedGraph.is_any_capturing = True
        self.__enter__()

    def capture_end(self) -> None:
        RecordedGraph.is_any_capturing = False
        self.__exit__(None, None, None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                # Some return their argument, or a part of it, for one type and a new tensor for others.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
