"""One copy for many arrays, and results that are read later."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorikeet.worker.staging import Download, offsets_of, upload, upload_all, view_at

CPU = torch.device("cpu")
ARRAYS = [
    np.arange(5, dtype=np.int32),
    np.asarray([[1.5, -2.0], [0.25, 3.0]], dtype=np.float32),
    np.zeros((0,), dtype=np.int64),
    np.asarray([2**40, -1], dtype=np.int64),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_arrays_arrive_as_they_were(device: str) -> None:
    for array, tensor in zip(ARRAYS, upload_all(ARRAYS, torch.device(device)), strict=True):
        assert np.array_equal(tensor.cpu().numpy(), array)
        assert tensor.cpu().numpy().dtype == array.dtype


def test_arrays_that_are_not_contiguous() -> None:
    table = np.arange(12, dtype=np.int64).reshape(3, 4)[:, 1:3]
    assert upload(table, CPU).tolist() == table.tolist()


def test_every_array_begins_at_a_multiple_of_256_bytes() -> None:
    offsets, total = offsets_of(ARRAYS)
    assert offsets == [0, 256, 512, 512]
    assert total == 768


def test_arrays_at_a_fixed_place() -> None:
    place = torch.zeros(1024, dtype=torch.uint8)
    upload_all(ARRAYS, CPU, into=place)
    assert view_at(place, 0, (5,), np.dtype(np.int32)).tolist() == [0, 1, 2, 3, 4]
    again = upload_all([ARRAYS[0] + 10, *ARRAYS[1:]], CPU, into=place)
    assert again[0].data_ptr() == place.data_ptr()
    assert again[0].tolist() == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("device", DEVICES)
def test_a_download_is_what_the_tensor_was(device: str) -> None:
    tensor = torch.arange(1000, device=device)
    download = Download(tensor, tensor[:2] * 2)
    if device == "cuda":
        tensor.zero_()  # queued behind the copy
    first, second = download.wait()
    assert first.tolist() == list(range(1000))
    assert second.tolist() == [0, 2]
    assert download.wait()[0] is first
