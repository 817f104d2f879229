"""Directories that do not outlive their process."""

from __future__ import annotations

import fcntl
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lorikeet.scratch import MARK, ScratchDir, remove_abandoned


def killed(base: Path) -> Path:
    """What a process leaves that was killed."""
    program = (
        "import os, signal, sys\n"
        "from lorikeet.scratch import ScratchDir\n"
        "print(ScratchDir(sys.argv[1]).path, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(base)], capture_output=True, text=True, check=False
    )
    path = Path(result.stdout.strip())
    assert path.is_dir()
    (path / "file").write_text("x")
    return path


def test_it_is_private_and_removed(tmp_path: Path) -> None:
    made = ScratchDir(str(tmp_path))
    assert stat.S_IMODE(os.stat(made.path).st_mode) == 0o700
    (Path(made.path) / "file").write_text("x")
    made.remove()
    made.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_next_one_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    living = ScratchDir(str(tmp_path))
    left = killed(tmp_path)
    made = ScratchDir(str(tmp_path))
    assert not left.exists()
    assert Path(living.path).is_dir()
    living.remove()
    made.remove()


def test_nothing_else_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lorikeet-notes").mkdir()  # without the mark
    (tmp_path / "lorikeet-file").write_text(MARK)
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / MARK).write_text("1")
    (tmp_path / "lorikeet-link").symlink_to(other)
    before = sorted(tmp_path.rglob("*"))
    remove_abandoned(str(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before
    left = killed(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)  # somebody else's
    remove_abandoned(str(tmp_path))
    assert left.exists()
    monkeypatch.undo()
    remove_abandoned(str(tmp_path))
    assert not left.exists()
    remove_abandoned(str(tmp_path / "nowhere"))


def test_whoever_it_is_handed_to_does_not_own_it(tmp_path: Path) -> None:
    made = ScratchDir(str(tmp_path))
    other: ScratchDir = pickle.loads(pickle.dumps(made))
    assert other.path == made.path
    other.remove()
    assert Path(made.path).is_dir()
    made.remove()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first, second = ScratchDir(str(tmp_path)), ScratchDir(str(tmp_path))
    assert Path(first.path).is_dir(), "who cannot tell removes nothing"
    first.remove()
    second.remove()
    assert list(tmp_path.iterdir()) == []
