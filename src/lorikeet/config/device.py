"""The settings that depend on the device, and the options that a device refuses.

Which GPUs there are is asked of the driver and of torch's files: the HTTP process must not import torch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from pathlib import Path
from typing import Literal, cast

from lorikeet import envs
from lorikeet.errors import ConfigError

_ATTENTION_BACKENDS = {
    "cpu": {"auto": "sdpa", "sdpa": "sdpa", "torch_native": "sdpa"},
    # What auto means depends on the type of the weights, which the engine reads from the model.
    "cuda": {
        "auto": "auto",
        "flashinfer": "flashinfer",
        "fa3": "fa3",
        "sdpa": "sdpa",
        "torch_native": "sdpa",
    },
}
# What calls of the driver return.
_SUCCESS = 0
_MAX_GRAPH_ROWS = 256
# Steps with more tokens keep the device busy for longer than their launches take.
_MAX_GRAPH_TOKENS = 1024


def resolve_device(asked: str) -> str:
    """The device that ``--device`` means: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: ``cuda`` is asked for, and there is none.
    """
    num_devices = num_cuda_devices()
    if asked == "auto":
        return "cuda" if num_devices else "cpu"
    if asked == "cuda" and not num_devices:
        raise ConfigError(
            "--device is cuda, but there is no CUDA device (or no driver for it); allowed: auto, cpu"
        )
    return asked


def check_ranks(tp_size: int) -> None:
    """Refuse more ranks than this version has processes for.

    Raises:
        ConfigError: names the option and what is allowed.
    """
    if tp_size > 1:
        raise ConfigError(
            f"--tp-size is {tp_size}, more than the devices that this version uses: 1; allowed: 1"
        )


def resolve_lora_backend(device: str, asked: str) -> Literal["torch", "triton", "csgmv"]:
    """The kernels that ``--lora-backend`` means; ``auto`` is what measured fastest
    (docs/decisions/0011-lora-on-a-gpu.md).

    Raises:
        ConfigError: the kernels need a GPU, or Triton's interpreter, and there is neither.
    """
    on_gpu = device == "cuda"
    if asked == "auto":
        return "csgmv" if on_gpu else "torch"
    if asked in ("triton", "csgmv") and not on_gpu and not envs.TRITON_INTERPRET.get():
        raise ConfigError(
            f"--lora-backend is {asked}, which needs a GPU (or Triton's interpreter, TRITON_INTERPRET=1); allowed on "
            "this device (cpu): auto, torch"
        )
    return cast('Literal["torch", "triton", "csgmv"]', asked)


def resolve_attention(device: str, asked: str | None) -> str:
    """The attention backend that ``--attention-backend`` means; ``auto`` where the model decides.

    Raises:
        ConfigError: the device has no such backend.
    """
    known = _ATTENTION_BACKENDS[device]
    if asked is not None and asked not in known:
        raise ConfigError(
            f"--attention-backend is {asked}; allowed on this device ({device}): {', '.join(known)}"
        )
    return known[asked or "auto"]


def max_graph_rows(
    device: str, sizes: tuple[int, ...] | None, most: int | None, max_running: int
) -> int | None:
    """Rows of the largest batch with a CUDA graph: never more than run at a time. A CPU has no graphs, so ``most`` stays
    as it is.

    Args:
        sizes, most: ``--cuda-graph-bs`` and ``--cuda-graph-max-bs``.

    Raises:
        ConfigError: no size can be used.
    """
    if device == "cpu":
        return most
    limit = min(most or (_MAX_GRAPH_ROWS if sizes is None else max_running), max_running)
    if sizes is None:
        return limit
    usable = [size for size in sizes if size <= limit]
    if not usable:
        raise ConfigError(
            f"--cuda-graph-bs has no batch size up to {limit} (--max-running-requests, --cuda-graph-max-bs); allowed: at "
            "least one, or --disable-cuda-graph"
        )
    return max(usable)


def max_graph_tokens(device: str, most: int | None, chunk: int) -> int | None:
    """Tokens of the largest step with prompts that runs in CUDA graphs. A CPU has none, so ``most`` stays as it is.

    Args:
        most: ``--piecewise-cuda-graph-max-tokens``.
        chunk: most tokens of a step with prompts.
    """
    if device == "cpu":
        return most
    return min(most or _MAX_GRAPH_TOKENS, chunk)


@functools.cache
def num_cuda_devices() -> int:
    """CUDA devices that are visible (``CUDA_VISIBLE_DEVICES`` counts); 0 without a driver, or with a torch for CPUs."""
    if not torch_has_cuda():
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != _SUCCESS or driver.cuDeviceGetCount(ctypes.byref(count)) != _SUCCESS:
        return 0
    return count.value


def torch_has_cuda() -> bool:
    """True unless the installed torch says that it was built without CUDA."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    try:
        text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return True
    return re.search(r"^cuda\b[^=\n]*=\s*None\b", text, re.MULTILINE) is None
