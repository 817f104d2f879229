from __future__ import annotations

import gc
from pathlib import Path

import pytest

from lorikeet.client.uploads import Uploads
from lorikeet.errors import AdapterError
from lorikeet.scratch import PREFIX


def test_each_has_a_directory_of_its_own_that_nobody_else_enters(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "root")
    assert not (tmp_path / "root").exists(), "nothing is made before it is needed"
    first, second = uploads.new(), uploads.new()
    for weights in (first, second):
        weights.write_text("x")
    assert first.parent != second.parent
    assert {path.stat().st_mode & 0o777 for path in (first.parent, second.parent)} == {0o700}
    uploads.discard(first)
    uploads.discard(first)
    assert [path.name for path in (tmp_path / "root").iterdir()] == [second.parent.name]
    uploads.close()
    assert list(tmp_path.iterdir()) == []


def test_without_a_root_they_go_with_the_object() -> None:
    uploads = Uploads()
    root = uploads.new().parent.parent
    assert (root.name.startswith(PREFIX), root.stat().st_mode & 0o777) == (True, 0o700)
    del uploads
    gc.collect()
    assert not root.exists()


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    with pytest.raises(AdapterError, match="cannot make a directory for tensors"):
        Uploads(tmp_path / "root").new()
