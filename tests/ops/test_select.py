"""The table of ops."""

from __future__ import annotations

import pytest

from lorikeet.errors import ConfigError
from lorikeet.ops.norm import rms_norm_torch
from lorikeet.ops.select import select_ops


def test_cpu_runs_torch() -> None:
    assert select_ops("cpu").rms_norm is rms_norm_torch


def test_an_op_without_a_triton_form_runs_torch_on_a_gpu() -> None:
    assert select_ops("cuda").rms_norm is rms_norm_torch


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="'tpu' is not supported; supported: cpu, cuda"):
        select_ops("tpu")
