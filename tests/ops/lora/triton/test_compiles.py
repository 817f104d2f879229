"""The LoRA kernels compile for a GPU, on a machine without one."""

from __future__ import annotations

import os
import subprocess
import sys


def test_every_kernel_compiles(tmp_path, pytestconfig):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_lora"],
        cwd=pytestconfig.rootpath,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 21
