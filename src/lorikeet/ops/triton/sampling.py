"""From logits to tokens in Triton: one program per row goes over the vocabulary, once for greedy, twice for a draw.

Shape legend: N rows, V vocab, L lanes (the last token of each running sequence); B tokens of one iteration, a
power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorikeet.ops.triton.launcher import check_rows, kernel, next_power_of_2

# A row is read by one multiprocessor, which is fast when many loads are on their way: large blocks, some at a time.
_MAX_BLOCK = 8192
_ELEMENTS_PER_WARP = 512
_GREEDY_UNROLL = tl.constexpr(4)

# SplitMix64 as in lorikeet.ops.sampling, where its source is named.
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
_DROPPED_BITS = tl.constexpr(24)
_UNIFORM_STEP = tl.constexpr(2.0**-40)
_LARGEST_BELOW_ONE = tl.constexpr(1.0 - 2.0**-24)


def draw_tokens_triton(
    logits_NV: torch.Tensor,
    temperature_N: torch.Tensor,
    seeds_N: torch.Tensor,
    counters_N: torch.Tensor,
    lanes_N: torch.Tensor,
    tokens_L: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton form of :class:`lorikeet.ops.draw.DrawOp`.

    Equals the torch form but for the rounding of two logarithms and a division: another token is chosen only where two
    tokens' noisy scores agree in nearly all digits.

    Raises:
        ValueError: an operand does not have one entry per row, or its last dimension has a stride.
    """
    num_rows, vocab_size = logits_NV.shape
    check_rows(None, logits_NV, tokens_L)
    check_rows(torch.Size((num_rows,)), temperature_N, seeds_N, counters_N, lanes_N)
    chosen_N = torch.empty(num_rows, dtype=torch.int64, device=logits_NV.device)
    scores_N2 = torch.empty((num_rows, 2), dtype=torch.float32, device=logits_NV.device)
    block = min(_MAX_BLOCK, next_power_of_2(vocab_size))
    _draw_tokens[(num_rows,)](
        logits_NV,
        temperature_N,
        seeds_N,
        counters_N,
        lanes_N,
        tokens_L,
        chosen_N,
        scores_N2,
        logits_NV.stride(0),
        V=vocab_size,
        B=block,
        num_warps=max(1, block // _ELEMENTS_PER_WARP),
    )
    return chosen_N, scores_N2


@triton.jit
def _mix64(x):
    """SplitMix64's finaliser on uint64."""
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def _gumbel(hashed_B):
    """Standard Gumbel noise, float32, from uint64 hashes."""
    u_B = ((hashed_B >> _DROPPED_BITS).to(tl.float32) + 0.5) * _UNIFORM_STEP
    u_B = tl.minimum(u_B, _LARGEST_BELOW_ONE)
    # -log1p(-u), without the library function that the interpreter lacks: 1 - u rounds to w, what that lost is
    # (1 - w) - u exactly, and adding it to log(w) is right to one rounding, since it is 0 unless w is near 1.
    w_B = 1.0 - u_B
    return -tl.log((u_B - (1.0 - w_B)) - tl.log(w_B))


@kernel()
def _draw_tokens(
    logits_ptr,
    temperature_ptr,
    seeds_ptr,
    counters_ptr,
    lanes_ptr,
    tokens_ptr,
    chosen_ptr,
    scores_ptr,
    logits_stride,
    V: tl.constexpr,
    B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    temperature = tl.load(temperature_ptr + row)
    lane_B = tl.arange(0, B)

    # Every thread keeps the best of its own columns, the first of equals; they are compared once, after the loop.
    # A NaN replaces any number and no number replaces it, so that the row's NaN needs no flag of its own.
    best_B = tl.full([B], float("-inf"), tl.float32)
    token_B = tl.zeros([B], tl.int32)
    for start in tl.range(0, V, B, loop_unroll_factor=_GREEDY_UNROLL):  # pyright: ignore[reportGeneralTypeIssues]
        at_B = start + lane_B
        x_B = tl.load(row_ptr + at_B, mask=at_B < V, other=float("-inf")).to(tl.float32)
        is_better_B = (x_B > best_B) | (x_B != x_B)
        best_B = tl.where(is_better_B, x_B, best_B)
        token_B = tl.where(is_better_B, at_B, token_B)
    is_nan_B = best_B != best_B
    best_B = tl.where(is_nan_B, float("inf"), best_B)
    largest = tl.max(best_B, axis=0)
    # At least one column holds the maximum, and no column holds a token beyond the vocabulary.
    token = tl.min(tl.where(best_B == largest, token_B, V), axis=0)
    num_nan = tl.sum(is_nan_B.to(tl.int32), axis=0)
    peak = tl.where(num_nan == 0, largest, float("nan"))

    # Without a finite maximum there is no distribution to draw from; the scores say so.
    if (temperature > 0.0) & (tl.abs(largest) < float("inf")):
        seed = tl.load(seeds_ptr + row).to(tl.int64).to(tl.uint64)
        counter = tl.load(counters_ptr + row).to(tl.int64).to(tl.uint64)
        key = _mix64(_mix64(seed + _GAMMA) + (counter + 1) * _GAMMA)
        inverse = 1.0 / temperature
        best_B = tl.full([B], float("-inf"), tl.float32)
        token_B = tl.zeros([B], tl.int32)
        for start in range(0, V, B):
            at_B = start + lane_B
            x_B = tl.load(row_ptr + at_B, mask=at_B < V, other=float("-inf")).to(tl.float32)
            noise_B = _gumbel(_mix64(key + (at_B + 1).to(tl.uint64) * _GAMMA))
            noisy_B = (x_B - largest) * inverse + noise_B
            is_better_B = noisy_B > best_B
            best_B = tl.where(is_better_B, noisy_B, best_B)
            token_B = tl.where(is_better_B, at_B, token_B)
        token = tl.min(tl.where(best_B == tl.max(best_B, axis=0), token_B, V), axis=0)

    lane = tl.load(lanes_ptr + row)
    tl.store(chosen_ptr + row, token)
    tl.store(tokens_ptr + lane, token, mask=lane >= 0)
    tl.store(scores_ptr + 2 * row, peak)
    tl.store(scores_ptr + 2 * row + 1, tl.load(row_ptr + token).to(tl.float32))
