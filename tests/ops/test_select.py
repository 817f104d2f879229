"""The table of ops."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorikeet.errors import ConfigError
from lorikeet.ops.draw import draw_tokens_torch
from lorikeet.ops.norm import rms_norm_torch
from lorikeet.ops.select import select_ops


def test_cpu_runs_torch() -> None:
    ops = select_ops("cpu")
    assert ops.rms_norm is rms_norm_torch
    assert ops.draw is draw_tokens_torch


def test_a_gpu_runs_triton() -> None:
    ops = select_ops("cuda")
    forms = [getattr(ops, name) for name in ops.__slots__]
    assert {form.__module__.rpartition(".")[0] for form in forms} == {"lorikeet.ops.triton"}


def test_cpu_does_not_import_triton() -> None:
    code = "import sys; from lorikeet.ops.select import select_ops; select_ops('cpu'); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match=r"needs Triton, .* pip install 'lorikeet\[gpu\]'"):
        select_ops("cuda")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="'tpu' is not supported; supported: cpu, cuda"):
        select_ops("tpu")
