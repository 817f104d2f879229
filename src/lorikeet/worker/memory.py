"""Divides memory between weights, adapters and K/V pages, and refuses what does not fit: the only place that does."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from lorikeet.errors import ConfigError

# Main memory is shared with everything else on the machine, so a CPU engine takes a modest part unless told otherwise.
DEFAULT_CPU_FRACTION = 0.5

WEIGHTS, POOL, STEP = "weights", "adapters", "steps"
# What helps if there is no room for something; for K/V it is ``_KV_ADVICE``.
_ADVICE = {
    WEIGHTS: "Use a smaller --dtype or a smaller model, or end what else uses the device",
    POOL: "Lower --max-loras-per-batch or --max-lora-rank, or name fewer --lora-target-modules",
}
_KV_ADVICE = "Lower --context-length, --max-total-tokens, --max-loras-per-batch or --max-lora-rank, or raise --mem-fraction-static"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySplit:
    """Bytes by purpose, and the number of K/V pages that they pay for."""

    weights_bytes: int
    pool_bytes: int
    kv_bytes: int
    num_pages: int
    page_size: int

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    def __str__(self) -> str:
        return (
            f"weights {size_text(self.weights_bytes)}, adapter pool {size_text(self.pool_bytes)}, "
            f"KV {size_text(self.kv_bytes)} ({self.num_tokens} tokens)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRequest:
    """What the configuration and the model ask for.

    Attributes:
        useful_tokens: more K/V than this could never be used (running requests x context).
        min_tokens: fewer than this cannot serve one request of full length.
        max_total_tokens: the user's own number; overrides the fraction.
        fraction: part of ``available_bytes`` that weights, pool and K/V share; None is ``default_fraction``.
        reserve_bytes: what steps themselves need of it: activations, logits, graphs.
    """

    weights_bytes: int
    pool_bytes: int
    kv_bytes_per_token: int
    page_size: int
    available_bytes: int
    useful_tokens: int
    min_tokens: int
    max_total_tokens: int | None = None
    fraction: float | None = None
    default_fraction: float = DEFAULT_CPU_FRACTION
    reserve_bytes: int = 0


def check_memory(
    available: int | None, needs: Mapping[str, int], *, left: int | None = None
) -> None:
    """Check that there is room for what needs memory.

    Args:
        available: bytes in all; None: not known, and nothing is refused.
        needs: what needs memory -> bytes, in the order in which it is given. The last is what is asked about.
        left: bytes that are left for it; None: what the others leave.

    Raises:
        ConfigError: with all numbers, and what to change.
    """
    if available is None:
        return
    *others, (last, num_bytes) = needs.items()
    if left is None:
        left = available - sum(size for _, size in others)
    if num_bytes > left:
        listed = ", ".join(f"{what} need {size_text(size)}" for what, size in needs.items() if size)
        raise ConfigError(
            f"not enough memory: {size_text(available)} available; {listed}, but only {size_text(max(0, left))} is left "
            f"for {last}. {_ADVICE.get(last, _KV_ADVICE)}"
        )


def split_memory(request: MemoryRequest) -> MemorySplit:
    """Divide memory between weights, adapter pool and K/V.

    Without ``max_total_tokens`` the K/V gets what is left of ``fraction`` of the memory, but never more than could be
    used.

    Raises:
        ConfigError: what is left holds less than ``min_tokens``; the message has the numbers and the flags to change.
    """
    _check_fraction(request)
    most = request.available_bytes - request.reserve_bytes
    budget = int(request.available_bytes * (request.fraction or request.default_fraction))
    left = min(budget, most) - request.weights_bytes - request.pool_bytes
    page_bytes = request.kv_bytes_per_token * request.page_size
    if request.max_total_tokens is not None:
        # The user's number is taken as given, unless there is not that much memory.
        tokens, needed = request.max_total_tokens, request.max_total_tokens
        left = most - request.weights_bytes - request.pool_bytes
    else:
        tokens, needed = request.useful_tokens, min(request.min_tokens, request.useful_tokens)
    needs = {
        WEIGHTS: request.weights_bytes,
        POOL: request.pool_bytes,
        STEP: request.reserve_bytes,
        f"K/V for {needed} tokens": needed * request.kv_bytes_per_token,
    }
    check_memory(request.available_bytes, needs, left=left)
    num_pages = min(-(-tokens // request.page_size), left // page_bytes)
    return MemorySplit(
        weights_bytes=request.weights_bytes,
        pool_bytes=request.pool_bytes,
        kv_bytes=num_pages * page_bytes,
        num_pages=max(1, num_pages),
        page_size=request.page_size,
    )


def _check_fraction(request: MemoryRequest) -> None:
    """Refuse a ``--mem-fraction-static`` that leaves too little memory for the steps themselves."""
    if request.fraction is None or request.reserve_bytes == 0:
        return
    left = int(request.available_bytes * (1 - request.fraction))
    if left < request.reserve_bytes:
        highest = math.floor(100 * (1 - request.reserve_bytes / request.available_bytes)) / 100
        raise ConfigError(
            f"--mem-fraction-static {request.fraction} leaves {size_text(left)} for the steps themselves, which need "
            f"{size_text(request.reserve_bytes)}; allowed: at most {max(highest, 0)}, or lower --chunked-prefill-size or "
            "--max-running-requests"
        )


def available_host_bytes() -> int:
    """Main memory that is free or can be freed, in bytes; a container's own limit counts."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        free = int(fields["MemAvailable"].split()[0]) * 1024
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            free = min(free, int(file.read()))
    except (OSError, KeyError, ValueError):
        pass  # not Linux, or no limit ("max"): the plain figure stands
    return free


def size_text(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
