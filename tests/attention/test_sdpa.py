"""The SDPA backend against attention written out query by query."""

from __future__ import annotations

import math

import pytest
import torch

from lorikeet.attention.base import AttentionBackend, AttentionInputs
from lorikeet.attention.sdpa import SDPABackend
from lorikeet.kv.storage import KVStorage

Q, K, H = 4, 2, 8
PAGE = 4
LAYER = 1


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Step:
    """Sequences of given (queries, keys) in poisoned memory: what no sequence owns is NaN, in K and in V."""

    def __init__(self, shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> None:
        tables = [-(-keys // PAGE) for _, keys in shapes]
        num_pages = sum(tables) + 3
        free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(1)).tolist()
        pages = [[free.pop() for _ in range(count)] for count in tables]
        self.kv = KVStorage(2, num_pages, PAGE, K, H, dtype, "cpu")
        for tensor in (*self.kv.k, *self.kv.v):
            tensor.fill_(torch.nan)
        self.keys = [
            draw(keys, K, H, seed=10 + i, dtype=dtype) for i, (_, keys) in enumerate(shapes)
        ]
        self.values = [
            draw(keys, K, H, seed=90 + i, dtype=dtype) for i, (_, keys) in enumerate(shapes)
        ]
        starts, slots = [0], []
        for i, (queries, keys) in enumerate(shapes):
            places = torch.tensor([pages[i][p // PAGE] * PAGE + p % PAGE for p in range(keys)])
            self.kv.k[LAYER][places], self.kv.v[LAYER][places] = self.keys[i], self.values[i]
            starts.append(starts[-1] + queries)
            slots.append(places[keys - queries :])
        width = max(tables)
        self.inputs = AttentionInputs(
            query_starts=starts,
            kv_lens=[keys for _, keys in shapes],
            page_table_NP=torch.tensor([p + [0] * (width - len(p)) for p in pages]),
            slot_mapping_T=torch.cat(slots),
            page_size=PAGE,
        )
        self.queries = draw(starts[-1], Q, H, seed=5, dtype=dtype)
        self.new_keys = self.kv.k[LAYER][self.inputs.slot_mapping_T]
        self.new_values = self.kv.v[LAYER][self.inputs.slot_mapping_T]

    def run(self, backend: AttentionBackend, window: int | None) -> torch.Tensor:
        return backend.forward(
            self.queries, self.new_keys, self.new_values, self.kv, LAYER, self.inputs, window
        )

    def wanted(self, window: int | None) -> torch.Tensor:
        rows = []
        for i, kv_len in enumerate(self.inputs.kv_lens):
            start, end = self.inputs.query_starts[i : i + 2]
            for row in range(start, end):
                last = kv_len - (end - row)
                first = 0 if window is None else max(0, last - window + 1)
                seen = slice(first, last + 1)
                for head in range(Q):
                    k = self.keys[i][seen, head // (Q // K)].double()
                    v = self.values[i][seen, head // (Q // K)].double()
                    scores = k @ self.queries[row, head].double() / math.sqrt(H)
                    rows.append(scores.softmax(0) @ v)
        return torch.stack(rows).view(-1, Q, H)


STEPS = {
    "prompt": [(9, 9)],
    "prompts": [(9, 9), (2, 2), (17, 17)],
    "chunk": [(5, 14)],
    "chunks": [(5, 14), (3, 3), (4, 40)],
    "first-token": [(1, 1)],
    "decode": [(1, 12)],
    "decode-equal": [(1, 12), (1, 12), (1, 12)],
    "decode-ragged": [(1, 12), (1, 1), (1, 33), (1, 8)],
    "decode-far-apart": [(1, 700), (1, 5), (1, 300), (1, 290), (1, 31)],
    "mixed": [(1, 12), (6, 6), (1, 30), (5, 22), (1, 1)],
    "one-of-each": [(7, 7), (1, 20)],
}


@pytest.mark.parametrize("window", [None, 1, 6, 16, 500])
@pytest.mark.parametrize("name", STEPS)
def test_equals_the_definition(name: str, window: int | None) -> None:
    step = Step(STEPS[name])
    got = step.run(SDPABackend(), window)
    torch.testing.assert_close(got.double(), step.wanted(window), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype: torch.dtype) -> None:
    step = Step(STEPS["mixed"], dtype)
    got = step.run(SDPABackend(), 10)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), step.wanted(10), atol=0.03, rtol=0)


def test_queries_need_not_be_contiguous() -> None:
    """As they come from the packed projection."""
    for name in ("decode-ragged", "mixed"):
        step = Step(STEPS[name])
        packed = torch.cat((step.queries, step.queries), dim=1)
        step.queries = packed[:, :Q]
        assert not step.queries.is_contiguous()
        torch.testing.assert_close(
            step.run(SDPABackend(), None).double(), step.wanted(None), atol=1e-5, rtol=0
        )


def test_one_backend_serves_step_after_step() -> None:
    """Windows may differ by layer, and a step that was not prepared is prepared on sight."""
    backend = SDPABackend()
    for name in ("mixed", "decode-ragged", "mixed"):
        step = Step(STEPS[name])
        if name == "decode-ragged":
            backend.prepare(step.inputs)
        for window in (None, 6, None):
            torch.testing.assert_close(
                step.run(backend, window).double(), step.wanted(window), atol=1e-5, rtol=0
            )
