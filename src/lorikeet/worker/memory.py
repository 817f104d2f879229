"""How much memory the K/V pages get: what is there, what the weights and the adapter pool take, what is left."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lorikeet.errors import ConfigError

# Main memory is shared with everything else on the machine, so a CPU engine takes a modest part unless told otherwise.
DEFAULT_CPU_FRACTION = 0.5


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
            f"weights {_size(self.weights_bytes)}, adapter pool {_size(self.pool_bytes)}, "
            f"KV {_size(self.kv_bytes)} ({self.num_tokens} tokens)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRequest:
    """What the configuration and the model ask for.

    Attributes:
        useful_tokens: more K/V than this could never be used (running requests x context).
        min_tokens: fewer than this cannot serve one request of full length.
        max_total_tokens: the user's own number; overrides the fraction.
        fraction: part of ``available_bytes`` that weights, pool and K/V share.
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


def split_memory(request: MemoryRequest) -> MemorySplit:
    """Divide memory between weights, adapter pool and K/V.

    Without ``max_total_tokens`` the K/V gets what is left of ``fraction`` of the memory, but never more than could be
    used.

    Raises:
        ConfigError: what is left holds less than ``min_tokens``; the message has the numbers and the flags to change.
    """
    budget = int(request.available_bytes * (request.fraction or DEFAULT_CPU_FRACTION))
    left = budget - request.weights_bytes - request.pool_bytes
    page_bytes = request.kv_bytes_per_token * request.page_size
    if request.max_total_tokens is not None:
        # The user's number is taken as it is, short of what does not exist at all.
        tokens, needed = request.max_total_tokens, request.max_total_tokens
        left = request.available_bytes - request.weights_bytes - request.pool_bytes
    else:
        tokens, needed = request.useful_tokens, min(request.min_tokens, request.useful_tokens)
    if needed * request.kv_bytes_per_token > left:
        raise ConfigError(_shortage(request, needed, left))
    num_pages = min(-(-tokens // request.page_size), left // page_bytes)
    return MemorySplit(
        weights_bytes=request.weights_bytes,
        pool_bytes=request.pool_bytes,
        kv_bytes=num_pages * page_bytes,
        num_pages=max(1, num_pages),
        page_size=request.page_size,
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


def _shortage(request: MemoryRequest, needed_tokens: int, left: int) -> str:
    return (
        f"not enough memory: {_size(request.available_bytes)} available; weights need "
        f"{_size(request.weights_bytes)}, the adapter pool {_size(request.pool_bytes)}, and K/V for "
        f"{needed_tokens} tokens {_size(needed_tokens * request.kv_bytes_per_token)}, but {_size(max(0, left))} is "
        "left for it. Lower --context-length, --max-total-tokens, --max-loras-per-batch or --max-lora-rank, or raise "
        "--mem-fraction-static"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
