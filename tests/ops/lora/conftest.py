"""Every test of LoRA ops draws the same numbers, whatever ran before it."""

from __future__ import annotations

import os

import pytest
import torch

# What tests compare with on a GPU are matmuls, which torch's deterministic mode allows with this setting alone.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
