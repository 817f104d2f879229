"""Which launches may begin early. What they compute is tested wherever kernels run on a GPU."""

from __future__ import annotations

import pytest
import torch

from lorikeet.ops.triton.early import early


@pytest.fixture(autouse=True)
def forget() -> None:
    early.cache_clear()


def test_nothing_is_early_without_a_gpu() -> None:
    assert early(torch.device("cpu")) == {"EARLY": False, "launch_pdl": False}


@pytest.mark.parametrize(("capability", "can"), [((8, 0), False), ((9, 0), True), ((12, 0), True)])
def test_from_hopper_on(capability, can, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    device = torch.device("cuda", 0)
    assert early(device) == {"EARLY": can, "launch_pdl": can}
