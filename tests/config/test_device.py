"""GPUs without torch: what its files and the driver say."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from lorikeet.config import device


def test_this_torch_is_what_it_says() -> None:
    assert device.torch_has_cuda() == (torch.version.cuda is not None)


@pytest.mark.parametrize(
    ("text", "has_cuda"),
    [
        ("cuda: Optional[str] = None\nhip = None\n", False),
        ("cuda = None\n", False),
        ("cuda: Optional[str] = '13.0'\n", True),
        ("__version__ = '2.11'\n", True),
    ],
)
def test_reading_torchs_version(tmp_path, monkeypatch, text: str, has_cuda: bool) -> None:
    (tmp_path / "version.py").write_text(text)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert device.torch_has_cuda() == has_cuda


def test_no_torch_no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not device.torch_has_cuda()
    assert device.num_cuda_devices.__wrapped__() == 0


def test_no_driver_no_gpu(monkeypatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(device, "torch_has_cuda", lambda: True)
    monkeypatch.setattr(device.ctypes, "CDLL", refuse)
    assert device.num_cuda_devices.__wrapped__() == 0
