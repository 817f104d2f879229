"""Steps of a whole engine that fail before the model is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorikeet import LLM
from lorikeet.worker.worker import Worker


def worker_of(llm: LLM) -> Worker:
    worker = llm._core._worker
    assert isinstance(worker, Worker)
    return worker


def fail_steps(
    llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[], object],
    when: Callable[[Any], bool],
) -> None:
    """Call ``fail``, which raises, in place of the model for each batch of which ``when`` is true."""
    network = worker_of(llm)._model

    def failing(forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(batch: Any) -> Any:
            if when(batch):
                fail()
            return forward(batch)

        return run

    monkeypatch.setattr(network, "forward", failing(network.forward))
    monkeypatch.setattr(network, "forward_pooled", failing(network.forward_pooled))
    monkeypatch.setattr(network, "wanted_states", failing(network.wanted_states))


def fail_attention(
    llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[], object],
    when: Callable[[Any], bool],
) -> None:
    """Call ``fail``, which raises, in place of a layer's attention for each layer number of which ``when`` is true."""
    attention: Any = worker_of(llm)._attention
    forward = attention.backend.forward

    def failing(q: Any, k: Any, v: Any, kv: Any, layer: int, *more: Any) -> torch.Tensor:
        if when(layer):
            fail()
        return forward(q, k, v, kv, layer, *more)

    monkeypatch.setattr(attention.backend, "forward", failing)


def first(count: int) -> Callable[[Any], bool]:
    """True of as many batches."""
    left = iter([True] * count)
    return lambda batch: next(left, False)
